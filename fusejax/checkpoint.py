"""Checkpoints of the training state; the only file that imports orbax.

A save that was cut off leaves a temporary folder that is never taken for a checkpoint.
"""

import logging
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from fusejax import paths
from fusejax.config import CheckpointConfig
from fusejax.errors import UserError
from fusejax.outputs import make_folder, require_space, writing_failed

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step it takes


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never. `training.preemption` alone asks JAX; orbax would in each save, and upset its count."""
        return False


class Checkpoints:
    """The checkpoints of one run: `save` writes in the background, `restore` gives the latest back.

    Use as a context manager: leaving it waits for the last save.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        paths.require_checkpoints(paths.at(folder))
        self.folder = make_folder(folder)
        if not paths.is_remote(self.folder):
            self.folder = self.folder.resolve()
        policies: list[Any] = [preservation.LatestN(config.keep)]
        if config.keep_best:
            least = {"get_metric_fn": itemgetter("loss"), "reverse": True, "keep_checkpoints_without_metrics": False}
            policies.append(preservation.BestN(n=config.keep_best, **least))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = _Manager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        failed: Exception | None = None
        for leave in (self._manager.wait_until_finished, self._manager.close):
            try:
                leave()
            except Exception as error:  # of the background save: of what type depends on the storage
                failed = failed or error
        if failed is not None and kind is None:
            raise self._failed(failed) from None

    def _failed(self, error: Exception) -> Exception:
        """The error of a save; that of an exchange between processes stays what it is."""
        between = jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)
        return error if between else writing_failed(self.folder, error)

    def latest(self) -> int | None:
        """The step of the latest whole checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until the last save is whole."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of the background save: of what type depends on the storage
            raise self._failed(error) from None

    def save(self, step: int, state: Any, about: Mapping[str, Any], loss: float | None = None) -> None:
        """Save a pytree of arrays as step `step`, with `about` (JSON) beside it; returns when the arrays are copied.

        loss: by which `checkpoint.keep_best` chooses.
        """
        if step == self.latest():
            return
        # Asked first: on a full disk the library's threads write pages of their own. Compression saves a little of it.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        require_space(self.folder, size + (1 << 20))
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(dict(about)))
        try:
            self._manager.save(step, args=arguments, metrics=None if loss is None else {"loss": loss})
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from None

    def about(self) -> dict[str, Any]:
        """What was saved beside the latest checkpoint."""
        return self._manager.restore(self.latest(), args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def restore(self, like: Any) -> tuple[int, Any]:
        """(step, state) of the latest checkpoint, laid out as `like`: arrays or shapes with dtypes and shardings."""
        step = self.latest()
        if step is None:
            raise UserError(f"{self.folder}: holds no checkpoint; run `fusejax train` first")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except (ValueError, KeyError, OSError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self.folder}/{step}: cannot be restored ({line[:200]}); remove it to go on from an earlier one"
            ) from None
        return step, restored["state"]

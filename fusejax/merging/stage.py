"""`merge`: models of one architecture into one, tensor by tensor, as a Hugging Face folder."""

import json
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax import corpus, export, models, preflight, sharding
from fusejax.config import ModelConfig
from fusejax.errors import UserError
from fusejax.merging import checkpoints, methods
from fusejax.merging.checkpoints import Checkpoint
from fusejax.merging.config import MergeConfig
from fusejax.models import files
from fusejax.progress import progress, say, warn


def merge(config: MergeConfig) -> Path:
    """Write the merged model to `config.output` and return that folder; nothing is done where it is there, whole.

    Raises UserError, naming tensor, key or row, where the models do not fit each other; then nothing is written.
    """
    before = export.made_from(config.folder).get("merge")
    if before is None:
        _require_free(config.folder)
    inputs = _inputs(config)
    if before == inputs:
        if export.is_whole(config.folder):
            say(f"merge {config.folder}: done before, skipped")
            return config.folder
        warn(f"{config.folder}: is no longer whole, merging again")
    if config.corpus is not None:
        corpus.check(config.corpus)
        for model in config.models:
            preflight.check_length(model, config.max_length, "max_length")
    opened = open_all(config)
    made: dict[str, Any] = {"merge": inputs}
    if config.method == "greedy_soup":
        from fusejax.merging import soup

        chosen, made["steps"] = soup.choose(config, opened)
        kept = [opened.models[config.models.index(model)] for model in chosen]
        config, opened = config.model_copy(update={"models": chosen}), Opened(None, kept, opened.donor)
    write_merged(config, opened, config.folder, made)
    count = len(config.models)
    say(f"merge: {config.method} of {count} model{'s' if count > 1 else ''} → {config.folder}")
    return config.folder


class Opened:
    """The checkpoints of a merge, checked against each other."""

    def __init__(self, base: Checkpoint | None, merged: Sequence[Checkpoint], donor: Path) -> None:
        self.base, self.models, self.donor = base, list(merged), donor

    @property
    def first(self) -> Checkpoint:
        """Whose configuration and dtypes the result has."""
        return self.base or self.models[0]


def open_all(config: MergeConfig) -> Opened:
    """Every checkpoint of a merge; UserError where they do not fit each other."""
    given: list[ModelConfig] = [*([config.base] if config.base else []), *config.models]
    found = [checkpoints.open_checkpoint(model) for model in given]
    for other in found[1:]:
        checkpoints.require_mergeable(found[0], other)
    checkpoints.require_one_vocabulary(found, given)
    donor = found[0].folder
    if config.tokenizer is not None:
        donor = files.local_folder(config.tokenizer.model, config.tokenizer.revision, weights=False)
        checkpoints.require_one_vocabulary(
            [*found, Checkpoint(config.tokenizer.model, donor, found[0].family, found[0].config, {}, {})],
            [*given, config.tokenizer],
        )
    return Opened(found[0] if config.base else None, found[1:] if config.base else found, donor)


def write_merged(config: MergeConfig, opened: Opened, folder: Path, made_from: dict[str, Any]) -> None:
    """The merge of checkpoints that fit each other, as a folder that appears whole or not at all."""
    like = opened.first
    dtypes = {
        name: tensor.dtype if config.dtype == "auto" else files.DTYPES[_KINDS[config.dtype]]
        for name, tensor in like.tensors.items()
    }
    place = _placement()
    with export.written(folder) as temporary, progress(f"merge {folder.name}", len(like.tensors)) as bar:

        def tensor(name: str) -> np.ndarray:
            read = [place(checkpoint.tensors[name].read()) for checkpoint in opened.models]
            base = place(opened.base.tensors[name].read()) if opened.base else None
            merged = np.asarray(merge_tensor(config, base, jnp.stack(read), tensor_key(config, name)))
            if not np.isfinite(merged).all():
                raise UserError(
                    f"{folder}: tensor {name} would hold values that are not numbers; {_blame(read, opened)}"
                )
            bar.advance(1, name)
            return _rounded(merged, dtypes[name], name)

        checkpoints.write(temporary, like, opened.donor, dtypes, tensor)
        (temporary / export.MARKER).write_text(json.dumps(made_from, indent=1) + "\n", "utf-8")


_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _rounded(merged: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = merged.astype(dtype)
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise UserError(f"tensor {name}: the merged values are too large for {np.dtype(dtype)}; set `dtype: bfloat16`")
    return rounded


def _blame(read: Sequence[jax.Array], opened: Opened) -> str:
    for array, checkpoint in zip(read, opened.models, strict=True):
        if not bool(jnp.isfinite(array).all()):
            return f"those of {checkpoint.folder} are not"
    return "lower the weights or `scale`"


def _placement() -> Callable[[np.ndarray], jax.Array]:
    """Puts a tensor on the devices as float32, split over all of them where one of its dimensions allows."""
    mesh = sharding.whole_mesh()

    def place(array: np.ndarray) -> jax.Array:
        return jax.device_put(array.astype(np.float32), sharding.spread(mesh, array.shape))

    return place


@partial(jax.jit, static_argnums=0)
def merge_tensor(config: MergeConfig, base: Any, models_NS: jax.Array, key: jax.Array) -> jax.Array:
    """One tensor merged by the configured method: base float32 [S] or None, models [N, S] → [S]. key: see `dare`."""
    weights = jnp.asarray(config.weights, jnp.float32)
    density = [model.density for model in config.models]
    scale, normalize = config.scale, config.normalized
    if config.method == "slerp":
        return methods.slerp(models_NS[0], models_NS[1], config.t)
    if config.method == "task_arithmetic":
        return methods.task_arithmetic(base, models_NS, weights, scale, normalize)
    if config.method == "ties":
        return methods.ties(base, models_NS, weights, density, scale, normalize)
    if config.method in ("dare_linear", "dare_ties"):
        elect_sign = config.method == "dare_ties"
        return methods.dare(base, models_NS, weights, density, key, scale, normalize, config.rescale, elect_sign)
    if config.method == "sce":
        return methods.sce(base, models_NS, config.top, config.select, scale, normalize)
    return methods.linear(models_NS, weights, normalize)


def tensor_key(config: MergeConfig, name: str) -> jax.Array:
    """The random key of a tensor, whatever the others are."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def _require_free(folder: Path) -> None:
    """UserError where no model can be written, or where one is that no merge made."""
    export.require_place(folder)
    found = export.of_a_model(folder)
    if found:
        raise UserError(
            f"{folder}: holds a model that no merge made ({found[0]}); choose another `output`, or remove it"
        )


def _inputs(config: MergeConfig) -> dict[str, Any]:
    """What determines the result."""
    given = [*config.models, *([config.base] if config.base else [])]
    values = config.model_dump(mode="json", exclude={"output"})
    return values | {"weights": [models.fingerprint(model.model, model.revision) for model in given]}

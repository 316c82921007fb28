"""The stage `train`: each run from its latest checkpoint to its last step."""

import json
import time
from pathlib import Path
from typing import Any

import jax

from fusejax import distributed, flops, metrics, outputs, sharding
from fusejax.batches import Batches
from fusejax.checkpoint import Checkpoints
from fusejax.config import Config, dump
from fusejax.errors import Resumable, UserError
from fusejax.progress import progress, say, warn
from fusejax.training import preemption
from fusejax.training.meter import Meter
from fusejax.training.runs import (
    check_record,
    check_settings,
    code_fingerprint,
    forget,
    read_record,
    run_config,
    run_folder,
    run_inputs,
    runs,
)
from fusejax.training.state import Trainer

_ANEW = "set checkpoint.resume=false to train anew, or choose another `output`"


def check(config: Config) -> None:
    """UserError where a run of the job was begun with other settings, before stages replace what it was made from."""
    if config.checkpoint.resume:
        for name in runs(config):
            check_settings(config, name, _ANEW)


def run(config: Config) -> None:
    """The stage `train`. Raises UserError where an earlier stage is missing or made from something else."""
    for name in runs(config):
        train(config, name)
    distributed.alone("train: settings", lambda: _note(config))  # where all was done before


def train(config: Config, name: str) -> None:
    """One run, from its latest checkpoint to its last step. Raises Resumable, all being saved, where it was stopped."""
    job, folder, config = config, run_folder(config, name), run_config(config, name)
    inputs = run_inputs(config, name)
    record = distributed.alone(f"train {name}", lambda: _earlier(config, folder, inputs))
    if record is not None and record["done"]:
        say(f"train {name}: done before, skipped")
        return
    with_sources = bool(config.sources) and name != "clm"
    batches = Batches(config, with_sources=with_sources)
    trainer = Trainer.make(config, batches.steps_total, with_sources)
    distributed.alone(f"train {name}: begin", lambda: _begin(job, folder, inputs))  # all is known to be right
    started = time.monotonic()
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        summary = Loop(trainer, batches, checkpoints, folder, name).run()
    summary["seconds"] = time.monotonic() - started
    done = {"inputs": inputs, "done": True, "steps": trainer.steps_total, "throughput": summary}
    if jax.process_index() == 0:
        outputs.write_atomically(folder / "training.json", json.dumps(done, indent=1))


def _earlier(config: Config, folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of an earlier start of the run, if it is to go on; UserError where it is another run."""
    record = read_record(folder) if config.checkpoint.resume else None
    if record is not None:
        check_record(folder, record, inputs, _ANEW)
    return record


def _note(job: Config) -> None:
    """Write down the settings, which are those of what is there."""
    outputs.write_atomically(job.folder / "config.yaml", dump(job))


def _begin(job: Config, folder: Path, inputs: dict[str, Any]) -> None:
    """Write down that the run has begun; what an earlier one left goes where it is not to go on."""
    _note(job)
    if not job.checkpoint.resume:
        forget(folder)
        for name in ("report.json", "report.html"):  # of the job, whichever of its runs begins anew
            (job.folder / name).unlink(missing_ok=True)
    outputs.write_atomically(folder / "training.json", json.dumps({"inputs": inputs, "done": False}, indent=1))


class Loop:
    """Steps until the last one; metrics are read one step late, so that the device never waits for the host."""

    def __init__(self, trainer: Trainer, batches: Batches, checkpoints: Checkpoints, folder: Path, name: str) -> None:
        self._trainer, self._config, self._total = trainer, trainer.config, trainer.steps_total
        self._batches, self._checkpoints, self._folder, self._name = batches, checkpoints, folder, name
        self._labels = [source.label for source in trainer.config.sources]
        self._meter = Meter(
            flops.training_per_token(trainer.model_config, trainer.config.max_length), trainer.mesh.size
        )
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._losses: list[float] = []  # since the last checkpoint
        self._skipping = self._profiling = False

    def run(self) -> dict[str, Any]:
        """The throughput, once all steps are done."""
        first, state = self._start()
        n, mesh = self._config.batch.sequences, self._trainer.mesh
        rows = sharding.local_rows(n, mesh)
        log = metrics.Metrics(self._folder, first, self._config.wandb) if jax.process_index() == 0 else None
        try:
            with progress(f"train {self._name}", self._total) as bar, preemption.Notice() as notice:
                bar.advance(first)
                for step, batch in self._batches.iterate(first, rows=rows):
                    self._profile(step + 1)
                    on_mesh = sharding.put_batch(batch, mesh, n)
                    state, values = self._trainer.step(state, self._trainer.fixed, on_mesh, self._trainer.tables)
                    note = self._flush(log)
                    self._waiting = (step + 1, values)
                    stop = notice.came()
                    if stop or (step + 1) % self._config.checkpoint.every == 0 or step + 1 == self._total:
                        note = self._flush(log)
                        if log is not None:
                            log.keep()  # a run that goes on from the checkpoint has the metrics up to it
                        self._save(step + 1, state)
                    bar.advance(1, note)
                    if stop:
                        raise self._stopped(step + 1, notice)
        finally:
            self._profile(None)
            if log is not None:
                log.close()
        return self._meter.summary()

    def _start(self) -> tuple[int, Any]:
        """(steps done, state) of the latest checkpoint, or of the beginning."""
        if self._checkpoints.latest() is None:
            return 0, self._trainer.state
        first, state = self._checkpoints.restore(self._trainer.state)
        say(f"train {self._name}: goes on from step {first} of {self._total}")
        if self._checkpoints.about()["code"] != code_fingerprint():
            warn(f"train {self._name}: the checkpoint was made by another version of fusejax's code")
        return first, state

    def _flush(self, log: metrics.Metrics | None) -> str:
        """Read and write down the waiting step's metrics; a note for the progress bar."""
        if self._waiting is None:
            return ""
        step, values = self._waiting[0], _readable(self._waiting[1], self._labels)
        self._waiting = None
        _stop_if_stuck(values, step, self._trainer, self._folder)
        self._skipping = values["skipped_in_a_row"] > 0
        self._losses.append(values["loss"])
        self._meter.add(values["tokens"])
        if log is not None:
            log.write(step, values)
        return f"loss {values['loss']:.4f}"

    def _save(self, step: int, state: Any) -> None:
        """A checkpoint, unless the last step was skipped: what led there may be what is broken."""
        if self._skipping:
            return
        about = {
            "data": {"next_step": step, "seed": self._config.seed, "sequences": self._config.batch.sequences},
            "config": outputs.fingerprint(dump(self._config)),
            "code": code_fingerprint(),
        }
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._checkpoints.save(step, state, about, loss)
        self._losses = []

    def _profile(self, step: int | None) -> None:
        """Begin or end the profile before `step`; None: the run ends."""
        window = self._config.profile
        if window is None:
            return
        if self._profiling and (step is None or step >= window.start + window.steps):
            jax.profiler.stop_trace()
            self._profiling = False
            say(f"train {self._name}: profile in {self._folder / 'profile'}")
        elif step == window.start:
            jax.profiler.start_trace(self._folder / "profile")
            self._profiling = True

    def _stopped(self, step: int, notice: preemption.Notice) -> Resumable:
        self._checkpoints.wait()
        saved = f"saved at step {self._checkpoints.latest()}; the same command goes on"
        return notice.stop(f"train {self._name}", f"at step {step} of {self._total}: {saved}")


def _stop_if_stuck(values: dict[str, float], step: int, trainer: Trainer, folder: Path) -> None:
    """UserError after `guard.limit` skipped steps in a row, and where a run would end with one."""
    in_a_row = int(values["skipped_in_a_row"])
    if in_a_row < (trainer.config.guard.limit if step < trainer.steps_total else 1):
        return
    raise UserError(
        f"{folder}: the last {in_a_row} steps up to {step} were skipped: the loss became {values['loss']:.4g}, the "
        f"gradient's norm {values['gradient_norm']:.4g}; lower optimizer.learning_rate, or set precision.compute to "
        "float32"
    )


def _readable(values: dict[str, jax.Array], labels: list[str]) -> dict[str, float]:
    host = jax.device_get(values)
    won = host.pop("won", None)
    readable = {key: float(value) for key, value in host.items()}
    if won is not None:
        readable |= {f"won/{label}": float(share) for label, share in zip(labels, won, strict=True)}
    return readable

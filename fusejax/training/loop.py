"""The stage `train`: each run from its latest checkpoint to its last step."""

import json
import time
from pathlib import Path
from typing import Any

import jax

from fusejax import flops, metrics, sharding, store
from fusejax.batches import Batches
from fusejax.checkpoint import Checkpoints
from fusejax.config import Config, dump
from fusejax.errors import UserError
from fusejax.progress import progress, say
from fusejax.training.meter import Meter
from fusejax.training.runs import forget, read_record, run_folder, run_inputs, runs
from fusejax.training.state import Trainer


def run(config: Config) -> None:
    """The stage `train`. Raises UserError where an earlier stage is missing or made from something else."""
    store.write_atomically(config.folder / "config.yaml", dump(config))
    for name in runs(config):
        train(config, name)


def train(config: Config, name: str) -> None:
    """One run, from its latest checkpoint to its last step."""
    folder = run_folder(config, name)
    inputs = run_inputs(config, name)
    record = read_record(folder)
    if not config.checkpoint.resume:
        forget(folder)
        record = None
    if record is not None:
        remedy = "use --no-resume to train anew, or choose another `output`"
        store.check_inputs(folder / "training.json", record["inputs"], inputs, remedy)
        if record["done"]:
            say(f"train {name}: done before, skipped")
            return
    store.write_atomically(folder / "training.json", json.dumps({"inputs": inputs, "done": False}, indent=1))
    with_sources = bool(config.sources) and name == "fused"
    batches = Batches(config, with_sources=with_sources)
    trainer = Trainer.make(config, batches.steps_total, with_sources)
    started = time.monotonic()
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        summary = _loop(trainer, batches, checkpoints, folder, name)
    summary["seconds"] = time.monotonic() - started
    done = {"inputs": inputs, "done": True, "steps": trainer.steps_total, "throughput": summary}
    store.write_atomically(folder / "training.json", json.dumps(done, indent=1))


def _loop(trainer: Trainer, batches: Batches, checkpoints: Checkpoints, folder: Path, name: str) -> dict[str, Any]:
    """Steps until the last one; metrics are read one step late, so that the device never waits for the host."""
    config, total, state = trainer.config, trainer.steps_total, trainer.state
    first = 0
    if checkpoints.latest() is not None:
        first, state = checkpoints.restore(state)
        say(f"train {name}: goes on from step {first} of {total}")
    log = metrics.Metrics(folder, first)
    meter = Meter(flops.training_per_token(trainer.model_config, config.max_length), trainer.mesh.size)
    labels = [source.label for source in config.sources]
    waiting: tuple[int, dict[str, jax.Array]] | None = None

    def flush() -> str:
        if waiting is None:
            return ""
        values = _readable(waiting[1], labels)
        _stop_if_stuck(values, waiting[0], trainer, folder)
        meter.add(values["tokens"])
        log.write(waiting[0], values)
        return f"loss {values['loss']:.4f}"

    try:
        with progress(f"train {name}", total) as bar:
            bar.advance(first)
            for step, batch in batches.iterate(first):
                on_mesh = sharding.put_batch(batch, trainer.mesh)
                state, values = trainer.step(state, trainer.fixed, on_mesh, trainer.tables)
                note = flush()
                waiting = (step + 1, values)
                if (step + 1) % config.checkpoint.every == 0 or step + 1 == total:
                    note = flush()
                    waiting = None
                    checkpoints.save(step + 1, state)
                bar.advance(1, note)
    finally:
        log.close()
    return meter.summary()


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

"""Continual training of the target: L = λ·L_CLM + (1−λ)·L_Fusion (FuseLLM, eq. 5), on optax, resumable.

A job has up to two *runs* that see the same batches: `fused`, and `clm` (λ = 1, no sources), which is what fusion has
to beat. Each run has its own folder with checkpoints and metrics; a run that is done is skipped, a half-done one goes
on.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import flops, fusion, loss, metrics, models, sharding, store, tokenizers
from fusejax import optimizer as optimizers
from fusejax.batches import Batches, token_tables
from fusejax.checkpoint import Checkpoints
from fusejax.config import Config, dump
from fusejax.errors import UserError
from fusejax.progress import progress, say


def runs(config: Config) -> list[str]:
    """The runs of a job. Without sources there is nothing to fuse: CLM is the job itself, and the only run."""
    return ["fused", "clm"] if config.sources and config.evaluation.clm else ["fused"]


def run_folder(config: Config, name: str) -> Path:
    """Where a run's checkpoints, metrics and export are: the output folder itself for `fused`."""
    return config.folder / "clm" if name == "clm" else config.folder


def run(config: Config) -> None:
    """The stage `train`. Raises UserError where an earlier stage is missing or made from something else."""
    store.write_atomically(config.folder / "config.yaml", dump(config))
    for name in runs(config):
        train(config, name)


def run_inputs(config: Config, name: str) -> dict[str, Any]:
    """What determines a run's result, flat: two runs with equal inputs give equal weights."""
    documents = store.Store(config.folder / "data/train/documents")
    inputs: dict[str, Any] = {
        "target": models.fingerprint(config.target.model, config.target.revision),
        "tokenizer": tokenizers.for_model(config.target).fingerprint,
        "corpus": store.fingerprint(documents.inputs),
        "seed": config.seed,
        "max_length": config.max_length,
        "compute": config.precision.compute,
    }
    sections = ["optimizer", "batch"]
    if name == "fused" and config.sources:
        sections += ["loss", "fusion", "alignment"]
        for source in config.sources:
            made_from = store.Store(config.folder / "sources" / source.label).inputs
            inputs[f"source {source.label}"] = store.fingerprint(made_from)
    for section in sections:
        for key, value in getattr(config, section).model_dump(mode="json").items():
            inputs[f"{section}.{key}"] = value
    return inputs


def train(config: Config, name: str) -> None:
    """One run, from its latest checkpoint to its last step."""
    folder = run_folder(config, name)
    inputs = run_inputs(config, name)
    record = _read_record(folder)
    if not config.checkpoint.resume:
        _forget(folder)
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


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / "training.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: is damaged; use --no-resume to train anew") from None


def _forget(folder: Path) -> None:
    """Remove what an earlier run of training left; its inputs and results go together."""
    for name in ("training.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


@dataclass(frozen=True)
class Trainer:
    """The jitted step of one run, and what it needs."""

    config: Config
    mesh: jax.sharding.Mesh
    state: dict[str, Any]  # params, optimizer, step: arrays laid out over the mesh
    step: Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]
    tables: list[fusion.TokenTable]
    graphdef: Any
    model_config: models.DecoderConfig
    steps_total: int

    @classmethod
    def make(cls, config: Config, steps_total: int, with_sources: bool) -> "Trainer":
        """Load the target onto the mesh, lay out the optimizer's state beside it, compile nothing yet."""
        mesh = sharding.make_mesh(config.mesh)
        model = models.load(
            config.target.model,
            mesh=mesh,
            revision=config.target.revision,
            compute_dtype=jnp.dtype(config.precision.compute),
            remat=config.remat,
        )
        graphdef, variables = nnx.split(model)
        params = nnx.to_pure_dict(variables)
        optimizer, schedule = optimizers.make(config.optimizer, steps_total)
        state = init_state(params, optimizer, mesh)
        tables = token_tables(config) if with_sources else []
        tables = jax.device_put(tables, sharding.replicated(mesh))
        step = make_step(config, graphdef, optimizer, schedule, steps_total, sharding.like(state), mesh)
        return cls(config, mesh, state, step, tables, graphdef, model.config, steps_total)


def init_state(params: Any, optimizer: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Training state; every moment of the optimizer is laid out as its parameter, scalars are replicated."""
    abstract = jax.eval_shape(optimizer.init, params)
    by_path = {jax.tree_util.keystr(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def layout(path: Any, leaf: Any) -> jax.sharding.Sharding:
        # A moment's path in the state ends with its parameter's path.
        key = jax.tree_util.keystr(path)
        for name, placed in by_path.items():
            if key.endswith(name) and leaf.ndim:
                return placed
        return sharding.replicated(mesh)

    layouts = jax.tree_util.tree_map_with_path(layout, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=layouts)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return {"params": params, "optimizer": opt_state, "step": step}


def make_step(
    config: Config, graphdef: Any, optimizer: Any, schedule: Any, steps_total: int, layouts: Any, mesh: Any
) -> Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]:
    """(state, batch, token tables) → (state, metrics), jitted with the state's shardings and its buffers donated.

    batch: [B, L, ...] arrays of `batches.Batches`. metrics: float32 scalars, and `won` float32[S].
    """

    def step(state: dict[str, Any], batch: dict[str, jax.Array], tables: list[fusion.TokenTable]) -> Any:
        start = config.loss.weight_clm if tables else 1.0
        weight_clm = loss.clm_weight(state["step"], steps_total, start, config.loss.schedule)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            return batch_loss(config, nnx.merge(graphdef, params), batch, tables, weight_clm)

        (_, values), gradients = jax.value_and_grad(objective, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state["params"], updates)
        values["gradient_norm"] = optimizers.global_norm(gradients)
        values["learning_rate"] = schedule(state["step"])
        values["weight_clm"] = weight_clm
        return {"params": params, "optimizer": opt_state, "step": state["step"] + 1}, values

    split = sharding.batch_sharding(mesh)
    whole = sharding.replicated(mesh)
    return jax.jit(step, in_shardings=(layouts, split, whole), out_shardings=(layouts, whole), donate_argnums=0)


def batch_loss(
    config: Config, model: Any, batch: dict[str, jax.Array], tables: list[fusion.TokenTable], weight_clm: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over the batch's labelled tokens, and the metrics of the same pass."""
    hidden_BLD = model.hidden(batch["ids"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    labels_BL = batch["labels"]
    values: dict[str, jax.Array] = {}
    shards = config.mesh.data * config.mesh.fsdp
    if not tables:
        sums = loss.clm_loss(hidden_BLD, model.unembedding(), labels_BL, batch_shards=shards)
    else:
        fused = fuse_batch(config, batch, tables, model.config.vocab_size)
        rows = fusion.fusion_sums(fused, labels_BL >= 0)
        n_rows = jnp.maximum(rows.count, 1.0)
        values |= {"won": rows.won / n_rows, "fallback": rows.fallback / n_rows, "mass_kept": rows.mass / n_rows}
        sums = loss.fusion_loss(
            hidden_BLD,
            model.unembedding(),
            labels_BL,
            fused.ids,
            fused.probs,
            weight_clm=weight_clm,
            kind=config.loss.kind,
            temperature=config.loss.temperature,
            tail=config.loss.tail,
            batch_shards=shards,
        )
    count = jnp.maximum(sums.count, 1.0)
    values |= {"loss": sums.total / count, "clm_loss": sums.clm / count, "tokens": sums.count}
    if tables:
        values |= {"fusion_loss": sums.fusion / count, "target_entropy": sums.target_entropy / count}
    return sums.total / count, values


def fuse_batch(
    config: Config, batch: dict[str, jax.Array], tables: list[fusion.TokenTable], vocab_size: int
) -> fusion.FusedRows:
    """The fused target distributions of a batch, as `alignment`, `fusion` and `loss` of the configuration say."""
    by_aligned_ce = config.fusion.ce_unit == "aligned"
    return fusion.fuse_sources(
        tables,
        batch["source_ids"],
        batch["source_logprobs"],
        batch["source_valid"],
        batch["labels"],
        source_ce=None if by_aligned_ce else batch["source_ce"],
        source_consumed=batch.get("source_consumed"),
        source_labels=batch.get("source_labels"),
        gold_logprobs=batch.get("gold_logprobs"),
        segment_ids=batch["segment_ids"],
        vocab_size=vocab_size,
        level=config.fusion.level,
        window=config.fusion.window,
        collisions=config.alignment.collisions,
        tail=config.loss.tail,
        kind=config.fusion.kind,
        temperature=config.fusion.temperature,
        weights=config.fusion.weights,
        fallback=config.alignment.fallback,
    )


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
        if not np.isfinite(values["loss"]):
            raise UserError(
                f"{folder}: the loss became {values['loss']} at step {waiting[0]}; lower optimizer.learning_rate, or "
                "set precision.compute to float32"
            )
        meter.add(values["tokens"])
        log.write(waiting[0], values)
        return f"loss {values['loss']:.4f}"

    try:
        with progress(f"train {name}", total) as bar:
            bar.advance(first)
            for step, batch in batches.iterate(first):
                on_mesh = sharding.put_batch(batch, trainer.mesh)
                state, values = trainer.step(state, on_mesh, trainer.tables)
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


def _readable(values: dict[str, jax.Array], labels: list[str]) -> dict[str, float]:
    host = jax.device_get(values)
    won = host.pop("won", None)
    readable = {key: float(value) for key, value in host.items()}
    if won is not None:
        readable |= {f"won/{label}": float(share) for label, share in zip(labels, won, strict=True)}
    return readable


class Meter:
    """Throughput, from the second step on: the first one compiles."""

    def __init__(self, flops_per_token: float, devices: int) -> None:
        self._flops, self._devices = flops_per_token, devices
        self._start: float | None = None
        self._tokens, self._steps = 0.0, 0

    def add(self, tokens: float) -> None:
        if self._start is None:
            self._start = time.monotonic()
            return
        self._tokens += tokens
        self._steps += 1

    def summary(self) -> dict[str, Any]:
        if not self._steps or not self._start:  # nothing but a step that compiled, or a run that was done already
            return {"tokens_per_s": None}
        seconds = time.monotonic() - self._start
        rate = self._tokens / seconds
        kind = jax.devices()[0].device_kind
        peak = flops.peak(kind)
        return {
            "tokens_per_s": rate,
            "tokens_per_s_per_device": rate / self._devices,
            "devices": self._devices,
            "device": kind,
            "flops_per_token": self._flops,
            "model_flops_per_s": rate * self._flops,
            "peak_flops_per_device": peak,
            "mfu": rate * self._flops / (peak * self._devices) if peak else None,
            "mfu_formula": flops.MFU_FORMULA,
        }


def export(config: Config) -> None:
    """The stage `export`: each run's last checkpoint as a Hugging Face folder, for transformers and the next fusion."""
    from fusejax import export as hf

    for name in runs(config):
        folder = run_folder(config, name)
        record = _read_record(folder)
        if record is None or not record["done"]:
            raise UserError(f"{folder}: run {name!r} is not trained to its end; run `fusejax train` first")
        wanted = {"training": store.fingerprint(record["inputs"]), "dtype": config.precision.export}
        marker = folder / "export" / "fusejax.json"
        if marker.exists() and json.loads(marker.read_text("utf-8")) == wanted:
            say(f"export {name}: done before, skipped")
            continue
        trainer = Trainer.make(config, record["steps"], with_sources=False)
        with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
            _, state = checkpoints.restore(trainer.state)
        source = models.local_folder(config.target.model, config.target.revision)
        hf_config, _ = models.read_config(source)
        own = str(hf_config.get("dtype") or hf_config.get("torch_dtype"))
        dtype = config.precision.export
        if dtype == "auto":  # float16 has too short a range for what bfloat16 or float32 training leaves
            dtype = "bfloat16" if own in ("bfloat16", "float16") else "float32"
        model = nnx.merge(trainer.graphdef, state["params"])
        hf.save(model, hf_config, folder / "export", tokenizer_from=source, dtype=dtype)
        store.write_atomically(marker, json.dumps(wanted))
        say(f"export {name}: {folder / 'export'}")

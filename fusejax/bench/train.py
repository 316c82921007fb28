"""`fusejax bench train CONFIG`: tokens a second of the training step, fused and CLM alone, and of torch beside them.

All steps see the same batch and include the optimizer: the job's first one, or with `--synthetic` one drawn at random,
for which no stage need be done. `fused` and `clm` are the programs that training runs; `torch clm` is transformers'
class of the same model with AdamW: plain continual training, its documents packed without a mask between them, as is
usual there. Tokens are positions, B x L a step, for all alike.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusejax import aot, distributed, flops, fusion, models, sharding, training
from fusejax.alignment import MAX_CONSUMED
from fusejax.batches import Arrays, Batches, token_tables
from fusejax.bench import core, random_models
from fusejax.config import Config
from fusejax.errors import UserError

_TEXT = ("ids", "segment_ids", "positions", "labels")
Tables = list[fusion.TokenTable]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A job whose stages up to `align` are done, and what to measure on it."""
    from fusejax.cli import add_config

    add_config(parser)
    parser.add_argument(
        "--against",
        choices=("torch", "torch-bfloat16"),
        help="also time transformers' step of the same model: weights in float32, and autocast where precision.compute "
        "is bfloat16; or the weights in bfloat16 too",
    )
    random_models.add_argument(parser, "the target's")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="a batch drawn at random, a document of full length in each sequence: no stage need be done",
    )

    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process' CPU seconds instead of the clock's: on a CPU that others use, too, and on one core",
    )


def run(options: argparse.Namespace) -> list[core.Case]:
    """Throughput, ratios, FLOP/s, MFU, memory and compile time."""
    from fusejax import config

    job = config.load(options.config, options.overrides)
    job = training.run_config(job, training.runs(job)[0])
    distributed.keep_programs(job)
    if options.cpu_time and jax.default_backend() != "cpu":
        raise UserError("--cpu-time: the work is not done by a CPU here")
    if options.against:
        core.torch_device()  # or a line that says why not
    with tempfile.TemporaryDirectory() as folder:
        if options.random:
            tokenizer = None if options.synthetic else models.local_folder(job.target.model, job.target.revision)
            model = random_models.write(options.random, Path(folder), job.seed, tokenizer, job.max_length)
            target = job.target.model_copy(update={"model": str(model), "revision": None})
            job = job.model_copy(update={"target": target})
        return _measure(job, options)


def _measure(job: Config, options: argparse.Namespace) -> list[core.Case]:
    batch, tables, steps_total = _synthetic(job) if options.synthetic else _first(job)
    tokens = batch["ids"].size
    trainer = training.Trainer.make(job, steps_total, with_sources=False)
    ours = _Ours(trainer)
    if tables:
        ours.add("fused", batch, tables)
    ours.add("clm", {name: batch[name] for name in _TEXT}, [])
    steps = dict(ours.steps)
    if options.against:
        steps["torch clm"], torch_peak = torch_step(job, batch, weights=options.against.partition("-")[2] or "float32")
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = core.measure(steps, options.repeats, warmup=2, title="train", clock=clock)
    per_token = flops.training_per_token(trainer.model_config, job.max_length)
    about = {
        "parameters": models.count_parameters(trainer.model_config), "tokens": tokens, "devices": trainer.mesh.size,
        "flops_per_token": per_token, "compute": job.precision.compute, "attention": job.attention,
        "seconds_of": "process" if options.cpu_time else "clock",
    }  # fmt: skip
    others = {"fused": ["torch clm", "clm"], "clm": ["torch clm"]}
    cases = [replace(case, more=about) for case in core.cases(seconds, others, unit="tokens/s", amounts=tokens)]
    for case in cases[: len(seconds)]:
        theirs = case.name not in ours.steps
        cases += core.throughput(case, per_token, 1 if theirs else trainer.mesh.size)
        if not theirs:
            cases.append(core.Case(f"{case.name}: compile", ours.compile_s[case.name], "s"))
        memory = torch_peak() if theirs else ours.memory.get(case.name)
        if memory is not None:
            cases.append(core.Case(f"{case.name}: memory per device", memory, "bytes"))
    return cases


def _first(job: Config) -> tuple[Arrays, Tables, int]:
    """(the job's first batch, its sources' token tables, how many steps it has)."""
    batches = Batches(job, with_sources=bool(job.sources))
    return batches.batch(0), token_tables(job) if job.sources else [], batches.steps_total


def _synthetic(job: Config) -> tuple[Arrays, Tables, int]:
    """The same of a job of this size, drawn at random; every source's vocabulary has the target's size."""
    _, model = models.read_config(job.target.model, job.target.revision)
    size, random = model.vocab_size, np.random.default_rng(0)
    shapes = aot.abstract_batch(job, len(job.sources), sharding.job_mesh(job, model))
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    for name in ("ids", "source_ids", "source_labels"):
        if name in batch:
            batch[name] = random.integers(0, size, batch[name].shape, np.int32)
    batch["segment_ids"][:] = 1
    batch["positions"][:] = np.arange(job.max_length)
    batch["labels"] = np.pad(batch["ids"][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    if job.sources:
        batch["source_logprobs"][:] = -1 - np.arange(job.cache.top_k) * np.log(2)
        batch["source_valid"][:] = True
        batch["source_ce"][:] = random.random(batch["source_ce"].shape)
    if "label_bytes" in batch:
        batch["label_bytes"][:, :-1] = 4
    if "gold_logprobs" in batch:
        batch["gold_logprobs"][:] = -1
    columns = MAX_CONSUMED + 1 if job.alignment.rows == "inside" else 1
    ids_VC = random.integers(0, size, (size, columns), np.int32)
    tables = [fusion.TokenTable(ids_VC, np.zeros_like(ids_VC, np.uint32)) for _ in job.sources]  # type: ignore[arg-type]
    return batch, tables, job.batch.steps or 1000


class _Ours:
    """The programs of training, on one state that they hand on: a step costs the same wherever it starts."""

    def __init__(self, trainer: training.Trainer) -> None:
        self._trainer, self._state = trainer, trainer.state
        self.steps: dict[str, Callable[[], Any]] = {}
        self.compile_s: dict[str, float] = {}
        self.memory: dict[str, int] = {}  # bytes per device, arguments and temporaries

    def add(self, name: str, batch: Arrays, tables: Tables) -> None:
        """Compile the step on this batch."""
        trainer = self._trainer
        on_mesh = sharding.put_batch(batch, trainer.mesh)
        tables = jax.tree.map(lambda table: sharding.put_parameter(np.asarray(table), trainer.mesh, ()), tables)
        began = time.perf_counter()
        compiled = trainer.step.lower(self._state, trainer.fixed, on_mesh, tables).compile()  # type: ignore[attr-defined]
        self.compile_s[name] = time.perf_counter() - began
        analysis = compiled.memory_analysis()
        if analysis is not None:
            self.memory[name] = int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes)

        def step() -> Any:
            self._state, _ = compiled(self._state, trainer.fixed, on_mesh, tables)
            return self._state

        self.steps[name] = step


def torch_step(
    job: Config, batch: Arrays, weights: str = "float32"
) -> tuple[Callable[[], Any], Callable[[], int | None]]:
    """(a step, its peak of device memory in bytes) of transformers' causal model on the same batch and kind of device.

    The step: loss, gradients, clipping, AdamW with the job's values. weights: the dtype of weights and moments; under
    `precision.compute: bfloat16` float32 weights are computed with in bfloat16 by torch.autocast.
    """
    import torch

    model, device = core.torch_model(models.local_folder(job.target.model, job.target.revision), weights)
    model.train()
    o = job.optimizer
    adamw = torch.optim.AdamW(
        model.parameters(), o.learning_rate, (o.beta1, o.beta2), o.epsilon, o.weight_decay, fused=True
    )
    ids = torch.tensor(batch["ids"], dtype=torch.long, device=device)
    labels = torch.tensor(np.where(batch["segment_ids"] > 0, batch["ids"], -100), dtype=torch.long, device=device)
    autocast = job.precision.compute == "bfloat16" and weights == "float32"

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        adamw.step()
        return float(loss.detach())  # waits for all that the device has queued, the update too

    return step, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None

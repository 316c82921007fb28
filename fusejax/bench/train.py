"""`fusejax bench train CONFIG`: tokens a second of the training step, fused and CLM alone, and of torch beside them.

All steps see the same batch (the job's first) and include the optimizer. `fused` and `clm` are the programs that
training runs; `torch clm` is transformers' class of the same model with AdamW: plain continual training, its
documents packed without a mask between them, as is usual there. Tokens are positions, B x L a step, for all alike.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusejax import export, flops, models, sharding, training
from fusejax.batches import Batches
from fusejax.bench import core
from fusejax.config import Config
from fusejax.errors import UserError
from fusejax.parallel import usable_cpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A job whose stages up to `align` are done, and what to measure on it."""
    from fusejax.cli import add_config

    add_config(parser)
    parser.add_argument("--against", choices=("torch",), help="also time transformers' step of the same model")
    parser.add_argument(
        "--random",
        metavar="WIDTHxLAYERSxVOCAB",
        help="a Llama with random weights of this shape in the target's place, for example 320x8x32000",
    )


def run(options: argparse.Namespace) -> list[core.Case]:
    """Throughput, ratios, FLOP/s, MFU, memory and compile time."""
    from fusejax import config

    job = config.load(options.config, options.overrides)
    job = training.run_config(job, training.runs(job)[0])
    if options.against and (not importlib.util.find_spec("torch") or jax.default_backend() == "tpu"):
        raise UserError("--against torch: torch is not installed here, or cannot use this device")
    with tempfile.TemporaryDirectory() as folder:
        if options.random:
            job = _with_random_target(job, options.random, Path(folder))
        return _measure(job, options)


def _with_random_target(job: Config, shape: str, folder: Path) -> Config:
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--random {shape}: should be WIDTHxLAYERSxVOCAB, for example 320x8x32000")
    width, layers, vocab = map(int, parts)
    if width % 64:
        raise UserError(f"--random {shape}: the width should be a multiple of 64, a head's features")
    target = models.local_folder(job.target.model, job.target.revision)
    least = models.read_config(target)[1].vocab_size
    if vocab < least:
        raise UserError(f"--random {shape}: the target's tokenizer needs a vocabulary of at least {least}")
    heads = width // 64
    made = models.DecoderConfig(
        vocab_size=vocab, d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=64,
        d_mlp=-(-width * 8 // 3 // 32) * 32, max_length=job.max_length, rotary_dim=64, tied=True,
    )  # fmt: skip
    export.save(models.init(made, job.seed), models.hf_config(made, "llama"), folder / "llama", tokenizer_from=target)
    replaced = job.target.model_copy(update={"model": str(folder / "llama"), "revision": None})
    return job.model_copy(update={"target": replaced})


def _measure(job: Config, options: argparse.Namespace) -> list[core.Case]:
    batches = Batches(job, with_sources=bool(job.sources))
    batch = batches.batch(0)
    tokens = batch["ids"].size
    compile_s: dict[str, float] = {}
    memory: dict[str, int | None] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name in ["fused", "clm"] if job.sources else ["clm"]:
        trainer = training.Trainer.make(job, batches.steps_total, with_sources=name == "fused")
        steps[name], compile_s[name], memory[name] = _step(trainer, batch)
    model_config = trainer.model_config
    if options.against == "torch":
        steps["torch clm"] = torch_step(job, batch)
    seconds = core.measure(steps, options.repeats, warmup=2, title="train")
    others = {"fused": ["torch clm", "clm"], "clm": ["torch clm"]}
    cases = core.cases(seconds, others, unit="tokens/s", amounts=tokens)
    per_token = flops.training_per_token(model_config, job.max_length)
    about = {
        "parameters": models.count_parameters(model_config), "tokens": tokens, "devices": trainer.mesh.size,
        "flops_per_token": per_token, "compute": job.precision.compute,
    }  # fmt: skip
    cases = [replace(case, more=about) for case in cases]
    for case in cases[: len(compile_s)]:
        cases += _derived(case, per_token, trainer.mesh.size, compile_s[case.name], memory[case.name])
    return cases


def _derived(case: core.Case, per_token: float, devices: int, compile_s: float, memory: int | None) -> list[core.Case]:
    """What follows from a rate: per device, FLOP/s, share of the peak; and the program's own costs."""
    kind = jax.devices()[0].device_kind
    peak = flops.peak(kind)
    found = [
        core.Case(f"{case.name}: per device", case.value / devices, "tokens/s"),
        core.Case(f"{case.name}: model", case.value * per_token / 1e9, "GFLOP/s"),
        core.Case(f"{case.name}: compile", compile_s, "s"),
    ]
    if peak is not None:
        mfu = case.value * per_token / (devices * peak)
        formula = {"formula": flops.MFU_FORMULA, "peak_flops_per_device": peak, "device": kind}
        found.insert(2, core.Case(f"{case.name}: MFU of {peak / 1e12:.0f} TFLOP/s", mfu, "", more=formula))
    if memory is not None:
        found.append(core.Case(f"{case.name}: memory per device", memory, "bytes"))
    return found


def _step(trainer: training.Trainer, batch: dict[str, np.ndarray]) -> tuple[Callable[[], Any], float, int | None]:
    """(one step on this batch, seconds of compiling it, bytes per device: arguments and temporaries)."""
    text = ("ids", "segment_ids", "positions", "labels")
    on_mesh = sharding.put_batch(batch if trainer.tables else {name: batch[name] for name in text}, trainer.mesh)
    began = time.perf_counter()
    compiled = trainer.step.lower(trainer.state, trainer.fixed, on_mesh, trainer.tables).compile()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    memory = None if analysis is None else int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes)
    state = trainer.state

    def step() -> Any:
        nonlocal state
        state, values = compiled(state, trainer.fixed, on_mesh, trainer.tables)
        return values["loss"]

    return step, seconds, memory


def torch_step(job: Config, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """transformers' causal model on the same batch: loss, gradients, clipping, AdamW with the job's values."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(usable_cpus())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = models.local_folder(job.target.model, job.target.revision)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).train()
    o = job.optimizer
    adamw = torch.optim.AdamW(
        model.parameters(), o.learning_rate, (o.beta1, o.beta2), o.epsilon, o.weight_decay, fused=True
    )
    ids = torch.tensor(batch["ids"], dtype=torch.long, device=device)
    labels = torch.tensor(np.where(batch["segment_ids"] > 0, batch["ids"], -100), dtype=torch.long, device=device)
    bfloat16 = job.precision.compute == "bfloat16"

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        adamw.step()
        return float(loss.detach())  # waits for the device

    return step

"""Measuring: warm-up, interleaved rounds, medians and their spread, ratios, memory, and what the machine is."""

import importlib.util
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import fusejax
from fusejax import flops
from fusejax.errors import UserError
from fusejax.parallel import usable_cpus
from fusejax.progress import console, progress, say


@dataclass(frozen=True)
class Case:
    """One measured number.

    value: the median, in `unit`. spread: the quartiles of the rounds. ratios: {other case: value / its value}; the
    first is the one that the JSON calls `ratio_to` and `ratio`. more: further keys of the JSON object.
    """

    name: str
    value: float
    unit: str
    ratios: Mapping[str, float] = field(default_factory=dict)
    spread: tuple[float, float] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        ratio_to, ratio = next(iter(self.ratios.items()), (None, None))
        values = {"name": self.name, "value": self.value, "unit": self.unit, "ratio_to": ratio_to, "ratio": ratio}
        if len(self.ratios) > 1:
            values["ratios"] = dict(self.ratios)
        if self.spread is not None:
            values["spread"] = list(self.spread)
        return values | dict(self.more)


def measure(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    title: str = "bench",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call by `clock`, {name: [repeats]}. Arrays that a call returns are waited for.

    The first `warmup` rounds compile and do not count. In every round each function runs once, so that a machine
    that slows down meanwhile slows down all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with progress(title, (warmup + repeats) * len(functions)) as bar:
        for i in range(warmup + repeats):
            for name, function in functions.items():
                start = clock()
                jax.block_until_ready(function())
                if i >= warmup:
                    seconds[name].append(clock() - start)
                bar.advance(1, name)
    return seconds


def cases(
    seconds: Mapping[str, Sequence[float]],
    ratios: Mapping[str, Sequence[str]] | None = None,
    *,
    unit: str = "s",
    amounts: Mapping[str, float] | float | None = None,
) -> list[Case]:
    """Medians, quartiles and ratios of what `measure` returned.

    ratios: {case: the others it is divided by}, the quotients of the medians. amounts: how much one call works off
    (tokens, bytes), of all cases or by name; the values are then amounts per second, and `unit` should say so.
    """

    def values(name: str) -> list[float]:
        if amounts is None:
            return list(seconds[name])
        amount = amounts[name] if isinstance(amounts, Mapping) else amounts
        return [amount / s for s in seconds[name]]

    medians = {name: statistics.median(values(name)) for name in seconds}
    return [
        Case(
            name,
            medians[name],
            unit,
            {other: medians[name] / medians[other] for other in (ratios or {}).get(name, ()) if other in medians},
            _quartiles(values(name)),
        )
        for name in seconds
    ]


def throughput(case: Case, flops_per_token: float, devices: int) -> list[Case]:
    """What follows from a rate in tokens a second: the rate of a device, FLOP/s, and their share of the chips' peak."""
    kind = jax.devices()[0].device_kind
    peak = flops.peak(kind)
    found = [
        Case(f"{case.name}: per device", case.value / devices, "tokens/s"),
        Case(f"{case.name}: model", case.value * flops_per_token / 1e9, "GFLOP/s"),
    ]
    if peak is not None:
        mfu = case.value * flops_per_token / (devices * peak)
        formula = {"formula": flops.MFU_FORMULA, "peak_flops_per_device": peak, "device": kind}
        found.append(Case(f"{case.name}: MFU of {peak / 1e12:.0f} TFLOP/s", mfu, "", more=formula))
    return found


def torch_device() -> str:
    """Where torch runs beside JAX: `cuda` or `cpu`, with as many threads as XLA has.

    Raises UserError where torch is not installed, or cannot use the kind of device that JAX uses.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed here")
    import torch

    torch.set_num_threads(usable_cpus())
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend != "gpu" or not torch.cuda.is_available():
        raise UserError(f"torch cannot use the device that JAX uses here ({backend})")
    return "cuda"


def torch_model(folder: str | Path, dtype: str) -> tuple[Any, str]:
    """(transformers' causal model of a folder, with weights in `dtype`, on `torch_device()`; that device)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch_device()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device), device


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def largest_buffer(compiled: Any, without: Collection[tuple[int, ...]] = ()) -> int:
    """Elements of the largest array in a compiled function's module (`jitted.lower(...).compile()`), arguments too.

    without: shapes that do not count, dimensions of 1 left out.
    """
    found = re.findall(r"\b(?:pred|[subf]+\d+\w*)\[([\d,]+)\]", compiled.as_text())
    shapes = {tuple(int(size) for size in shape.split(",") if size != "1") for shape in found}
    return max((math.prod(shape) for shape in shapes if shape not in without), default=1)


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes that a compiled function holds at its peak beside its arguments and results, by the compiler's plan."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def device_peak_bytes() -> int | None:
    """The most memory that was in use on the first device since the process began; None where it keeps no count."""
    counts = jax.local_devices()[0].memory_stats()
    return counts.get("peak_bytes_in_use") if counts else None


def resident_bytes(reset_peak: bool = False) -> int | None:
    """Memory of this process now, of which a new peak is counted from here on; None where the system does not say."""
    if reset_peak:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
    return _process_status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most memory of this process since `resident_bytes(reset_peak=True)`."""
    return _process_status("VmHWM")


def _process_status(key: str) -> int | None:
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    return None


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, versions and devices, for the JSON's `machine`."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": usable_cpus(),  # XLA's CPU backend starts as many
        "memory_bytes": _memory_bytes(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "fusejax": fusejax.__version__,
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def show(what: str, cases: Sequence[Case], machine: Mapping[str, Any]) -> None:
    """The table for the terminal."""
    table = Table("case", "median", "quartiles", "ratio", title=f"bench {what}")
    for column in table.columns[1:3]:
        column.justify = "right"
    for case in cases:
        spread = "" if case.spread is None else " to ".join(readable(value, case.unit) for value in case.spread)
        ratios = "\n".join(f"{ratio:.3g} x {other}" for other, ratio in case.ratios.items())
        table.add_row(case.name, readable(case.value, case.unit), spread, ratios)
    console.print(table)
    load = machine["load_average"]
    load = "" if load is None else f"; load average {load:.1f}"
    say(
        f"{machine['cpu']}, {machine['threads']} threads; {machine['devices']} x {machine['device']} "
        f"({machine['platform']}); jax {machine['jax']}{load}"
    )


def readable(value: float, unit: str) -> str:
    """`value` with a prefix that suits its size: 12.3 ms, 4.56 GB, 7,890 tokens/s."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
    if unit == "bytes":
        for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= size:
                return f"{value / size:.3g} {name}"
    return (f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}").rstrip()

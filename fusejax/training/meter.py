"""Throughput of a run, and its share of the chips' peak."""

import time
from typing import Any

import jax

from fusejax import flops


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

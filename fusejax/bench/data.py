"""`fusejax bench data CONFIG`: milliseconds that the host takes to make one packed sequence, on one core.

The job's stages up to `align` must be done. `sequence` is the whole of it, with all sources' rows; `text` is that
without sources. Other sequences are made in each round, so that nothing but the operating system's file cache helps.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

from fusejax.batches import Batches
from fusejax.bench import core


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A job."""
    from fusejax.cli import add_config

    add_config(parser)


def run(options: argparse.Namespace) -> list[core.Case]:
    """Seconds of a sequence, and what they depend on."""
    from fusejax import config

    job = config.load(options.config, options.overrides)
    functions: dict[str, Callable[[], Any]] = {}
    for name, with_sources in (("sequence", True), ("text", False)):
        if with_sources and not job.sources:
            continue
        batches = Batches(job, with_sources=with_sources)
        places = itertools.cycle(
            (step, row) for step in range(batches.steps_total) for row in range(job.batch.sequences)
            if len(batches.documents(step)[row])
        )  # fmt: skip
        functions[name] = _maker(batches, places)
    seconds = core.measure(functions, options.repeats, warmup=3, title="data")
    about = {"tokens": job.max_length, "sources": len(job.sources), "top_k": job.cache.top_k}
    found = core.cases(seconds, {"sequence": ["text"]})
    return [core.Case(c.name, c.value, c.unit, c.ratios, c.spread, about) for c in found]


def _maker(batches: Batches, places: Any) -> Callable[[], Any]:
    def make() -> Any:
        step, row = next(places)
        return batches.batch(step, [row])["ids"]

    return make

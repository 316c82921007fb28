"""`fusejax bench WHAT`: what each part costs on this machine, as a table and as JSON.

A bench is a module of this package, named in `BENCHES`, with two functions:

    add_arguments(parser)           its own options; CONFIG.yaml and overrides too where it works on a job
    run(options) -> list[Case]      measured with `core.measure`, which interleaves what is compared

`options.repeats` and `options.json` are common to all. Modules are imported when they are chosen, so that `--help`
stays instant.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# WHAT → (module, one line of help).
BENCHES = {
    "align": (
        "fusejax.bench.align",
        "row maps and token maps of tokenizers, against a plain restatement of the reference",
    ),
    "load": ("fusejax.bench.load", "loading a checkpoint: time, and host memory beyond what stays"),
    "loss": ("fusejax.bench.loss", "the fused loss, forward and backward, against plain and dense cross-entropies"),
    "sources": ("fusejax.bench.sources", "filling a source's cache, against its bare forward pass and torch's"),
    "train": ("fusejax.bench.train", "the training step, fused and CLM alone, and transformers' beside them"),
    "data": ("fusejax.bench.data", "one packed sequence with its sources' rows, on the host"),
}


def add_parser(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare `bench WHAT ...`; only the bench that `arguments` name is imported and adds its own options."""
    benches = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (module, text) in BENCHES.items():
        chosen = benches.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in arguments:
            _load(module).add_arguments(chosen)
        chosen.add_argument("--repeats", type=positive, default=7, metavar="N", help="timed rounds (default 7)")
        chosen.add_argument("--json", metavar="FILE", help="also write {cases, machine} to FILE")


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON. Raises UserError before measuring where FILE cannot be written."""
    from fusejax import outputs
    from fusejax.bench import core

    if options.json:
        outputs.require_writable(options.json)
    cases = _load(BENCHES[options.what][0]).run(options)
    result: dict[str, Any] = {"cases": [case.as_json() for case in cases], "machine": core.machine()}
    core.show(options.what, cases, result["machine"])
    if options.json:
        outputs.write_atomically(options.json, json.dumps(result, indent=1) + "\n", outputs.ANOTHER_PATH)


def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return value

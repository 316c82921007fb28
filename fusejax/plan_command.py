"""The command line of `fusejax plan`."""

import argparse
from dataclasses import dataclass
from typing import Any

from fusejax.config import Config
from fusejax.errors import UserError


@dataclass(frozen=True)
class Options:
    """What the command line says of a machine.

    mfu: share of the peak that the estimate assumes. tries, minutes: bounds of the search for what fits, each stage.
    only: names of stages; (): all. shape: NAME=LIKE, where LIKE is a config.json
    or another model, for models that are not here. json: a file.
    """

    topology: str
    slices: int = 1
    mfu: float = 0.4
    tries: int = 4
    minutes: float = 30.0
    only: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    json: str | None = None


_RANGES = {"slices": (1, 4096), "mfu": (1e-6, 1), "tries": (0, 1000), "minutes": (0, 1e6)}


def add_parser(commands: Any) -> Any:
    """The subparser, without the configuration."""
    help_text = "validate a configuration, print stages, tokens and disk; with --topology also memory, by compiling"
    parser = commands.add_parser("plan", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    group = parser.add_argument_group(
        "a machine that need not be here", "its compilers must be installed: jax[tpu], or jax-cuda13-plugin and -pjrt"
    )
    group.add_argument("--topology", metavar="NAME", help="v4:, v5e:, v5p: or v6e:SHAPE as v5p:2x2x2; h100:[HOSTSx]N")
    group.add_argument("--slices", type=int, metavar="N", help="so many TPU slices of that shape (default 1)")
    group.add_argument("--mfu", type=float, metavar="SHARE", help="of the peak, for the estimate of time (default 0.4)")
    group.add_argument("--tries", type=int, metavar="N", help="most compilations in search of what fits (default 4)")
    group.add_argument("--minutes", type=float, metavar="M", help="no new one after so long, each stage (default 30)")
    group.add_argument("--only", action="append", metavar="STAGE", help="`train` or a source's name; may be repeated")
    group.add_argument(
        "--shape",
        action="append",
        metavar="NAME=LIKE",
        help="for a model that is not here: a config.json, or a model like it",
    )
    group.add_argument("--json", metavar="FILE", help="write all numbers there")
    return parser


def run(options: argparse.Namespace, job: Config) -> None:
    """Print the plan of a job, on this machine or on another."""
    names = [name for name in Options.__dataclass_fields__ if name != "topology"]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.topology is None:
        from fusejax import plan

        if given:
            raise UserError(f"plan without --topology: has no use for {', '.join('--' + name for name in given)}")
        plan.show(job)
        return
    from fusejax import machine_plan, outputs

    for name, (low, high) in _RANGES.items():
        if not low <= given.get(name, low) <= high:
            raise UserError(f"--{name}: {given[name]} should be from {low:g} to {high:g}")
    if options.json is not None:
        outputs.require_writable(options.json)
    lists = {name: tuple(given.get(name, ())) for name in ("only", "shape")}
    machine_plan.show(job, Options(**({"topology": options.topology} | given | lists)))

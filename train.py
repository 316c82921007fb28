#!/usr/bin/env python3
"""The whole job: `python train.py CONFIG.yaml [key=value ...]`.

Runs every stage that is not done yet; run again after an interruption, it goes on where it stopped.
"""

import argparse
from collections.abc import Sequence

from fusejax import cli, config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="train.py", description=__doc__.splitlines()[0])
    cli.add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan, download and write nothing")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from the latest checkpoint (default), or train anew",
    )
    options = parser.parse_args(arguments)
    resume = [] if options.resume is None else [f"checkpoint.resume={str(options.resume).lower()}"]
    job = config.load(options.config, [*options.overrides, *resume])

    if options.dry_run:
        from fusejax import plan

        plan.show(job)
        return

    from fusejax import alignment, corpus, distributed, evaluation, preflight, report, sources, training
    from fusejax.evaluation import baselines

    distributed.start(job)  # with the other processes, where there are several
    preflight.check(job)  # what would fail after hours
    preflight.check_devices(job)
    training.check(job)
    with distributed.locked(job.folder):
        distributed.alone("prepare", lambda: corpus.prepare(job))  # documents, tokens, boundaries
        sources.run(job)  # every source's top-k distributions
        alignment.run(job)  # row maps and token maps
        training.run(job)  # fusion and loss, on packed batches
        training.export(job)  # Hugging Face folders
        baselines.run(job)  # what fusion is compared with
        distributed.alone("evaluate", lambda: evaluation.run(job))  # bits per byte, before and after
        distributed.alone("report", lambda: report.run(job))  # report.json, report.html


if __name__ == "__main__":
    cli.run(main)

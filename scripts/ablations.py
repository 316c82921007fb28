#!/usr/bin/env python3
"""One job under many settings, in one table: what each choice is worth in bits per byte on the held-out text.

    python scripts/ablations.py CONFIG.yaml VARIANTS.yaml [key=value ...] [--jobs N] [--only NAME ...]

VARIANTS.yaml holds `NAME: {key: value, ...}` lines, the dotted keys that a variant changes: `clm: {sources: []}`. The
job's stages `prepare` and `sources` must be done, with a cache.top_k as large as any variant's. Each variant is trained
and measured in memory: it leaves no checkpoint and no export, but OUTPUT/ablations/NAME/result.json, and is skipped
when that is there. Variants share the job's documents and caches, and alignments with one another.

With --jobs N so many processes work at once; on one GPU set XLA_PYTHON_CLIENT_MEM_FRACTION=.9/N in the environment.
--align makes the alignments alone, which needs no accelerator.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusejax import cli, config, metrics, outputs, settings, store
from fusejax.config import Config
from fusejax.errors import Resumable, UserError
from fusejax.progress import say

# Metrics of which a result keeps the mean over all steps, and those of which it keeps every step.
MEANS = ("fallback", "gated", "mass_kept", "target_entropy")
CURVES = ("loss", "clm_loss", "fusion_loss", "tokens")


@dataclass(frozen=True)
class Variant:
    """One setting: its name, what it changes, and the job that it makes."""

    name: str
    changes: dict[str, Any]
    job: Config

    @property
    def result_path(self) -> Path:
        return self.job.folder / "result.json"

    def result(self) -> dict[str, Any] | None:
        needed = {"name": str, "inputs": dict, "bits_per_byte": dict, "points": list}
        return outputs.read_object(self.result_path, needed, "remove it")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    base = config.load(options.config, options.overrides)
    variants = read_variants(options, base.folder)
    if options.table:
        write_table(base.folder, variants, options)
        return
    for variant in variants:
        share(base, variant.job)
    if not options.helper:
        align(variants)
    if options.align:
        return
    failed = []
    with ExitStack() as stack:
        helpers = [stack.enter_context(ended(_helper(arguments))) for _ in range(options.jobs - 1)]
        for variant in variants:
            try:
                run(variant, options.points)
            except UserError as error:  # a learning rate too high for one is no reason to leave the others
                say(f"variant {variant.name}: {error}")
                failed.append(variant.name)
        failed += [f"process {helper.pid}" for helper in helpers if helper.wait()]
    if not options.helper:
        write_table(base.folder, variants, options)
    if failed:
        raise UserError(f"failed, see above: {', '.join(failed)}; the same command tries them again")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="ablations.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("variants", metavar="VARIANTS.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="changes of every variant")
    parser.add_argument("--into", type=Path, help="where results go (default: OUTPUT/ablations)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone, in this order")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once (default 1)")
    parser.add_argument(
        "--points", type=int, default=1, metavar="N", help="times at which a run is measured (default 1)"
    )
    parser.add_argument("--align", action="store_true", help="make the alignments, and nothing else")
    parser.add_argument("--table", action="store_true", help="make the table of what is done, and nothing else")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    parser.add_argument("--json", metavar="FILE", help="write all results there")
    parser.add_argument("--svg", metavar="FILE", help="draw there what --points measured")
    parser.add_argument("--helper", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for path in (options.markdown, options.json, options.svg):
        if path is not None:
            outputs.require_writable(path)
    for name in ("jobs", "points"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: should be at least 1")
    return options


def _helper(arguments: Sequence[str] | None) -> subprocess.Popen:
    given = list(sys.argv[1:] if arguments is None else arguments)
    return subprocess.Popen([sys.executable, __file__, *given, "--jobs", "1", "--helper"])


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block, also where SIGTERM ends it: it would go on with the accelerator."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        process.terminate()  # nothing, where it has ended
        process.wait()


def read_variants(options: argparse.Namespace, folder: Path) -> list[Variant]:
    """The variants of the file that are asked for. UserError where one is unknown, or makes no valid job."""
    found = {str(name): changes for name, changes in settings.read(options.variants).items()}
    unknown = [name for name in options.only or [] if name not in found]
    if unknown:
        names = " ".join(f"'{name}'" for name in found)
        raise UserError(
            f"--only {unknown[0]}: {options.variants} has no such variant; give some of {names}, separated by spaces"
        )
    into = options.into or folder / "ablations"
    variants = []
    for name in options.only or found:
        changes = found[name] if found[name] is not None else {}
        if not isinstance(changes, dict) or "/" in str(name):
            raise UserError(f"{options.variants}: {name}: should be {{key: value, ...}}")
        changed = changes | {"output": str(into / str(name)), "evaluation.clm": False, "evaluation.baselines": []}
        own = [f"{key}={json.dumps(value)}" for key, value in changed.items()]  # JSON is YAML
        try:
            variants.append(Variant(str(name), changes, config.load(options.config, [*options.overrides, *own])))
        except UserError as error:
            raise UserError(f"{options.variants}: {name}: {error}") from None
    return variants


def share(base: Config, job: Config) -> None:
    """Let a variant see the job's documents and caches, and the alignment of all variants that align alike."""
    kept = {"rows": job.alignment.rows, "tokens": job.alignment.tokens, "chain": job.alignment.gold_chain}
    if job.alignment.gold_chain:  # which reads the source's rows
        kept["top_k"] = [source.top_k or job.cache.top_k for source in job.sources]
    same = [getattr(base.alignment, key) for key in ("rows", "tokens", "gold_chain")] == list(kept.values())[:3]
    same &= not job.alignment.gold_chain or base.cache.top_k == job.cache.top_k
    aligned = "alignment" if same else f"ablations/alignments/{outputs.fingerprint(kept)}"
    outputs.make_folder(job.folder)
    for name, to in {"data": "data", "sources": "sources", "alignment": aligned}.items():
        target = outputs.make_folder(base.folder / to)
        link, path = job.folder / name, os.path.relpath(target, job.folder)
        if not link.is_symlink():
            link.symlink_to(path)
        elif os.readlink(link) != path:  # the variant's alignment was another one
            link.unlink()
            link.symlink_to(path)


def align(variants: Sequence[Variant]) -> None:
    """The stage `align` of every variant; most share one."""
    from fusejax import alignment

    for variant in variants:
        if variant.job.sources:
            say(f"variant {variant.name}")
            alignment.run(variant.job)


def run(variant: Variant, points: int) -> None:
    """Train and measure a variant, unless that is done, or another process is at it."""
    from fusejax import distributed, training

    distributed.start(variant.job)
    inputs = training.run_inputs(variant.job, "fused") | {"points": points}
    before = variant.result()
    if before is not None:
        remedy = "remove it, or choose another --into"
        outputs.check_inputs(variant.result_path, before["inputs"], inputs, remedy, settings.defaults(Config))
        say(f"variant {variant.name}: done before, skipped")
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(outputs.locked(variant.job.folder))
        except UserError:  # another process is at it
            return
        if variant.result() is not None:
            return
        result = train(variant.job, points)
        result |= {"name": variant.name, "changes": variant.changes, "inputs": inputs}
        outputs.write_atomically(variant.result_path, json.dumps(result, indent=1))
        say(f"variant {variant.name}: {result['bits_per_byte']['average']:.4f}, {result['seconds']:.0f} s")


class Points:
    """Stands in training where checkpoints do, and measures the model instead of saving it."""

    def __init__(self, measure: Callable[[Any], dict[str, Any]]) -> None:
        self.found: list[dict[str, Any]] = []
        self._measure = measure

    def latest(self) -> None:
        """No step is saved."""

    def save(self, step: int, state: Any, about: Any, loss: float | None = None) -> None:
        self.found.append({"step": step, **self._measure(state)})

    def wait(self) -> None:
        """Nothing is under way."""


def train(job: Config, points: int) -> dict[str, Any]:
    """The held-out bits per byte of the trained model, those on the way, and what the metrics say."""
    from fusejax import alignment
    from fusejax.batches import Batches
    from fusejax.training.loop import Loop
    from fusejax.training.state import Trainer

    started = time.monotonic()
    batches = Batches(job, with_sources=bool(job.sources))
    every = -(-batches.steps_total // points)
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every": every})})
    trainer = Trainer.make(job, batches.steps_total, with_sources=bool(job.sources))
    measured = Points(lambda state: measure(job, trainer.model(state)))
    try:
        throughput = Loop(trainer, batches, measured, job.folder, job.folder.name).run()
    except Resumable as error:  # its line is of what training saves
        raise type(error)(f"variant {job.folder.name}; the same command begins this variant anew") from None
    history = metrics.read(job.folder)
    seen, tokens = 0.0, {}
    for line in history:
        seen += line["tokens"]
        tokens[line["step"]] = seen
    means = {key: sum(line[key] for line in history) / len(history) for key in history[0] if _is_mean(key)}
    return {
        "bits_per_byte": measured.found[-1]["bits_per_byte"],
        "points": [point | {"tokens": tokens[point["step"]]} for point in measured.found],
        "aligned": {s.label: alignment.read_report(job.folder, s.label)["share"] for s in job.sources},
        "means": means,
        "curves": {key: [round(line[key], 5) for line in history] for key in CURVES if key in history[0]},
        "steps": batches.steps_total,
        "throughput": throughput,
        "seconds": time.monotonic() - started,
    }


def _is_mean(key: str) -> bool:
    return key in MEANS or key.startswith("won/")


def measure(job: Config, model: Any) -> dict[str, Any]:
    """Bits per byte of a model on the job's held-out documents."""
    from fusejax import corpus, sharding, tokenizers
    from fusejax.evaluation import bits_per_byte

    tokenizer = tokenizers.for_model(job.target)
    found = bits_per_byte(
        model,
        tokenizer,
        corpus.documents(job, "heldout"),
        store.Store(job.folder / "data/heldout/tokens" / tokenizer.fingerprint),
        max_length=job.max_length,
        batch_tokens=job.evaluation.batch_tokens,
        mesh=sharding.make_mesh(job.mesh),
        name=job.folder.name,
    )
    return {"bits_per_byte": found}


def write_table(folder: Path, variants: Sequence[Variant], options: argparse.Namespace) -> None:
    """Every result there is, on standard output and in the files that are asked for."""
    needed, remedy = {"name": str, "bits_per_byte": dict}, "run the stage `evaluate` again"
    paths = sorted((folder / "evaluation").glob("*.json"))
    before = [found for path in paths if (found := outputs.read_object(path, needed, remedy)) is not None]
    results = [result for variant in variants if (result := variant.result()) is not None]
    lines = table([*before, *results])
    say("\n".join(lines))
    if options.markdown:
        outputs.write_atomically(options.markdown, "\n".join(lines) + "\n")
    if options.json:
        outputs.write_atomically(options.json, json.dumps({"evaluation": before, "variants": results}, indent=1))
    if options.svg:
        from fusejax import plots

        start = [(0, found["bits_per_byte"]["average"]) for found in before if found["name"] == "target"]
        curves = {result["name"]: start + [_point(point) for point in result["points"]] for result in results}
        outputs.write_atomically(options.svg, plots.heldout(curves))


def _point(point: dict[str, Any]) -> tuple[float, float]:
    return point["tokens"], point["bits_per_byte"]["average"]


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown, a row for each result; bits per byte by domain, shares in percent."""
    domains = list(dict.fromkeys(domain for result in results for domain in result["bits_per_byte"]))
    lines = [f"| | {' | '.join(domains)} | fallback | mass kept |", "|---" * (len(domains) + 3) + "|"]
    for result in results:
        cells = [f"{result['bits_per_byte'].get(domain, float('nan')):.4f}" for domain in domains]
        means = result.get("means", {})
        cells += [f"{means[key]:.1%}" if key in means else "" for key in ("fallback", "mass_kept")]
        lines.append(f"| {result['name']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    cli.run(main)

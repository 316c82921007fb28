"""The stage `report`: report.json with every number of a job, report.html with the same and plots, and tables.

Both files are a function of the job's other files: the same results give the same bytes, `throughput` aside.
"""

import html
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

import fusejax
from fusejax import alignment_report, corpus, metrics, outputs, plots
from fusejax.alignment import read_report
from fusejax.config import Config, dump
from fusejax.errors import UserError
from fusejax.metrics import TRAINING
from fusejax.progress import say, show_table, warn
from fusejax.results import Scores
from fusejax.training import check_models, check_settings, read_record, run_folder, runs

_LAST_TENTH = ("loss", "clm_loss", "fusion_loss", "target_entropy", "model_entropy")  # nats a token
_OTHER_SETTINGS = "give `report` the settings of the job, which are in its config.yaml"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def run(config: Config) -> None:
    """Write report.json and report.html into the output folder. Raises UserError where an earlier stage is missing, or
    was run with other settings."""
    check_models(config, _OTHER_SETTINGS)
    for name in runs(config):
        check_settings(config, name, _OTHER_SETTINGS)
    histories = {name: metrics.read(run_folder(config, name), TRAINING) for name in runs(config)}
    report = collect(config, histories)
    page = render(config, report, histories)
    outputs.write_atomically(config.folder / "report.json", json.dumps(report, indent=2) + "\n")
    outputs.write_atomically(config.folder / "report.html", page)
    show(report)
    for name, history in histories.items():
        if history and not (read_record(run_folder(config, name)) or {}).get("done"):
            warn(f"train {name}: is at step {history[-1]['step']} and not finished; the same job's `train` goes on")
    say(f"report: {config.folder / 'report.html'} and report.json")


def collect(config: Config, histories: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every number of the job, as the JSON object of report.json."""
    alignment = {source.label: read_report(config.folder, source.label) for source in config.sources}
    report: dict[str, Any] = {
        "name": config.folder.name,
        "target": config.target.model,
        "sources": {source.label: source.model for source in config.sources},
        "corpus": {
            split: {**(documents := corpus.documents(config, split)).summary, "text": documents.inputs["text"]}
            for split in ("train", "heldout")
            if (config.folder / "data" / split / "documents").exists()
        },
        "alignment": alignment,
        "source_wins": alignment_report.source_wins(alignment),
        "training": {name: _training(history) for name, history in histories.items()},
        "evaluation": {"bits_per_byte": _bits_per_byte(config)},
        "throughput": {name: _throughput(run_folder(config, name)) for name in histories},
        "versions": {"fusejax": fusejax.__version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "config": json.loads(config.model_dump_json()),
    }
    return report


def _training(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Last step, tokens seen, and means over the last tenth of the steps; shares over all of them."""
    if not history:
        return {}
    last = history[-max(1, len(history) // 10) :]

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    result: dict[str, Any] = {
        "steps": history[-1]["step"],
        "tokens": sum(row["tokens"] for row in history),
        "last_tenth": {key: mean(last, key) for key in _LAST_TENTH if key in last[0]},
    }
    won = [key for key in history[0] if key.startswith("won/")]
    if won:
        result["rows_won"] = {key.removeprefix("won/"): mean(history, key) for key in won}
        result["rows_fallback"] = mean(history, "fallback")
        result |= {"rows_gated": mean(history, "gated")} if "gated" in history[0] else {}
        result["mass_kept"] = mean(history, "mass_kept")
    return result


def _bits_per_byte(config: Config) -> dict[str, Any]:
    """{model: {domain: value, average: value}} in the order in which a reader compares."""
    if config.evaluation.corpus is None:
        return {}
    folder = config.folder / "evaluation"
    names = ["target", *(source.label for source in config.sources)]
    trained = [name for name in runs(config) if name != "fused"]
    names += [*sorted(trained, key=lambda name: name != "clm"), *config.evaluation.baselines, "fused"]
    found: dict[str, dict[str, float]] = {}
    for name in names:
        remedy = "run the stage `evaluate` again"
        result = outputs.read_object(folder / f"{name}.json", {"bits_per_byte": Scores}, remedy)
        if result is None:
            continue
        found[name] = result["bits_per_byte"]
        first = next(iter(found))
        if found[name].keys() != found[first].keys():
            raise UserError(f"{folder / name}.json: has other domains than {first}.json beside it; {remedy}")
    return found


def _throughput(folder: Path) -> dict[str, Any]:
    return (read_record(folder) or {}).get("throughput", {})


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table of bits per byte."""
    scores = report["evaluation"]["bits_per_byte"]
    if not scores:
        return [], []
    columns = [*domains(report), "average"]
    rows = []
    for name, values in scores.items():
        rows.append([plots.label(name), *(f"{values[column]:.4f}" for column in columns)])
    return ["bits per byte", *columns], rows


def domains(report: dict[str, Any]) -> list[str]:
    """Those of the held-out text, in the order of its documents."""
    first: dict[str, float] = next(iter(report["evaluation"]["bits_per_byte"].values()), {})
    return [key for key in first if key != "average"]


def show(report: dict[str, Any]) -> None:
    """The tables on the terminal; the best value of each column is bold."""
    header, rows = table_rows(report)
    if rows:
        table = Table(*map(escape, header), title="held-out text, lower is better")
        best = [min(float(row[i]) for row in rows) for i in range(1, len(header))]
        for row in rows:
            cells = [
                f"[bold]{cell}[/]" if float(cell) == low else cell for cell, low in zip(row[1:], best, strict=True)
            ]
            table.add_row(escape(row[0]), *cells)
        show_table(table)
    won = alignment_report.rows_won(report)
    if won:
        rest = alignment_report.won_by_none(report)
        table = Table("source", "rows aligned", "rows won", title="alignment and fusion", caption=rest or None)
        for name, share in won.items():
            table.add_row(escape(name), f"{100 * report['alignment'][name]['share']:.1f}%", f"{100 * share:.1f}%")
        show_table(table)


def render(config: Config, report: dict[str, Any], histories: dict[str, list[dict[str, Any]]]) -> str:
    """report.html: self-contained, plots as inline SVG, light and dark."""
    header, rows = table_rows(report)
    parts = [f"<h1>{html.escape(report['name'])}</h1>", f"<p>{_lead(report)}</p>"]
    if rows:
        parts += [
            "<h2>Bits per byte on held-out text</h2>",
            html_table(header, rows, "scores"),
            plots.bits_per_byte(report),
        ]
    if any(histories.values()):
        parts += ["<h2>Training</h2>", plots.losses(histories)]
        parts += [html_table(_TRAINING, _training_rows(report))]
    if report["alignment"]:
        parts += ["<h2>Alignment and fusion</h2>", alignment_report.section(report)]
    parts += ["<h2>Configuration</h2>", f"<pre>{html.escape(dump(config))}</pre>"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts += [f"<footer>{html.escape(versions)}</footer>"]
    return page(f"fusejax: {report['name']}", "\n".join(parts))


def page(title: str, body: str) -> str:
    """A whole HTML page, style included."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _lead(report: dict[str, Any]) -> str:
    sources = ", ".join(f"<b>{html.escape(name)}</b>" for name in report["sources"]) or "no source"
    lead = f"Target <b>{html.escape(report['target'])}</b>, fused from {sources}."
    scores = report["evaluation"]["bits_per_byte"]
    if "fused" in scores and "target" in scores:
        fused, before = scores["fused"]["average"], scores["target"]["average"]
        lead += f" Average bits per byte {before:.4f} before, <b>{fused:.4f}</b> after"
        lead += f" ({scores['clm']['average']:.4f} with CLM only)." if "clm" in scores else "."
    return lead


_TRAINING = ["run", "steps", "tokens", "CLM loss", "fusion loss", "target's entropy", "model's entropy", "tokens/s"]


def _training_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, values in report["training"].items():
        if values:
            rate = report["throughput"].get(name, {}).get("tokens_per_s")
            last = values["last_tenth"]
            nats = [f"{last[key]:.4f}" if key in last else "" for key in _LAST_TENTH[1:]]
            speed = f"{rate:,.0f}" if rate else ""
            rows.append([name, str(values["steps"]), f"{values['tokens']:,.0f}", *nats, speed])
    return rows


def html_table(header: list[str], rows: list[list[str]], kind: str = "plain") -> str:
    """A table; cells are text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child, .runs :is(th, td):nth-child(2) { text-align: left; }
.scores tbody tr:last-child td { font-weight: 600; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { background: #8881; padding: 1rem; overflow: auto; font-size: .85rem; }
footer { color: #888; font-size: .85rem; margin-top: 2rem; }
"""

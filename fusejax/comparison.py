"""`fusejax report RUN ...`: one table over any number of finished jobs, on the terminal, as CSV, Markdown and HTML.

A *group* is one job under several seeds: runs whose configurations differ in `seed` and `output` alone; a second run of
a seed stands by itself. Its values are means over the runs, with the sample standard deviation of the average. The same
runs give the same bytes.
"""

import csv
import html
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat
from rich.markup import escape
from rich.table import Table

from fusejax import alignment_report, metrics, outputs, paths, plots, report
from fusejax.errors import UserError
from fusejax.progress import say, show_table
from fusejax.results import Scores


class _Training(BaseModel):
    rows_won: dict[str, float] = {}
    rows_gated: float | None = None


class _Aligned(BaseModel):
    share: FiniteFloat
    kinds: dict[str, FiniteFloat] = {}
    fallback_causes: dict[str, FiniteFloat] = {}
    source_top_ce_per_byte: float | None = None
    mapped_ce_per_byte: float | None = None


class _Evaluation(BaseModel):
    bits_per_byte: dict[str, Scores]


class _Settings(BaseModel):
    seed: int = 0


# What is read of a report.json; the second, where it is there: older ones have less.
_READ = {
    "config": _Settings,
    "training": dict[str, _Training],
    "alignment": dict[str, _Aligned],
    "evaluation": _Evaluation,
}
_READ_TOO = {"name": str, "corpus": dict[str, dict[str, Any]], "source_wins": dict[str, dict[str, FiniteFloat]]}
_ANEW = "run `fusejax report CONFIG.yaml` to write it anew"


@dataclass(frozen=True)
class Run:
    """A finished job's output folder and its report."""

    folder: Path
    report: dict[str, Any]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        return self.report["evaluation"]["bits_per_byte"]

    @property
    def seed(self) -> int:
        return self.report["config"].get("seed", 0)


@dataclass(frozen=True)
class Row:
    """One model of one group: mean bits per byte by column, and the spread of the average where there are seeds."""

    group: str
    model: str
    values: dict[str, float]
    deviation: float | None


def read(folder: str | Path) -> Run:
    """A run; UserError where the folder has no report that can be read."""
    if paths.at(folder).is_file():
        raise UserError(f"{folder}: is a file; give the output folder of a finished job, or its CONFIG.yaml")
    path = paths.at(folder) / "report.json"
    found = outputs.read_object(path, _READ, _ANEW, _READ_TOO)
    if found is None:
        raise UserError(f"{path}: no report there; {folder} should be the output folder of a finished job")
    return Run(paths.at(folder), found)


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each group by its name, in the order given."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in run.report["config"].items() if k not in ("seed", "output")}
        key, again = json.dumps(settings, sort_keys=True), 0
        while run.seed in [other.seed for other in found.get((key, again), [])]:
            again += 1
        found.setdefault((key, again), []).append(run)
    named: dict[str, list[Run]] = {}
    for members in found.values():
        name = members[0].report.get("name") or members[0].folder.name
        if len(members) > 1:
            seeds = ", ".join(str(run.seed) for run in members)
            name = f"{name} (seeds {seeds})"
        while name in named:
            name = f"{members[0].folder}" if str(members[0].folder) not in named else f"{name}'"
        named[name] = members
    return named


def table(grouped: dict[str, list[Run]]) -> tuple[list[str], list[Row]]:
    """(columns, rows): the domains of all runs and `average` last; a model that only some runs of a group have counts
    over these."""
    columns: list[str] = []
    rows = []
    for name, members in grouped.items():
        for model in dict.fromkeys(model for run in members for model in run.scores):
            having = [run.scores[model] for run in members if model in run.scores]
            shared = [key for key in having[0] if all(key in values for values in having)]
            columns += [key for key in shared if key not in columns]
            values = {key: statistics.fmean(v[key] for v in having) for key in shared}
            averages = [v["average"] for v in having]
            rows.append(Row(name, model, values, statistics.stdev(averages) if len(averages) > 1 else None))
    return [*(c for c in columns if c != "average"), "average"], rows


def unlike(grouped: dict[str, list[Run]]) -> str:
    """What a reader is told where the runs' held-out texts are not the same; "" where they are."""
    texts: dict[str, list[str]] = {}
    for name, members in grouped.items():
        for run in members:
            heldout = run.report.get("corpus", {}).get("heldout", {})
            text = str(heldout.get("text", report.domains(run.report)))  # older reports have no fingerprint
            names = texts.setdefault(text, [])
            names += [name] * (name not in names)
    if len(texts) < 2:
        return ""
    told = "; ".join(", ".join(names) for names in texts.values())
    return f"measured on different held-out texts, so compare a row with those of its own run alone: {told}"


def _cells(columns: list[str], row: Row) -> list[str]:
    cells = [f"{row.values[key]:.4f}" if key in row.values else "" for key in columns]
    if row.deviation is not None:
        cells[-1] += f" ± {row.deviation:.4f}"
    return [row.group, plots.label(row.model), *cells]


def as_csv(columns: list[str], rows: Sequence[Row]) -> str:
    """One line a row, full precision; `model` as in report.json."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "model", *columns, "standard deviation of average"])
    for row in rows:
        values = [repr(row.values[key]) if key in row.values else "" for key in columns]
        writer.writerow([row.group, row.model, *values, "" if row.deviation is None else repr(row.deviation)])
    return out.getvalue()


def as_markdown(columns: list[str], rows: Sequence[Row], note: str = "") -> str:
    """A table, and `note` below it; the best of each run's column is bold."""
    lines = ["| run | model | " + " | ".join(_escaped(c) for c in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for row in rows:
        group, model, *cells = (_escaped(cell) for cell in _cells(columns, row))
        cells = [f"**{c}**" if _best(rows, row, key) else c for c, key in zip(cells, columns, strict=True)]
        lines.append(f"| {group} | {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + (f"\n{note}\n" if note else "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _best(rows: Sequence[Row], row: Row, key: str) -> bool:
    """Whether no other model of the same group has a smaller value."""
    others = [other.values[key] for other in rows if other.group == row.group and key in other.values]
    return key in row.values and row.values[key] == min(others)


def as_html(grouped: dict[str, list[Run]], columns: list[str], rows: Sequence[Row], note: str = "") -> str:
    """A self-contained page: the table, `note` below it, bits per byte by domain, losses, alignment."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in ["run", "model", *columns])
    body = ""
    for row in rows:
        group, model, *cells = (html.escape(cell) for cell in _cells(columns, row))
        marked = [f"<b>{c}</b>" if _best(rows, row, key) else c for c, key in zip(cells, columns, strict=True)]
        body += f"<tr><td>{group}</td><td>{model}</td>" + "".join(f"<td>{c}</td>" for c in marked) + "</tr>"
    parts = [
        "<h1>Comparison</h1>",
        "<h2>Bits per byte on held-out text, lower is better</h2>",
        f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        *([f"<p>{html.escape(note)}</p>"] if note else []),
    ]
    for name, members in grouped.items():
        means = {row.model: row.values for row in rows if row.group == name}
        if not means:
            continue
        parts += [f"<h2>{html.escape(name)}</h2>", plots.bits_per_byte({"evaluation": {"bits_per_byte": means}})]
        histories = {model: metrics.read(folder, metrics.TRAINING) for model, folder in _histories(members[0]).items()}
        if any(histories.values()):
            note = f"<p>Training loss of seed {members[0].seed}.</p>" if len(members) > 1 else ""
            parts += [note, plots.losses(histories)]
        if members[0].report["alignment"]:
            parts.append(_alignment(members[0]))
    return report.page("fusejax: comparison", "\n".join(parts))


def _histories(run: Run) -> dict[str, Path]:
    found = {"fused": run.folder, "clm": run.folder / "clm"}
    pairs = [name for name in run.report["training"] if name.startswith("pair/")]
    found |= {name: run.folder / "pairs" / name.removeprefix("pair/") for name in pairs}
    return {model: folder for model, folder in found.items() if (folder / "metrics.jsonl").exists()}


def _alignment(run: Run) -> str:
    """The table of what each source covered and won, and the plots of a report that has their numbers."""
    won = alignment_report.rows_won(run.report)
    alignment = run.report["alignment"]
    rows = [
        [name, f"{100 * values['share']:.1f}%", f"{100 * won[name]:.1f}%" if name in won else ""]
        for name, values in alignment.items()
    ]
    parts = [report.html_table(["source", "rows aligned", "rows won"], rows)]
    if all({"kinds", "fallback_causes"} <= values.keys() for values in alignment.values()):
        parts.append(alignment_report.picture(run.report))
    parts.append(alignment_report.wins_section(run.report.get("source_wins", {})))
    return "\n".join(parts)


def run(
    folders: Sequence[str],
    csv_path: str | None = None,
    markdown_path: str | None = None,
    html_path: str | None = None,
) -> None:
    """Show the table, and write it where paths are given."""
    wanted = [path for path in (csv_path, markdown_path, html_path) if path is not None]
    for given in wanted:
        outputs.require_writable(given)
        if wanted.count(given) > 1:
            raise UserError(f"{given}: is named for two tables; give each a file of its own")
    there = {folder if paths.is_remote(folder) else os.path.realpath(folder): folder for folder in reversed(folders)}
    grouped = groups([read(folder) for folder in reversed(there.values())])
    columns, rows = table(grouped)
    if not rows:
        raise UserError("report: none of these runs was evaluated; give them an evaluation.corpus")
    note = unlike(grouped)
    title = "bits per byte on held-out text, lower is better"
    shown = Table("run", "model", *map(escape, columns), title=title, caption=escape(note) or None)
    before = ""
    for row in rows:
        group, model, *cells = _cells(columns, row)
        cells = [f"[bold]{c}[/]" if _best(rows, row, key) else c for c, key in zip(cells, columns, strict=True)]
        if before and before != group:
            shown.add_section()
        shown.add_row(escape(group) if group != before else "", escape(model), *cells)
        before = group
    show_table(shown, names=2)
    made = {
        csv_path: lambda: as_csv(columns, rows),
        markdown_path: lambda: as_markdown(columns, rows, note),
        html_path: lambda: as_html(grouped, columns, rows, note),
    }
    for path, make in made.items():
        if path is not None:
            outputs.write_atomically(path, make(), outputs.ANOTHER_PATH)
            say(f"report: {path}")

"""The report's section on alignment: how each source's rows were found, what they keep, and what they predict."""

import html
import math
from typing import Any

from matplotlib.axes import Axes

from fusejax import plots

_KINDS = {"same token": "#166534", "same end": "#22c55e", "inside a token": "#86efac", "fallback": "#d1d5db"}
_CAUSES = {
    "newline": "#0e7490",
    "digits": "#67e8f9",
    "non-ASCII": "#a78bfa",
    "normalization": "#f59e0b",
    "special": "#ef4444",
    "document start": "#475569",
    "long token": "#854d0e",
    "several source tokens": "#15803d",
    "part of a source token": "#84cc16",
    "other spelling": "#9d174d",
    "other": "#d1d5db",
    "nothing left": "#fb7185",
}
_OWN, _MAPPED = "#94a3b8", "#0e7490"
_SHOWN_TOKENS = 10

COLUMNS = {
    "share": "rows aligned",
    "empty": "of these left empty",
    "mass_kept": "mass kept",
    "collisions.rows": "rows with collisions",
    "collisions.mass": "mass in them",
    "mapped_ce": "CE (nats per token)",
    "mapped_ce_per_byte": "CE (nats per byte)",
    "source_top_ce_per_byte": "the same, unmapped",
    "source_ce_per_byte": "source's whole CE",
}
_NATS = ("mapped_ce", "mapped_ce_per_byte", "source_top_ce_per_byte", "source_ce_per_byte")


def section(report: dict[str, Any]) -> str:
    """HTML for the job's `report.json`; "" without sources."""
    if not report["alignment"]:
        return ""
    header, rows = table(report)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "\n".join(
        [
            picture(report),
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
            "<p>Shares are of the target's rows. CE: cross-entropy of the mapped distribution, scaled to 1, on the "
            'true next token, over the aligned rows, where a miss costs a finite sum; "unmapped": the same '
            "rows of the source, treated alike, on its own next tokens, so that the difference is the map's. The "
            "source's whole CE: of its whole distributions, on all its tokens (nats per byte).</p>",
            f"<p>{html.escape(won_by_none(report))} {html.escape(_counted(report))}</p>",
            wins_section(source_wins(report["alignment"])),
            *(_tokens(name, values["top_tokens"]) for name, values in report["alignment"].items()),
        ]
    )


def source_wins(alignment: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{domain: {source: share of the domain's documents on which it has the least cross-entropy per byte}}.

    alignment: the reports of `fusejax.alignment.read_report` by source. Of equal ones the source named first wins, as
    under `min_ce`; documents on which no source has a number are left out. {} for one source alone, or without caches.
    """
    columns = [values.get("text_ce") or [] for values in alignment.values()]
    if len(columns) < 2 or len({len(column) for column in columns}) > 1:
        return {}
    won: dict[str, dict[str, float]] = {}
    for entries in zip(*columns, strict=True):
        numbers = [math.inf if ce is None else ce for _, ce in entries]
        if min(numbers) < math.inf:
            counts = won.setdefault(entries[0][0], dict.fromkeys(alignment, 0.0))
            counts[list(alignment)[numbers.index(min(numbers))]] += 1
    return {domain: {name: n / sum(counts.values()) for name, n in counts.items()} for domain, counts in won.items()}


def wins_section(wins: dict[str, dict[str, float]]) -> str:
    """HTML with a plot: for each domain how its documents divide among the sources; "" without domains."""
    if not wins:
        return ""
    figure, axes = plots.plt.subplots(figsize=(8, 0.9 + 0.42 * len(wins)), layout="constrained")
    names = list(next(iter(wins.values())))
    _stack(axes, list(wins), list(wins.values()), dict(zip(names, plots.source_colors(), strict=False)))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the documents in the sample, by the source of least cross-entropy per byte")
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, ncols=min(4, len(names)), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    return f"<h3>Best source by domain</h3>\n{plots.svg(figure)}"


def rows_won(report: dict[str, Any]) -> dict[str, float]:
    """Source → share of rows that it won in training; of a pairwise fusion, in the run of its own copy."""
    training = report["training"]
    if "fused" in training:
        return training["fused"].get("rows_won", {})
    pairs = {name: training.get(f"pair/{name}", {}).get("rows_won", {}) for name in report["alignment"]}
    return {name: won[name] for name, won in pairs.items() if name in won}


def won_by_none(report: dict[str, Any]) -> str:
    """A sentence on the rows that no source won in training; "" before it, and for pairs, each of which has its own."""
    training = report["training"].get("fused", {})
    won, gated = training.get("rows_won"), training.get("rows_gated")
    if not won:
        return ""
    none = f"{max(0.0, 1 - sum(won.values())):.1%} of the rows were won by none:"
    if gated is None:
        return f"{none} no source has a row there."
    return f"{none} no source has a row there, or none was ahead of the target ({gated:.1%})."


def _counted(report: dict[str, Any]) -> str:
    """On how many documents the numbers are based."""
    parts = []
    for name, values in report["alignment"].items():
        documents = values["documents"]
        there = f" of {documents['there']}" if "there" in documents else ""
        unread = "" if documents["measured"] else " (without its rows: none is counted as left empty)"
        parts.append(f"{name} {documents['counted']}{there}{unread}")
    return f"Documents that the numbers are based on: {', '.join(parts)}."


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each source); rows won only after a training that counted them."""
    won = rows_won(report)
    rows = []
    for name, values in report["alignment"].items():
        flat = values | {f"collisions.{key}": value for key, value in values["collisions"].items()}
        rows.append(
            [name, *(_cell(key, flat[key]) for key in COLUMNS), *([_cell("won", won.get(name))] if won else [])]
        )
    return ["source", *COLUMNS.values(), *(["rows won"] if won else [])], rows


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if key in _NATS else f"{100 * value:.1f}%"


def _tokens(name: str, tokens: list[dict[str, Any]]) -> str:
    """The source tokens that become something else, folded in."""
    if not tokens:
        return ""
    rows = "".join(
        f"<tr><td>{_code(token['token'])}</td><td>{_code(token['image'])}</td><td>{100 * token['mass']:.2f}%</td></tr>"
        for token in tokens[:_SHOWN_TOKENS]
    )
    return (
        f"<details><summary>{html.escape(name)}: tokens that become another one</summary>"
        "<table><thead><tr><th>source's token</th><th>becomes</th><th>mean probability in a row</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


def _code(token: str | None) -> str:
    return "dropped" if token is None else f"<code>{html.escape(token)}</code>"


def picture(report: dict[str, Any]) -> str:
    """SVG: rows by kind, fallback by cause, CE per byte beside that before the map, and rows won by each source."""
    names = list(report["alignment"])
    values = list(report["alignment"].values())
    won = rows_won(report)
    figure, axes = plots.plt.subplots(2, 2, figsize=(9, 2.6 + 0.8 * len(names)), sharey=True, layout="constrained")
    _stack(axes[0, 0], names, [each["kinds"] for each in values], _KINDS)
    axes[0, 0].set_title("rows by kind (% of the target's rows)", fontsize=10)
    _stack(axes[0, 1], names, [each["fallback_causes"] for each in values], _CAUSES)
    axes[0, 1].set_title("fallback by cause (% of the target's rows)", fontsize=10)
    at = range(len(names))
    for offset, key, label, color in (
        (-0.2, "source_top_ce_per_byte", "the same rows, unmapped", _OWN),
        (0.2, "mapped_ce_per_byte", "mapped to the target", _MAPPED),
    ):
        axes[1, 0].barh(
            [i + offset for i in at], [each.get(key) or 0 for each in values], 0.36, color=color, label=label
        )
    axes[1, 0].set_title("CE of the true text, top k scaled to 1 (nats per byte)", fontsize=10)
    if won:
        axes[1, 1].barh(names, [100 * won.get(name, 0.0) for name in names], 0.6, color=plots.COLORS["fused"])
        axes[1, 1].set_title("rows won (%)", fontsize=10)
    else:
        axes[1, 1].set_visible(False)
    axes[0, 0].invert_yaxis()
    for each in axes.flat:
        each.grid(axis="y", visible=False)
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)
    return plots.svg(figure)


def _stack(axes: Axes, names: list[str], shares: list[dict[str, float]], colors: dict[str, str]) -> None:
    """One bar for each source, made of what occurs anywhere, in percent."""
    starts = [0.0] * len(names)
    for kind, color in colors.items():
        widths = [100 * share.get(kind, 0.0) for share in shares]
        if any(widths):
            axes.barh(names, widths, 0.6, left=starts, label=kind, color=color)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    if not any(starts):
        axes.barh(names, starts)
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="#888")
        axes.set_xticks([])

"""The report's plots, as SVG text that can stand in a page; the same numbers give the same bytes."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "fusejax",
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
    }
)

COLORS = {
    "fused": "#c2410c",
    "clm": "#2563eb",
    "target": "#6b7280",
    "distill": "#7c3aed",
    "exact": "#a16207",
    "avg_ce": "#ea9a5e",
    "fusellm": "#0f766e",
    "merge": "#be185d",
    "ensemble": "#4d7c0f",
}
LABELS = {
    "target": "target (before)",
    "clm": "CLM only",
    "distill": "distilled from the best source",
    "exact": "exact-match alignment",
    "avg_ce": "AvgCE",
    "fusellm": "FuseLLM (the paper's code)",
    "merge": "weight merging",
    "ensemble": "ensemble of the sources",
    "fused": "fused",
}


def label(model: str) -> str:
    """What a reader is told of a model of report.json."""
    return LABELS.get(model) or (f"copy with {model.removeprefix('pair/')}" if model.startswith("pair/") else model)


SOURCE_COLORS = ("#cbd5e1", "#99c1b9", "#d8b4e2", "#e2cf9b", "#a3b18a", "#f2b5a7")


def source_colors() -> Iterator[str]:
    """Colours of sources in their order, over again after the last."""
    return itertools.cycle(SOURCE_COLORS)


def svg(figure: Figure) -> str:
    """The figure as text for a page, and closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(values: list[float], window: int) -> list[float]:
    """Trailing mean: at each step over the last `window` values."""
    sums, result = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - window] if i >= window else 0.0)
        result.append(sums / min(i + 1, window))
    return result


def losses(histories: dict[str, list[dict[str, Any]]]) -> str:
    """CLM loss against tokens, of every run: the comparison of the paper's figure."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for name, history in histories.items():
        if not history:
            continue
        seen, tokens = 0.0, []
        for row in history:
            seen += row["tokens"]
            tokens.append(seen / 1e6)
        values = [row["clm_loss"] for row in history]
        color = COLORS.get(name)
        axes.plot(tokens, values, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(
            tokens,
            _smooth(values, min(len(values), max(5, len(values) // 20))),
            color=color,
            label=f"{label(name)}, training text",
        )
    axes.set_xlabel("million target tokens")
    axes.set_ylabel("CLM loss (nats per token)")
    axes.legend(frameon=False)
    return svg(figure)


def heldout(runs: dict[str, list[tuple[float, float]]]) -> str:
    """Average bits per byte on the held-out text against tokens: of each run its (tokens, bits per byte) points."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for name, points in runs.items():
        axes.plot([tokens / 1e6 for tokens, _ in points], [value for _, value in points], marker="o", label=name)
    axes.set_xlabel("million target tokens")
    axes.set_ylabel("bits per byte, held out")
    axes.legend(frameon=False)
    return svg(figure)


def bits_per_byte(report: dict[str, Any]) -> str:
    """Bars by domain, one for each model."""
    scores = report["evaluation"]["bits_per_byte"]
    columns = list(next(iter(scores.values())))
    figure, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(scores)
    others = source_colors()
    for i, (name, values) in enumerate(scores.items()):
        at = [column + (i - (len(scores) - 1) / 2) * width for column in range(len(columns))]
        color = COLORS.get(name) or next(others)
        axes.bar(at, [values[column] for column in columns], width * 0.92, label=label(name), color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("bits per byte")
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, ncols=min(6, len(scores)), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return svg(figure)

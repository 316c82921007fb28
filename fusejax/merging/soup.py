"""Greedy soup (Wortsman et al. 2022, arXiv:2203.05482, recipe 1), by bits per byte on held-out text.

The models are sorted by their own score, the best first. The soup begins with the best; each next model joins it if the
uniform average of the soup and that model scores at least as well as the soup. One model is in memory at a time.
"""

import shutil
from typing import Any

from rich.table import Table

from fusejax.config import ModelConfig
from fusejax.merging.config import MergeConfig, MergedModel
from fusejax.merging.stage import Opened, write_merged
from fusejax.progress import console, say


def choose(config: MergeConfig, opened: Opened) -> tuple[tuple[MergedModel, ...], list[dict[str, Any]]]:
    """(the models of the soup, the steps: {model, alone, with_soup, joins} in the order in which they were tried)."""
    names = [f"{m.model} (revision {m.revision})" if m.revision else m.model for m in config.models]
    alone = [_score(config, model) for model in config.models]
    order = sorted(range(len(alone)), key=alone.__getitem__)
    chosen, best = [order[0]], alone[order[0]]
    steps: list[dict[str, Any]] = [{"model": names[order[0]], "alone": best, "with_soup": best, "joins": True}]
    temporary = config.folder.parent / f".{config.folder.name}.soup"
    try:
        for i in order[1:]:
            tried = [*chosen, i]
            candidates = Opened(None, [opened.models[j] for j in tried], opened.donor)
            soup = config.model_copy(update={"models": tuple(config.models[j] for j in tried)})
            write_merged(soup, candidates, temporary, {})
            score = _score(config, ModelConfig(model=str(temporary), bos=config.models[0].bos))
            joins = score <= best
            steps.append({"model": names[i], "alone": alone[i], "with_soup": score, "joins": joins})
            if joins:
                chosen, best = tried, score
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _show(steps)
    say(f"greedy soup: {len(chosen)} of {len(order)} models, {best:.4f} bits per byte")
    return tuple(config.models[i] for i in chosen), steps


def _score(config: MergeConfig, model: ModelConfig) -> float:
    from fusejax.evaluation.standalone import average, measure_corpus

    assert config.corpus is not None
    sums = measure_corpus(model, config.corpus, max_length=config.max_length, batch_tokens=config.batch_tokens)
    return average(sums)


def _show(steps: list[dict[str, Any]]) -> None:
    table = Table("model", "alone", "soup with it", "joins", title="bits per byte, lower is better")
    for step in steps:
        numbers = [f"{step[key]:.4f}" for key in ("alone", "with_soup")]
        table.add_row(step["model"], *numbers, "yes" if step["joins"] else "no")
    console.print(table)

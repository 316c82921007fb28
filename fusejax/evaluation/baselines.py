"""What fusion is compared with, in the same job: other ways to spend the same text, steps and sources.

`evaluation.baselines` of the configuration names them:

distill: fusion from the one source, the target aside, that has the least cross-entropy per byte on the training text.
exact: fusion with rows and tokens aligned by exact match alone.
avg_ce: fusion with every source weighed by its cross-entropy instead of the best taken.
fusellm: fusion as the paper's code does it, its quirks included (`compat: fusellm`).
merge: the mean of the sources' weights, where their architectures and vocabularies are one.
ensemble: the mean of the sources' probabilities (nothing is trained; the stage `evaluate` measures it).

A trained one is a job of its own in baselines/<name>, with the main job's documents and source caches, and its
alignment where that is the same.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusejax import alignment, conversations, distributed, merging, outputs, store, tokenizers, training
from fusejax.config import COMPAT, Config, FusionConfig, ModelConfig, validate
from fusejax.deciding import document_ce, joint_ce
from fusejax.errors import UserError
from fusejax.progress import say
from fusejax.source_cache import SourceCache

TRAINED = ("distill", "exact", "avg_ce", "fusellm")


def run(config: Config) -> None:
    """The stage `baselines`: make every one that is not there yet. Needs the stages up to `align`."""
    for name in config.evaluation.baselines:
        if name in TRAINED:
            job = variant(config, name)
            distributed.alone(f"baseline {name}", partial(share, config, job))
            alignment.run(job)
            training.train(job, name)
            training.export_run(job, name)
        elif name == "merge":
            distributed.alone("baseline merge", partial(_merge, config))


def folder(config: Config, name: str) -> Path:
    """Where a baseline lives."""
    return config.folder / "baselines" / name


def exports(config: Config) -> dict[str, Path]:
    """The Hugging Face folder of every baseline that makes one."""
    return {name: folder(config, name) / "export" for name in config.evaluation.baselines if name != "ensemble"}


def variant(config: Config, name: str) -> Config:
    """The job of a trained baseline: `config` but for what the baseline stands for."""
    values: dict[str, Any] = config.model_dump(mode="json")
    values |= {"output": str(folder(config, name)), "compat": None}
    values["evaluation"] |= {"clm": False, "baselines": []}
    if values["fusion"]["kind"] == "pairwise":  # each baseline is one run over all sources
        values["fusion"] |= {"kind": "min_ce", "merge": None}
    if values["fusion"]["kind"] != "avg_ce" or name == "distill":
        values["fusion"]["weighting"] = "softmax"  # a job's `compat` may have set it, where it has no effect
    if name == "distill":
        best = best_source(config)
        say(f"baseline distill: from {best.label}, the best source on the training text")
        values["sources"] = [best.model_dump(mode="json")]
        values["fusion"] |= {"kind": "min_ce", "weights": None, "temperature": 1.0, "gate": None}
    elif name == "exact":
        values["alignment"] |= {"rows": "exact", "tokens": "exact", "gold_chain": False}
    elif name == "avg_ce":
        values["fusion"] |= {"kind": "avg_ce", "weights": None, "weighting": config.fusion.weighting}
    else:
        values["compat"] = "fusellm"
        values["fusion"] |= {"kind": "min_ce", "weights": None, "temperature": 1.0, "window": FusionConfig().window}
        values["fusion"]["gate"] = None
        for section, keys in COMPAT["fusellm"].items():
            for key in keys:
                del values[section][key]
    return validate(values, f"baseline {name}")


def best_source(config: Config) -> ModelConfig:
    """The source, other than the target itself, with the least cross-entropy per byte on the training text."""
    others = [source for source in config.sources if source.model != config.target.model] or list(config.sources)
    if not others:
        raise UserError("evaluation.baselines: 'distill' needs a source")
    return min(others, key=lambda source: _training_ce(config, source))


def _training_ce(config: Config, source: ModelConfig) -> float:
    """Nats per byte over all documents, from the cache."""
    tokenizer = tokenizers.for_model(source)
    tokens = store.Store(config.folder / "data/train/tokens" / tokenizer.fingerprint)
    cache = SourceCache.of(config, source)
    parts = []
    for record, text in zip(cache, tokens, strict=True):
        ce = conversations.text_ce(np.asarray(record["ce"]), text)
        if len(ce):  # not a document that the source broke on
            parts.append(document_ce(ce, text["boundaries"], has_eos=tokenizer.eos_id is not None))
    return joint_ce(parts)


def share(config: Config, job: Config) -> None:
    """Let another job of the same text and sources see this one's stores, by links, where it would make the same."""
    shared = ["data", "sources"]
    same = config.alignment == job.alignment and config.compat == job.compat
    shared += ["alignment"] if same else []
    outputs.make_folder(job.folder)
    for name in shared:
        link = job.folder / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(config.folder / name, job.folder))


def _merge(config: Config) -> None:
    given = [merging.MergedModel(model=source.model, revision=source.revision) for source in config.sources]
    try:
        merging.merge(
            merging.MergeConfig(method="linear", models=tuple(given), output=str(folder(config, "merge") / "export"))
        )
    except (UserError, ValueError) as error:
        say(f"baseline merge: left out: {error}")

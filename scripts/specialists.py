"""A base model, experts continually trained from it, and their fusion, over seeds: the paper's Table 7 in small.

    python scripts/specialists.py CONFIG.yaml [key=value ...]

See configs/specialists.yaml. Everything is made from text by this project's own training: splits that share no text, a
tokenizer, the base, one expert for each domain, and for each seed a job that fuses the experts into the base, with
continual training, weight merging and the ensemble beside it. Prints one table over the seeds, which
OUTPUT/table.md, table.csv and table.html keep. An interrupted run goes on where it stopped.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import domain_corpus
from pydantic import Field, model_validator
from train_quickstart_models import byte_level, make_model

from fusejax import cli, comparison, config, settings
from fusejax.config import CorpusConfig
from fusejax.corpus import read_documents
from fusejax.errors import UserError
from fusejax.evaluation import baselines
from fusejax.outputs import read_object, write_atomically
from fusejax.progress import say
from fusejax.settings import Section

STAGES = ("prepare", "sources", "align", "train", "export", "baselines", "evaluate", "report")


class Sizes(Section):
    """Bytes of text of each domain, at most."""

    general: int = Field(ge=1)
    expert: int = Field(ge=1)
    fusion: int = Field(ge=1)
    heldout: int = Field(ge=1)


class Experiment(Section):
    """The keys of configs/specialists.yaml."""

    corpora: Path
    general: tuple[str, ...] = Field(min_length=1)
    domains: tuple[str, ...] = Field(min_length=2)
    bytes: Sizes
    vocab_size: int = Field(ge=300)
    max_length: int = Field(ge=8)
    model: dict[str, Any]
    jobs: dict[str, Any] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)
    expert: dict[str, Any] = Field(default_factory=dict)
    fusion: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    output: Path

    @property
    def text(self) -> Path:
        return self.output / "text"

    @model_validator(mode="after")
    def _distinct(self) -> "Experiment":
        names = [*self.general, *self.domains]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"general, domains: {name!r} is named twice; its text would serve two uses")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice")
        return self


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="specialists.py", description=(__doc__ or "").splitlines()[0])
    cli.add_config(parser)
    options = parser.parse_args(arguments)
    experiment = settings.check(settings.read(options.config, options.overrides), Experiment, options.config)
    jobs = plan(experiment)  # every mistake in a job's keys shows before anything runs
    split(experiment)
    untrained = experiment.output / "base" / "untrained"
    if not (untrained / "config.json").exists():
        make_base(experiment, untrained)
    first = None
    for name, job in jobs.items():
        say(f"== {name}")
        if job.sources:
            first = first or job
            share(first, job)
        for stage in STAGES if job.sources else ("prepare", "train", "export"):
            cli.stage(stage)(job)
    table = experiment.output / "table"
    runs = [str(job.folder) for job in jobs.values() if job.sources]
    comparison.run(runs, *(str(table.with_suffix(ending)) for ending in (".csv", ".md", ".html")))


def plan(experiment: Experiment) -> dict[str, config.Config]:
    """Every job, by its name, in the order in which they run."""
    base, output = experiment.output / "base", experiment.output
    general = {"path": str(experiment.text / "general.jsonl"), "domain_key": "domain"}
    jobs = {"base": _job(experiment, experiment.base, target=base / "untrained", corpus=general, output=base)}
    experts = {domain: output / f"expert-{domain}" for domain in experiment.domains}
    for domain, folder in experts.items():
        text = {"path": str(experiment.text / "expert.jsonl"), "domain_key": "domain", "domains": [domain]}
        jobs[folder.name] = _job(experiment, experiment.expert, target=base / "export", corpus=text, output=folder)
    sources = [{"model": str(folder / "export"), "name": domain} for domain, folder in experts.items()]
    text = {"path": str(experiment.text / "fusion.jsonl"), "domain_key": "domain"}
    heldout = {"corpus": {"path": str(experiment.text / "heldout.jsonl"), "domain_key": "domain"}}
    for seed in experiment.seeds:
        jobs[f"fusion-{seed}"] = _job(
            experiment, experiment.fusion, target=base / "export", sources=sources, corpus=text, evaluation=heldout,
            output=output / f"fusion-{seed}", seed=seed,
        )  # fmt: skip
    return jobs


def _job(experiment: Experiment, own: dict[str, Any], **values: Any) -> config.Config:
    given: dict[str, Any] = {
        "max_length": experiment.max_length,
        "sources": [],
        "compilation_cache": str(experiment.output / "compiled"),
    }
    for part in (experiment.jobs, own, values):
        for key, value in part.items():
            nested = isinstance(value, dict) and isinstance(given.get(key), dict)
            given[key] = given[key] | value if nested else value
    if not given["sources"]:
        given.pop("evaluation", None)
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    return config.validate(given, Path(given["output"]).name)


def split(experiment: Experiment) -> None:
    """Write text/{general,heldout,fusion,expert}.jsonl; UserError where other settings made what is there."""
    sizes, made = experiment.bytes, experiment.text / "made.json"
    settings_now = experiment.model_dump(mode="json", include={"general", "domains", "bytes"})
    before = read_object(made, {"bytes": dict}, f"remove {experiment.text}")
    if before is not None:
        if before != settings_now:
            raise UserError(f"{made}: made with other `general`, `domains` or `bytes`; choose another `output`")
        return
    parts = {
        experiment.general: {"general": sizes.general},
        experiment.domains: {"heldout": sizes.heldout, "fusion": sizes.fusion, "expert": sizes.expert},
    }
    paths = {name: _path(experiment, name) for names in parts for name in names}
    _refuse_shared([paths[name] for name in experiment.general], [paths[name] for name in experiment.domains])
    for names, splits in parts.items():
        corpora = [f"{name}={paths[name]}" for name in names]
        wanted = [f"{name}={size}" for name, size in splits.items()]
        domain_corpus.main([str(experiment.text), "--corpus", *corpora, "--split", *wanted])
    write_atomically(made, json.dumps(settings_now))


def _refuse_shared(general: Sequence[Path], domains: Sequence[Path]) -> None:
    """UserError where a document of a domain is also one of the general text; near ones are not looked for."""
    known = {found.id: path for path in general for found in read_documents(CorpusConfig(path=str(path)))}
    for path in domains:
        shared = [found for found in read_documents(CorpusConfig(path=str(path))) if found.id in known]
        if shared:
            first = shared[0]
            raise UserError(
                f"{path}: {len(shared)} of its documents also stand in a general corpus, the first in "
                f"{known[first.id]}: {first.text[:60]!r}; remove them from one of the two"
            )


def _path(experiment: Experiment, name: str) -> Path:
    found = [experiment.corpora / f"{name}{ending}" for ending in (".jsonl", ".jsonl.gz")]
    for path in found:
        if path.exists():
            return path
    raise UserError(f"corpora: neither {found[0]} nor {found[1].name} is there")


def make_base(experiment: Experiment, folder: Path) -> None:
    """The model before any training: a tokenizer learned from the base's text, and random weights."""
    with (experiment.text / "general.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizer, roles = byte_level(texts, experiment.vocab_size, digits=True)
    make_model(tokenizer, roles, experiment.model, experiment.max_length, seed=1, folder=folder)


def share(first: config.Config, job: config.Config) -> None:
    """Let a seed's job have the first one's stores, and its results for models that are not this seed's."""
    if job is first:
        return
    baselines.share(first, job)
    for name in ("target", "merge", "ensemble", *(source.label for source in job.sources)):
        known, here = first.folder / "evaluation" / f"{name}.json", job.folder / "evaluation" / f"{name}.json"
        if known.exists() and not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known, here)


if __name__ == "__main__":
    cli.run(main)

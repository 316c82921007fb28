"""The stage `evaluate`: bits per byte of every model of a job on its held-out documents, one JSON file each."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fusejax import corpus, models, outputs, paths, sharding, tokenizers, training
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.evaluation import baselines
from fusejax.evaluation.ensemble import Member, measure_ensemble
from fusejax.evaluation.perplexity import measure, numbers
from fusejax.outputs import fingerprint, write_atomically
from fusejax.progress import say
from fusejax.results import Scores
from fusejax.store import Store


def run(config: Config) -> None:
    """Write evaluation/<name>.json for the target as it was, every source, the baselines, and what was trained so far.

    A result whose inputs still hold is kept. Raises UserError where the held-out documents are missing.
    """
    if config.evaluation.corpus is None:
        say("evaluate: no evaluation.corpus in the configuration, so there is nothing to evaluate on")
        return
    known: dict[str, dict[str, Any]] = {}
    for name, model in _models(config).items():
        if isinstance(model, ModelConfig):
            _evaluate(config, name, model, model.model, known)
        else:
            with paths.local_folder(model, "export") as folder:
                trained = ModelConfig(model=str(folder), bos=config.target.bos)
                _evaluate(config, name, trained, str(model), known)
    if "ensemble" in config.evaluation.baselines:
        _evaluate_ensemble(config)


def _models(config: Config) -> dict[str, ModelConfig | Path]:
    """Every model that there is to evaluate, or what was trained its folder, by the name that reports give it."""
    found: dict[str, ModelConfig | Path] = {"target": config.target}
    found |= {source.label: source for source in config.sources}
    trained = {name: training.run_folder(config, name) / "export" for name in [*training.runs(config), "clm", "fused"]}
    for name, folder in (trained | baselines.exports(config)).items():
        if folder.is_dir():
            found[name] = folder
    return found


def _inputs(config: Config, model: ModelConfig, documents: Store) -> dict[str, Any]:
    """What determines a model's result."""
    return {
        "model": models.fingerprint(model.model, model.revision),
        "tokenizer": tokenizers.for_model(model).fingerprint,
        "text": fingerprint(documents.inputs),
        "max_length": config.max_length,
        "compute": config.precision.compute,
    }


def _heldout(config: Config) -> Store:
    return corpus.documents(config, "heldout")


def _tokens(config: Config, model: ModelConfig) -> Store:
    return Store(config.folder / "data/heldout/tokens" / tokenizers.for_model(model).fingerprint)


def _loader(config: Config, model: ModelConfig) -> Callable[[], models.Decoder]:
    mesh, compute = sharding.local_mesh(config.mesh), jnp.dtype(config.precision.compute)
    return partial(
        models.load, model.model, mesh=mesh, dtype=compute, compute_dtype=compute, revision=model.revision,
        attention=config.attention,
    )  # fmt: skip


def _evaluate(config: Config, name: str, model: ModelConfig, path: str, known: dict[str, dict[str, Any]]) -> None:
    """Write one model's evaluation/<name>.json, unless it was made from the same inputs.

    path: where the result says that the model is. known: results by the fingerprint of their inputs; the target that is
    also a source is evaluated once.
    """
    documents = _heldout(config)
    inputs = _inputs(config, model, documents)
    key = fingerprint(inputs)
    before = _done_before(config, name, inputs)
    if before is not None:
        known[key] = {kind: values for kind, values in before.items() if kind not in ("name", "path")}
        return
    if key not in known:
        sums = measure(
            _loader(config, model)(),
            tokenizers.for_model(model),
            documents,
            _tokens(config, model),
            max_length=config.max_length,
            batch_tokens=config.evaluation.batch_tokens,
            mesh=sharding.local_mesh(config.mesh),
            name=name,
        )
        known[key] = {"inputs": inputs, **numbers(sums)}
    write_atomically(_path(config, name), json.dumps({"name": name, "path": path, **known[key]}, indent=1))


def _evaluate_ensemble(config: Config) -> None:
    """The sources' average of probabilities, with equal weights; see `fusejax.evaluation.ensemble`."""
    documents = _heldout(config)
    inputs = {source.label: _inputs(config, source, documents) for source in config.sources}
    if _done_before(config, "ensemble", inputs) is not None:
        return
    members = [
        Member(source.label, tokenizers.for_model(source), _tokens(config, source), _loader(config, source))
        for source in config.sources
    ]
    sums = measure_ensemble(
        members,
        documents,
        max_length=config.max_length,
        batch_tokens=config.evaluation.batch_tokens,
        mesh=sharding.local_mesh(config.mesh),
    )
    result = {"name": "ensemble", "of": [member.name for member in members], "inputs": inputs, **numbers(sums)}
    write_atomically(_path(config, "ensemble"), json.dumps(result, indent=1))


def _path(config: Config, name: str) -> Path:
    return config.folder / "evaluation" / f"{name}.json"


def _done_before(config: Config, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
    try:
        before = outputs.read_object(_path(config, name), {"inputs": dict, "bits_per_byte": Scores}, "")
    except UserError:  # damaged: measured again
        return None
    if before is None or before["inputs"] != inputs:
        return None
    say(f"evaluate {name}: done before, skipped")
    return before

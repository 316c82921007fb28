"""`fusejax evaluate MODEL ... --corpus PATH`: bits per byte of any models on any text, without a job."""

import json
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.markup import escape
from rich.table import Table

from fusejax import hub, models, outputs, preflight, settings, sharding, tokenizer_files, tokenizers
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.corpus import Document, encode, read_documents
from fusejax.corpus import check as check_corpus
from fusejax.errors import UserError
from fusejax.evaluation import ensemble
from fusejax.evaluation.perplexity import DomainSums, measure, numbers, resolve_stride
from fusejax.progress import say, show_table
from fusejax.tokenizers import Tokenizer

_TOGETHER = 256  # documents that are tokenized together


def measure_corpus(
    model: ModelConfig,
    corpus: CorpusConfig,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    compute: str = "float32",
) -> dict[str, DomainSums]:
    """The sums of every domain of a corpus under a model, whole documents of any length, over all local devices.

    max_length: default the context that the model was made for. Raises UserError for faults of model, tokenizer and
    corpus.
    """
    tokenizer = tokenizers.for_model(model)
    mesh = sharding.whole_mesh()
    dtype = jnp.dtype(compute)
    decoder = models.load(model.model, mesh=mesh, dtype=dtype, compute_dtype=dtype, revision=model.revision)
    documents, tokens = tee(_tokenized(corpus, tokenizer))
    return measure(
        decoder,
        tokenizer,
        ({"id": document.id, "domain": document.domain} for document, _ in documents),
        (text for _, text in tokens),
        max_length=max_length or decoder.config.max_length,
        stride=stride,
        batch_tokens=batch_tokens,
        mesh=mesh,
        name=model.label,
    )


def measure_ensemble_of(
    given: Sequence[ModelConfig],
    corpus: CorpusConfig,
    *,
    kind: ensemble.Average = "probability",
    weights: Sequence[float] | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    compute: str = "float32",
) -> dict[str, DomainSums]:
    """The sums of every domain of a corpus under an ensemble of models; see `fusejax.evaluation.ensemble`.

    max_length: default the least of the contexts that the models were made for. The others as in `measure_corpus`.
    """
    mesh, dtype = sharding.whole_mesh(), jnp.dtype(compute)
    documents = list(read_documents(corpus))
    contexts = [models.read_config(model.model, model.revision)[1].max_length for model in given]

    def member(model: ModelConfig) -> ensemble.Member:
        tokenizer = tokenizers.for_model(model)
        tokens = encode(tokenizer, documents)
        load = partial(models.load, model.model, mesh=mesh, dtype=dtype, compute_dtype=dtype, revision=model.revision)
        return ensemble.Member(model.label, tokenizer, tokens, load)

    return ensemble.measure_ensemble(
        [member(model) for model in given],
        [{"id": document.id, "domain": document.domain} for document in documents],
        weights=weights,
        average=kind,
        max_length=max_length or min(contexts),
        stride=stride,
        batch_tokens=batch_tokens,
        mesh=mesh,
    )


def average(sums: dict[str, DomainSums]) -> float:
    """The mean over domains of bits per byte."""
    return numbers(sums)["bits_per_byte"]["average"]


def _tokenized(corpus: CorpusConfig, tokenizer: Tokenizer) -> Iterator[tuple[Document, dict[str, Any]]]:
    waiting: list[Document] = []

    def flush() -> Iterator[tuple[Document, dict[str, Any]]]:
        yield from zip(waiting, encode(tokenizer, waiting), strict=True)
        waiting.clear()

    for document in read_documents(corpus):
        waiting.append(document)
        if len(waiting) == _TOGETHER:
            yield from flush()
    yield from flush()


def models_of(names: Sequence[str]) -> list[ModelConfig]:
    """The models of a command line; UserError for what can be none."""
    for name in names:
        tokenizer_files.require_name(name)
    return [settings.check({"model": name}, ModelConfig, "evaluate") for name in names]


def labels_of(given: Sequence[ModelConfig], taken: Collection[str] = ()) -> list[str]:
    """How tables call the models: by the last part of the name if that tells them apart, from what is `taken` too.

    UserError for a model twice, however its folder is written, and for one whose whole name is taken.
    """
    places = [_place(model) for model in given]
    for model, place in zip(given, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"evaluate: {model.model} is named twice")
    labels = [model.label for model in given]
    if len({*labels, *taken}) < len(labels) + len(taken):
        labels = [model.model for model in given]
    for label in labels:
        if label in taken:
            raise UserError(f"evaluate: {label}: results have a row of this name; write the folder as ./{label}")
    return labels


def _place(model: ModelConfig) -> str:
    path = Path(model.model).expanduser()
    return str(path.resolve()) if path.is_dir() else model.model


def _check(model: ModelConfig, max_length: int | None, stride: int | None) -> None:
    """UserError for what would fail once the model is loaded, as far as its files are here or a hub tells."""
    preflight.check_model(model)
    folder = preflight.folder_of(model)
    if folder is None or not (preflight.has_all_weights(folder) and tokenizer_files.has_files(folder)):
        hub.require_reachable(model.model, "model")
    if max_length is not None:
        preflight.check_length(model, max_length, "--max-length")
    context = models.read_config(folder or model.model)[1].max_length  # asks a hub whether there is such a model
    resolve_stride(stride, max_length or context, "--stride")


def run(
    names: Sequence[str],
    corpus: CorpusConfig,
    json_path: str | None = None,
    kind: ensemble.Average | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> None:
    """Measure every model, and with `kind` their ensemble; show the table, and write all numbers to `json_path`."""
    given = models_of(names)
    labels = labels_of(given, taken=() if kind is None else ("ensemble",))
    if json_path is not None:
        outputs.require_writable(json_path)
    if kind is not None:
        ensemble.shares_of(labels, weights)
    check_corpus(corpus)
    for model in given:
        _check(model, options.get("max_length"), options.get("stride"))
    if kind == "log_probability":
        ensemble.require_alike([(model.label, tokenizers.for_model(model)) for model in given])
    results = {}
    for label, model in zip(labels, given, strict=True):
        results[label] = measure_corpus(model, corpus, **options)
    if kind is not None:
        results["ensemble"] = measure_ensemble_of(given, corpus, kind=kind, weights=weights, **options)
    if json_path is not None:
        values = {label: numbers(sums) for label, sums in results.items()}
        outputs.write_atomically(json_path, json.dumps(values, indent=2) + "\n", outputs.ANOTHER_PATH)
    show(results)
    if json_path is not None:
        say(f"evaluate: {json_path}")


def show(results: dict[str, dict[str, DomainSums]]) -> None:
    """The table: bits per byte of each domain, and what was counted."""
    domains = list(next(iter(results.values())))
    scores = [*domains, *(["average"] if len(domains) > 1 else [])]
    counts = ["tokens", "bytes", "documents"]
    table = Table(title="bits per byte, lower is better")
    for header in ("model", *scores, "perplexity", *counts):
        table.add_column(escape(header))
    for label, sums in results.items():
        values, whole = numbers(sums)["bits_per_byte"], DomainSums()
        for domain in sums.values():
            whole.add(domain)
        cells = [f"{values[key]:.4f}" for key in scores]
        cells += [f"{whole.perplexity:,.2f}", *(f"{getattr(whole, key):,}" for key in counts)]
        table.add_row(escape(label), *cells)
    show_table(table)

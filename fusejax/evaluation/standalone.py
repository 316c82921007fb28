"""`fusejax evaluate MODEL ... --corpus PATH`: bits per byte of any models on any text, without a job."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import tee
from typing import Any

import jax.numpy as jnp
from rich.table import Table

from fusejax import models, outputs, preflight, settings, sharding, tokenizers
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.corpus import Document, encode, read_documents
from fusejax.corpus import check as check_corpus
from fusejax.errors import UserError
from fusejax.evaluation import ensemble
from fusejax.evaluation.perplexity import DomainSums, measure, numbers, resolve_stride
from fusejax.progress import console, say
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
    return [settings.check({"model": name}, ModelConfig, "evaluate") for name in names]


def labels_of(given: Sequence[ModelConfig]) -> list[str]:
    """How tables call the models: by the last part of the name if that tells them apart. UserError for one twice."""
    labels = [model.label for model in given]
    if len(set(labels)) < len(labels):
        labels = [model.model for model in given]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"evaluate: {label} is named twice")
    return labels


def _check(model: ModelConfig, max_length: int | None, stride: int | None) -> None:
    """UserError for what would fail once the model is loaded, as far as its files are here."""
    preflight.check_model(model)
    folder = preflight.folder_of(model)
    if max_length is not None:
        preflight.check_length(model, max_length, "--max-length")
    elif folder is not None:
        max_length = models.read_config(folder)[1].max_length
    if max_length is not None:
        resolve_stride(stride, max_length)


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
    labels = labels_of(given)
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
    show(results)
    if json_path is not None:
        values = {label: numbers(sums) for label, sums in results.items()}
        outputs.write_atomically(json_path, json.dumps(values, indent=2) + "\n")
        say(f"evaluate: {json_path}")


def show(results: dict[str, dict[str, DomainSums]]) -> None:
    """The table: bits per byte of each domain, and what was counted."""
    domains = list(next(iter(results.values())))
    averaged = len(domains) > 1
    table = Table("model", *domains, *(["average"] if averaged else []), "perplexity", "tokens", "bytes", "documents",
                  title="bits per byte, lower is better")  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for label, sums in results.items():
        values = numbers(sums)["bits_per_byte"]
        whole = DomainSums()
        for s in sums.values():
            whole.add(s)
        cells = [f"{values[key]:.4f}" for key in (*domains, *(["average"] if averaged else []))]
        cells += [f"{whole.perplexity:.2f}", f"{whole.tokens:,}", f"{whole.bytes:,}", f"{whole.documents:,}"]
        table.add_row(label, *cells)
    console.print(table)

"""`--dry-run` and `fusejax plan`: what a job will do, how many tokens, how much disk; nothing is fetched or written.

Token counts come from the corpus where it is on this machine, else from `corpus.expected_tokens`; parameter counts from
the models' own configurations where they are here, else from the size in their names, and the plan says which.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from rich.table import Table

from fusejax import models, preflight, tokenizers
from fusejax.config import Config, ModelConfig
from fusejax.corpus import Document, encode, local_size, read_documents, split_document
from fusejax.errors import UserError
from fusejax.models import published
from fusejax.packing import pack
from fusejax.progress import console, say, warn

BYTES_PER_TOKEN = 4.0  # of text, in a tokenizer that is not on this machine
_SAMPLE, _LOOKED_AT = 200, 4000  # documents: so many, evenly over the first of the corpus


@dataclass(frozen=True)
class Size:
    """A model's parameters, its vocabulary, and how both are known."""

    parameters: float
    vocab: int
    known_by: str


def known_shape(model: ModelConfig) -> tuple[models.DecoderConfig | None, str]:
    """(the shape of a model, None where it is not known without asking a hub; how it is known)."""
    folder = preflight.folder_of(model)
    if folder is not None:
        return models.read_config(folder)[1], "by its config.json"
    if model.model.startswith((".", "/", "~")):
        raise UserError(f"{model.model}: no such folder")
    keys = published.CONFIGS.get(model.model)
    return (models.decoder_config(keys, model.model), "by its published sizes") if keys else (None, "")


def model_size(model: ModelConfig) -> Size:
    """From the configuration where the model is on this machine, else from its name ("...-7b")."""
    shape, known_by = known_shape(model)
    if shape is not None:
        return Size(models.count_parameters(shape), shape.vocab_size, known_by)
    found = re.search(r"(?<![\d.x])(\d+(?:\.\d+)?)\s*([bm])(?![a-z0-9])", model.model.lower())
    if not found:
        return Size(float("nan"), 65536, "unknown until it is fetched")
    return Size(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]], 65536, "by its name")


def corpus_tokens(config: Config) -> tuple[float, str]:
    """(tokens of the training corpus, how that is known)."""
    size = local_size(config.corpus)
    if size is not None:
        ratio = _bytes_per_token(config)
        return size / ratio, f"{size / 1e6:.1f} MB of text on this machine, {ratio:.1f} bytes a token"
    if config.corpus.expected_tokens is None:
        return float("nan"), "unknown until the corpus is fetched; set corpus.expected_tokens for a plan"
    return float(config.corpus.expected_tokens), "corpus.expected_tokens"


def _sample(config: Config) -> list[Document]:
    first = list(islice(read_documents(config.corpus), _LOOKED_AT))
    return first[:: max(1, len(first) // _SAMPLE)]


def _lengths(config: Config, documents: Sequence[Document]) -> np.ndarray:
    return np.array([len(tokens["ids"]) for tokens in encode(tokenizers.for_model(config.target), documents)])


def _bytes_per_token(config: Config) -> float:
    """Of some documents in the target's tokenizer, where that is on this machine."""
    if preflight.folder_of(config.target) is None:
        return BYTES_PER_TOKEN
    documents = _sample(config)
    size = sum(len((document.conversation or document.text).encode("utf-8")) for document in documents)
    return size / max(_lengths(config, documents).sum(), 1)


def filled(config: Config) -> float | None:
    """The share of the training sequences that some documents fill, cut and packed as in the job; None where that is
    not known: of conversations, which are not cut, and where the corpus or a tokenizer that cuts is not here."""
    here = [preflight.folder_of(model) is not None for model in (config.target, *config.sources)]
    if not all(here) or config.corpus.messages_key is not None or local_size(config.corpus) is None:
        return None
    known = list(tokenizers.for_config(config).values())
    parts = [part for each in _sample(config) for part in split_document(each, known, config.max_length)]
    lengths, target = _lengths(config, parts), tokenizers.for_model(config.target)
    sequences = len(pack(lengths + target.added, config.max_length, 0, 0, config.batch.packed))
    return lengths.sum() / max(1, sequences * config.max_length)


def top_k(config: Config, source: ModelConfig) -> int:
    """How many entries of each distribution a source's cache keeps."""
    return source.top_k or config.cache.top_k


def cached_bytes(config: Config, source: ModelConfig, vocab: int) -> int:
    """Of one token in a source's cache."""
    k, value_bytes = top_k(config, source), np.dtype(config.cache.values).itemsize
    if config.cache.kind == "sampled":  # about 12 distinct tokens of 50 draws
        k, value_bytes = min(config.cache.rounds, 12), 1
    return k * ((2 if vocab <= 65536 else 4) + value_bytes) + 4


def show(config: Config) -> None:
    """Print the plan. Raises UserError where a local model or corpus is missing or of no use."""
    from fusejax import training
    from fusejax.evaluation import baselines

    preflight.check(config)
    tokens, known_by = corpus_tokens(config)
    share = filled(config)
    target = model_size(config.target)
    sources = [(source, model_size(source)) for source in config.sources]
    batch = config.batch.sequences * config.max_length
    steps = config.batch.steps or max(1.0, tokens / (share or 1.0) / batch) * config.batch.epochs
    exact = config.batch.steps is not None or math.isnan(tokens)
    # Documents do not fill every sequence.
    about = "" if exact else "about " if share else "at least "
    say(f"tokens of the corpus: {readable_number(tokens)} ({known_by})")
    shape = f"{config.batch.sequences} sequences x {config.max_length} tokens"
    say(f"training: {about}{readable_number(steps)} steps of {shape}")

    table = Table("stage", "work", "disk")
    total = 0.0

    def row(stage: str, work: str, disk: float) -> None:
        nonlocal total
        total += disk
        table.add_row(stage, work, readable_bytes(disk))

    row(
        "prepare",
        f"tokenize for up to {1 + len(sources)} tokenizers",
        tokens * (4 + 8 * (1 + len(sources))),
    )
    for source, size in sources:
        what = f"{config.cache.rounds} draws" if config.cache.kind == "sampled" else f"top-{top_k(config, source)}"
        work = f"{readable_number(size.parameters)} parameters ({size.known_by}), {what}"
        row(f"source {source.label}", work, tokens * cached_bytes(config, source, size.vocab))
    for source, _ in sources:
        row(
            f"align {source.label}",
            f"rows {config.alignment.rows}, tokens {config.alignment.tokens}",
            tokens * 8,
        )
    state = target.parameters * 4 * 3 * (config.checkpoint.keep + 1)  # parameters and two moments, float32
    trained = [name for name in config.evaluation.baselines if name in baselines.TRAINED]
    for name in [*training.runs(config), *trained]:
        what = f"{readable_number(tokens * config.batch.epochs if not config.batch.steps else steps * batch)} tokens"
        row(f"train {name}", f"{what}, {readable_number(target.parameters)} parameters", state)
        row(f"export {name}", "Hugging Face folder", target.parameters * 4)
    if config.fusion.merge is not None:
        row("merge pairs", f"{config.fusion.merge.method} of {len(config.partners)} copies", target.parameters * 4)
    if "merge" in config.evaluation.baselines:
        row("merge", "mean of the sources' weights, where they fit", target.parameters * 4)
    row(
        "evaluate",
        "bits per byte, held-out documents" if config.evaluation.corpus else "no evaluation.corpus: skipped",
        0.0,
    )
    row("report", "report.json, report.html", 2e6)
    console.print(table)
    if config.attention in ("splash", "cudnn") or {"tpu", "gpu"} & set(config.kernels.model_dump().values()):
        try:
            preflight.check_devices(config)
        except UserError as error:  # the job may be meant for another machine than the plan
            warn(f"this machine cannot run the job: {error}")
    say(f"disk needed: {readable_bytes(total)} in {config.folder}")
    unseen = [model.model for model in (config.target, *config.sources) if preflight.folder_of(model) is None]
    if unseen:
        say("checked: every key. Not checked, as they are not on this machine: " + ", ".join(dict.fromkeys(unseen)))


_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def readable_number(value: float) -> str:
    if value != value:
        return "?"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{value:.0f}"


def readable_bytes(value: float) -> str:
    if value != value:
        return "?"
    unit, size = next(((unit, size) for unit, size in _BYTES if value >= size), ("B", 1.0))
    return f"{value / size:.1f} {unit}"

"""The stage `sources`: every source model runs over the training documents once and leaves its next-token rows.

`sources/<label>` is a store in the documents' order, see `fusejax.source_cache` for its records. Row t of a document is
the distribution of token t + 1 of the n text tokens that the source's own tokenizer makes of it; the last row's label
is EOS (its ce is 0 where the tokenizer has no EOS). A BOS that the source was trained with is put in front; its row is
not stored. Everything is in the source's own vocabulary: a cache serves every target.

Embedding rows beyond the tokenizer's vocabulary (padding to a round number) stand for no text; they get probability 0,
so that no stored id lies outside the tokenizer.

A document on which the source gives values that are not numbers (an overflow, a damaged row of the embedding) gets no
rows: it falls back for this source, is counted, and cannot reach its neighbours, since no two documents share a row.
"""

import json
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusejax import corpus, distributed, hosts, models, sharding, tokenizers
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.outputs import fingerprint
from fusejax.progress import progress, say
from fusejax.scoring import Draws, Group, Scorer, Scores, check_fits, inputs_and_labels
from fusejax.source_cache import Record, Values, entries, folder_of, holds_more, sampled_record, topk_record
from fusejax.splitting import room
from fusejax.store import Store, StoreWriter, read_manifest
from fusejax.tokenizers import Tokenizer

_SHARD_TOKENS = 1 << 16  # a shard is what a kill can cost
_BROKEN_SHARE = 0.5  # a source that fails on more than this share of a shard is damaged


def run(config: Config) -> None:
    """Make every source's cache that is not there yet; a half-done one goes on at its first missing shard.

    Raises UserError where a cache was made from another text, tokenizer or model (naming which), where a tokenizer does
    not fit its model, and where a model gives values that are not numbers.
    """
    for source in config.sources:
        _cache(config, source)


def inputs(config: Config, source: ModelConfig, tokenizer: Tokenizer) -> dict[str, str | int]:
    """What determines a cache's contents, but for the model's weights."""
    return {
        "text": fingerprint(corpus.documents(config).inputs),
        "tokenizer": tokenizer.fingerprint,
        **kind(config, source),
        "max_length": config.max_length,
        "compute": config.precision.compute,
    }


def kind(config: Config, source: ModelConfig) -> dict[str, str | int]:
    """What is kept of each distribution."""
    if config.cache.kind == "sampled":
        return {"kind": "sampled", "rounds": config.cache.rounds, "seed": config.seed}
    return {"top_k": source.top_k or config.cache.top_k, "values": config.cache.values}


def _cache(config: Config, source: ModelConfig) -> None:
    tokenizer = tokenizers.for_model(source)
    folder = folder_of(config, source)
    source = _with_its_entries(config, source)
    tokens = Store(config.folder / "data/train/tokens" / tokenizer.fingerprint)
    made_from = inputs(config, source, tokenizer) | {"model": models.fingerprint(source.model, source.revision)}
    writer = StoreWriter(folder, made_from, len(tokens), shard_records(tokens, config.max_length))
    # Process 0 says, since a late one could find shards there that this very run has made.
    if distributed.tell(f"source {source.label}: done", "yes" if writer.done else "no") == "yes":
        say(f"source {source.label}: done before, skipped")
        return
    if any("imported" in note for note in writer.notes(NOTE)):
        raise UserError(f"{folder}: holds a part of an import: run `fusejax import` again, or remove that folder")
    todo = _todo(config, writer, source.label)
    if todo:
        _run_model(config, source, tokenizer, tokens, writer, todo)
    hosts.wait_for_all(f"source {source.label}")
    distributed.alone(f"source {source.label}: manifest", lambda: finish(source, tokens, writer))


# What a shard's note counts.
NOTE: dict[str, Any] = dict.fromkeys(("rows", "empty", "one_token", "full", "broken", "width"), int) | {
    "first_broken": str | None
}


def _todo(config: Config, writer: StoreWriter, label: str) -> list[tuple[int, range]]:
    """The shards that this process computes: its own, or, where all compute together, all that process 0 misses.

    What a shard holds does not depend on how many processes there are.
    """
    if config.cache.mesh == "process":
        return hosts.own(writer.missing())
    spans = [(shard, span.start, span.stop) for shard, span in writer.missing()]
    told = json.loads(distributed.tell(f"source {label}: shards", json.dumps(spans)))
    return [(shard, range(start, stop)) for shard, start, stop in told]


def _with_its_entries(config: Config, source: ModelConfig) -> ModelConfig:
    """The source, with the top_k of its cache where that was begun with more than the job uses: it is kept so."""
    manifest, k = read_manifest(folder_of(config, source)), source.top_k or config.cache.top_k
    if config.cache.kind != "topk" or manifest is None or not holds_more(manifest["inputs"], manifest["summary"], k):
        return source
    there = manifest["inputs"]["top_k"]
    say(f"source {source.label}: its cache is of {there} entries a row, of which this job uses the first {k}")
    return source.model_copy(update={"top_k": there})


def finish(source: ModelConfig, tokens: Store, writer: StoreWriter, more: Mapping[str, str] | None = None) -> None:
    """Mark a cache complete, with counts and versions in its manifest."""
    counts = _total(writer.notes(NOTE))
    odd = {"empty": "empty", "one_token": "of one token", "full": "as long as max_length"}
    said = ", ".join(f"{counts[key]} {what}" for key, what in odd.items() if counts[key])
    say(f"source {source.label}: {counts['rows']} rows of {len(tokens)} documents" + (f" ({said})" if said else ""))
    if counts["broken"]:
        say(
            f"source {source.label}: gave values that are not numbers on {counts['broken']} of {len(tokens)} "
            f"documents, the first being {counts['first_broken']}; these fall back"
        )
    versions = {name: version(name) for name in ("jax", "flax", "transformers")}
    described = {"model": source.model, "label": source.label, "documents": len(tokens)}
    writer.finish(described | counts | versions | dict(more or {}))


def _total(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """The shards' counts added up, and the first broken document's id."""
    totals = {name: sum(note[name] for note in notes) for name in ("rows", "empty", "one_token", "full", "broken")}
    totals["width"] = max((note["width"] for note in notes), default=0)
    first = next((note["first_broken"] for note in notes if note["first_broken"]), None)
    return totals | ({"first_broken": first} if first else {})


def shard_records(tokens: Store, max_length: int) -> int:
    """Documents of a shard: about `_SHARD_TOKENS` tokens by the first documents' lengths, and the same in every run."""
    sample = [len(tokens[i]["ids"]) for i in range(min(len(tokens), 64))]
    mean = max(float(np.mean(sample)) if sample else max_length, 1.0)
    return int(np.clip(_SHARD_TOKENS / mean, 16, 4096))


def _run_model(
    config: Config,
    source: ModelConfig,
    tokenizer: Tokenizer,
    tokens: Store,
    writer: StoreWriter,
    todo: list[tuple[int, range]],
) -> None:
    """Load the model and write the shards `todo`."""
    mesh = sharding.sources_mesh(config)
    sharding.check_kernels(config.kernels, mesh)
    compute = jnp.dtype(config.precision.compute)
    model = models.load(
        source.model, mesh=mesh, dtype=compute, compute_dtype=compute, revision=source.revision,
        attention=config.attention,
    )  # fmt: skip
    check_fits(tokenizer, model.config.vocab_size, source.model)
    known = min(model.config.vocab_size, tokenizer.vocab_size)
    sampled = config.cache.kind == "sampled"
    top_k = 0 if sampled else source.top_k or config.cache.top_k
    if top_k > known:
        raise UserError(f"cache.top_k: {top_k} is more than the {known} tokens of {source.model}")
    scorer = Scorer(
        model,
        k=top_k,
        vocab_size=known,
        max_length=config.max_length,
        batch_tokens=config.cache.batch_tokens,
        mesh=mesh,
        draws=Draws(config.cache.rounds, config.seed) if sampled else None,
        implementation=config.kernels.topk_unembed,
    )
    documents = Store(config.folder / "data/train/documents")
    write_rows(scorer, tokenizer, tokens, writer, todo, known, config.cache.values, source, documents)


def write_rows(
    scorer: Scorer,
    tokenizer: Tokenizer,
    tokens: Store,
    writer: StoreWriter,
    todo: list[tuple[int, range]],
    vocab_size: int,
    values: Values,
    source: ModelConfig,
    documents: Store,
) -> None:
    """The scores of the shards `todo`, each written on a thread while the device is at the next."""
    front = int(tokenizer.adds_bos)
    started, n_tokens = time.monotonic(), 0
    with (
        progress(f"source {source.label}", sum(len(span) for _, span in todo)) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        writes: deque[Future[None]] = deque()
        groups = (Group(shard, *_lines(tokens, span, tokenizer), span.start) for shard, span in todo)
        for (shard, span), (_, results) in zip(todo, groupby(scorer.stream(groups), itemgetter(0)), strict=True):
            records: list[Record] = [{} for _ in span]
            note = Note(room(tokenizer, scorer.max_length))
            for _, places, all_scores in results:
                for place, scores in zip(places, all_scores, strict=True):
                    text_rows = Scores(*(array[front:] for array in scores))
                    records[place] = note.record(span[place], text_rows, vocab_size, values)
                    n_tokens += len(text_rows.ce)
                bar.advance(len(places), f"{n_tokens / (time.monotonic() - started):,.0f} tokens/s")
            about = note.finish(documents, source)
            if hosts.is_own(shard):  # each is, but where all processes compute together
                writes.append(pool.submit(writer.write, shard, records, about))
            if len(writes) > 1:
                writes.popleft().result()
        while writes:
            writes.popleft().result()


def _lines(tokens: Store, span: range, tokenizer: Tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The inputs and the labels of a shard's documents."""
    lines = [inputs_and_labels(tokens[i]["ids"], tokenizer) for i in span]
    return [line[0] for line in lines], [line[1] for line in lines]


class Note:
    """Counts over a shard's documents."""

    def __init__(self, most: int) -> None:
        """most: text tokens of a document that is as long as max_length."""
        self._most = most
        self._documents = self._rows = self._empty = self._one_token = self._full = 0
        self._broken: list[int] = []
        self._width = 0

    def record(self, document: int, scores: Scores, vocab_size: int, values: Values) -> Record:
        """The record of a document, which is counted. One with values that are not numbers has no rows."""
        n = len(scores.ce)
        self._documents += 1
        self._empty += n == 0
        self._one_token += n == 1
        self._full += n == self._most
        if scores.broken:
            self._broken.append(document)
            scores = Scores(*(array[:0] for array in scores))
        self._rows += len(scores.ce)
        if not scores.logprobs.shape[1]:
            record = sampled_record(scores.ids, scores.ce, vocab_size)
        else:
            record = topk_record(*scores, vocab_size, values)
        self._width = max(self._width, entries(record))
        return record

    def finish(self, documents: Store, source: ModelConfig) -> dict[str, Any]:
        """The counts. Raises UserError where the source failed on most documents."""
        first = documents[min(self._broken)]["id"] if self._broken else None
        if len(self._broken) > _BROKEN_SHARE * self._documents:
            raise UserError(
                f"{source.model}: gives values that are not numbers on {len(self._broken)} of {self._documents} "
                f"documents, the first being {first}; its weights are damaged, or precision.compute should be float32"
            )
        return {
            "rows": self._rows,
            "width": self._width,
            "empty": self._empty,
            "one_token": self._one_token,
            "full": self._full,
            "broken": len(self._broken),
            "first_broken": first,
        }

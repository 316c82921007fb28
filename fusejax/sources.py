"""The stage `sources`: every source model runs over the training documents once and leaves its top-k distributions.

`sources/<label>` is a store in the documents' order. Record i, for the n text tokens that the source's own tokenizer
makes of document i: ids uint16 or uint32 [n, k], logprobs float16 or float32 [n, k] (the source's true
log-probabilities, descending), ce float32 [n] (nats, of the true next token). Row t is the distribution of token t + 1;
the last row's label is EOS (its ce is 0 where the tokenizer has no EOS). A BOS that the source was trained with is put
in front; its row is not stored. Everything is in the source's own vocabulary: a cache serves every target.

Embedding rows beyond the tokenizer's vocabulary (padding to a round number) stand for no text; they get probability 0,
so that no stored id lies outside the tokenizer.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusejax import models, sharding, tokenizers
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.progress import progress, say
from fusejax.scoring import Scorer, Scores, check_fits, inputs_and_labels
from fusejax.store import Store, StoreWriter, fingerprint
from fusejax.tokenizers import Tokenizer

_SHARD_TOKENS = 1 << 16  # a shard is what a kill can cost
_LEAST_LOGPROB = -60000.0  # float16 ends at -65504


def run(config: Config) -> None:
    """Make every source's cache that is not there yet; a half-done one goes on at its first missing shard.

    Raises UserError where a cache was made from another text, tokenizer or model (naming which), where a tokenizer does
    not fit its model, and where a model gives values that are not numbers.
    """
    for source in config.sources:
        _cache(config, source)


def inputs(config: Config, source: ModelConfig, tokenizer: Tokenizer) -> dict[str, str | int]:
    """What determines a cache's contents, but for the model's weights."""
    documents = Store(config.folder / "data/train/documents")
    return {
        "text": fingerprint(documents.inputs),
        "tokenizer": tokenizer.fingerprint,
        "top_k": config.cache.top_k,
        "values": config.cache.values,
        "max_length": config.max_length,
        "compute": config.precision.compute,
    }


def _cache(config: Config, source: ModelConfig) -> None:
    tokenizer = tokenizers.for_model(source)
    folder = config.folder / "sources" / source.label
    tokens = Store(config.folder / "data/train/tokens" / tokenizer.fingerprint)
    made_from = inputs(config, source, tokenizer) | {"model": models.fingerprint(source.model, source.revision)}
    writer = StoreWriter(folder, made_from, len(tokens), _shard_records(tokens, config.max_length))
    if writer.done:
        say(f"source {source.label}: done before, skipped")
        return
    todo = writer.missing()
    if todo:
        _run_model(config, source, tokenizer, tokens, writer, todo)
    writer.finish({"model": source.model, "label": source.label, "documents": len(tokens)})


def _shard_records(tokens: Store, max_length: int) -> int:
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
    """Load the model and write the shards `todo`, each on a thread while the device is at the next."""
    mesh = sharding.make_mesh(config.mesh)
    compute = jnp.dtype(config.precision.compute)
    model = models.load(source.model, mesh=mesh, dtype=compute, compute_dtype=compute, revision=source.revision)
    rows = model.config.vocab_size
    check_fits(tokenizer, rows, source.model)
    known = min(rows, tokenizer.vocab_size)
    if config.cache.top_k > known:
        raise UserError(f"cache.top_k: {config.cache.top_k} is more than the {known} tokens of {source.model}")
    scorer = Scorer(
        model,
        k=config.cache.top_k,
        vocab_size=known,
        max_length=config.max_length,
        batch_tokens=config.cache.batch_tokens,
        mesh=mesh,
    )
    ids_dtype = np.uint16 if known <= 1 << 16 else np.uint32
    values_dtype = np.dtype(config.cache.values)
    started, n_tokens = time.monotonic(), 0
    with (
        progress(f"source {source.label}", sum(len(span) for _, span in todo)) as bar,
        ThreadPoolExecutor(1) as pool,
    ):
        writes: deque[Future[None]] = deque()
        for shard, span in todo:
            records: list[dict[str, np.ndarray]] = [{} for _ in span]
            for i, scores in _scores(scorer, tokenizer, tokens, span, config, source):
                records[i] = _record(scores, ids_dtype, values_dtype)
                n_tokens += len(scores.ce)
                bar.advance(1, f"{n_tokens / (time.monotonic() - started):,.0f} tokens/s")
            writes.append(pool.submit(writer.write, shard, records))
            if len(writes) > 1:
                writes.popleft().result()
        while writes:
            writes.popleft().result()


def _scores(
    scorer: Scorer, tokenizer: Tokenizer, tokens: Store, span: range, config: Config, source: ModelConfig
) -> Iterator[tuple[int, Scores]]:
    """(place in the shard, the text rows' scores) of the documents of a shard, in the device's order."""
    lines = [inputs_and_labels(tokens[i]["ids"], tokenizer) for i in span]
    front = int(tokenizer.adds_bos)
    broken = []
    for places, all_scores in scorer([line[0] for line in lines], [line[1] for line in lines]):
        for place, scores in zip(places, all_scores, strict=True):
            text_rows = Scores(*(array[front:] for array in scores))
            if text_rows.broken:
                broken.append(span[place])
            yield place, text_rows
    if broken:
        first = Store(config.folder / "data/train/documents")[min(broken)]["id"]
        raise UserError(
            f"{source.model}: gives values that are not numbers on {len(broken)} of {len(span)} documents, the first "
            f"being {first}; its weights are damaged, or precision.compute should be float32"
        )


def _record(scores: Scores, ids_dtype: Any, values_dtype: np.dtype) -> dict[str, np.ndarray]:
    # Rounding can lift a sure token's log-probability above 0.
    logprobs = np.clip(scores.logprobs, _LEAST_LOGPROB, 0.0).astype(values_dtype)
    return {"ids": scores.ids.astype(ids_dtype), "logprobs": logprobs, "ce": scores.ce.astype(np.float32)}

"""The source caches on disk: how a source's next-token rows are written into a store, and read back.

A row of the kind `topk` is the k most likely next tokens and their log-probabilities, most likely first; one of the
kind `sampled` is every token that came up in R independent draws, and how often, most often first. With each goes the
cross-entropy of the true next token. Arrays on disk, n rows to a document:

    topk     ids uint16 or uint32 [n, k]    logprobs float16 or float32 [n, k], or codes uint8 [n, k]    ce float32 [n]
    sampled  ids uint16 or uint32 [u]       counts uint8 [u]    distinct uint8 [n] (tokens of each row)  ce float32 [n]

A document on which the source gave values that are not numbers has no rows, whatever its length.

Ids take 16 bits where the vocabulary allows it, else 32: the store's shards are compressed (zstd), which leaves 18.7 of
the 40 bytes of ten such ids; packing them to 18 bits first left 18.5, and costs time at every read.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.store import Store

Values = Literal["float16", "float32", "uint8"]
Record = dict[str, np.ndarray]

_LEAST_LOGPROB = -60000.0  # float16 ends at -65504
_SHIFT, _LEAST_CODED = 0.5, -40.0
_STEP = np.log1p(-_LEAST_CODED / _SHIFT) / 255


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """8-bit codes, uint8, of log-probabilities x ≤ 0: c = round(255 · log(1 − x/s) / log(1 + 40/s)), s = 1/2.

    The steps grow with |x|, since what matters is the error of the probability: the error of x is at most
    0.0086 · (s − x), so that of exp(x) is at most 0.0053 anywhere (worst near x = −1/2), and x = 0 stays exact.
    Order is kept. Below −40 (a probability of 4e-18) everything is −40.

    >>> decode_logprobs(encode_logprobs(np.array([0.0, -0.105, -2.3]))).round(3).tolist()
    [0.0, -0.104, -2.304]
    """
    x = np.clip(logprobs, _LEAST_CODED, 0.0).astype(np.float64)
    return np.rint(np.log1p(-x / _SHIFT) / _STEP).astype(np.uint8)


_DECODED = (-_SHIFT * np.expm1(np.arange(256) * _STEP)).astype(np.float32)


def decode_logprobs(codes: np.ndarray) -> np.ndarray:
    """float32 log-probabilities of uint8 codes of any shape."""
    return _DECODED[codes]


def ids_dtype(vocab_size: int) -> np.dtype:
    """The stored dtype of ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def topk_record(ids: np.ndarray, logprobs: np.ndarray, ce: np.ndarray, vocab_size: int, values: Values) -> Record:
    """The record of a document: ids int [n, k], logprobs float [n, k] descending, ce float [n]."""
    record = {"ids": ids.astype(ids_dtype(vocab_size)), "ce": ce.astype(np.float32)}
    # Rounding can lift a sure token's log-probability above 0.
    bounded = np.clip(logprobs, _LEAST_LOGPROB, 0.0)
    if values == "uint8":
        return record | {"codes": encode_logprobs(bounded)}
    return record | {"logprobs": bounded.astype(values)}


def sampled_record(draws: np.ndarray, ce: np.ndarray, vocab_size: int) -> Record:
    """The record of a document: draws int [n, R], R at most 255, ce float [n]."""
    n, R = draws.shape
    ordered = np.sort(draws, axis=-1)
    begins = np.concatenate([np.ones((n, 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    starts = np.flatnonzero(begins)
    counts = np.diff(starts, append=n * R)
    row = starts // R
    order = np.lexsort((ordered.ravel()[starts], -counts, row))
    return {
        "ids": ordered.ravel()[starts][order].astype(ids_dtype(vocab_size)),
        "counts": counts[order].astype(np.uint8),
        "distinct": begins.sum(-1).astype(np.uint8),
        "ce": ce.astype(np.float32),
    }


def _decode_sampled(record: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    distinct = record["distinct"].astype(np.int64)
    filled = np.arange(distinct.max(initial=1)) < distinct[:, None]
    ids = np.full(filled.shape, -1, np.int32)
    ids[filled] = record["ids"]
    counts = np.zeros(filled.shape, np.float32)
    counts[filled] = record["counts"]
    with np.errstate(divide="ignore"):
        return ids, np.log(counts / np.maximum(counts.sum(-1, keepdims=True), 1))


def entries(record: Mapping[str, np.ndarray]) -> int:
    """Entries of a record's widest row."""
    return int(record["distinct"].max(initial=0)) if "distinct" in record else record["ids"].shape[1]


def decode(record: Mapping[str, np.ndarray]) -> Record:
    """{ids int32 [n, k], logprobs float32 [n, k], ce float32 [n]} of a record; −1 and −inf are empty entries."""
    if "distinct" in record:
        ids, logprobs = _decode_sampled(record)
        return {"ids": ids, "logprobs": logprobs, "ce": record["ce"]}
    if "codes" in record:
        logprobs = decode_logprobs(record["codes"])
        # Coarse codes can add up to a little more than 1.
        mass = np.log(np.exp(logprobs).sum(-1, keepdims=True))
        logprobs = logprobs - np.maximum(mass, 0.0)
    else:
        logprobs = record["logprobs"].astype(np.float32)
    return {"ids": record["ids"].astype(np.int32), "logprobs": logprobs, "ce": record["ce"]}


def folder_of(config: Config, source: ModelConfig) -> Path:
    """Where a job keeps a source's cache."""
    return config.folder / "sources" / source.label


def holds_more(inputs: Mapping[str, Any], summary: Mapping[str, Any], top_k: int) -> bool:
    """Whether a cache with this manifest serves a job that uses the first top_k entries of its rows."""
    return "imported" not in summary and inputs.get("top_k", 0) > top_k


def first_entries(record: Mapping[str, np.ndarray], k: int) -> Record:
    """The record (of the kind `topk`) that a cache of k entries a row would hold: a row's first ones are the likeliest.

    >>> record = topk_record(np.array([[7, 3]]), np.log([[0.5, 0.25]]), np.ones(1), 9, "float32")
    >>> first_entries(record, 1)["ids"].tolist()
    [[7]]
    """
    return {name: array[:, :k] if array.ndim == 2 else array for name, array in record.items()}


class SourceCache(Store):
    """A source's cache; `cache[i]` is document i's rows, decoded (see `decode`).

    Asked for fewer entries than its rows hold, it is in every respect, `inputs` included, the cache that was made with
    so few. Imported rows are not: their probabilities add up to 1.
    """

    def __init__(self, folder: str | os.PathLike, top_k: int | None = None) -> None:
        super().__init__(folder)
        self._top_k = top_k if top_k and holds_more(self.inputs, self.summary, top_k) else None
        if self._top_k:
            self.inputs = self.inputs | {"top_k": self._top_k}

    @classmethod
    def of(cls, config: Config, source: ModelConfig) -> "SourceCache":
        """The cache of a job's source, with as many entries a row as the job uses."""
        return cls(folder_of(config, source), source.top_k or config.cache.top_k)

    @property
    def width(self) -> int:
        """Entries of the widest row of all."""
        return min(self.summary["width"], self._top_k or self.summary["width"])

    def __getitem__(self, i: int) -> Record:
        record = super().__getitem__(i)
        return decode(first_entries(record, self._top_k) if self._top_k else record)

    def require_token_ce(self) -> None:
        """UserError unless every row has its own token's cross-entropy; imported rows have their document's."""
        if "imported" in self.summary:
            raise UserError(
                f"{self.folder}: was imported and has one cross-entropy a document; set alignment.gold_chain to false "
                "and fusion.level to document"
            )

"""Bits per byte of an ensemble: what several models give together, without training.

Tokenizers that cut text alike: at each token, with p_i the probability of model i and weights w_i that sum to 1,

    probability:      p = Σ w_i p_i(token)
    log_probability:  p = Π p_i(token)^w_i / Σ_v Π p_i(v)^w_i

both exact. The second needs whole distributions, which are summed up on the host for as many tokens at a time as fit
into a fixed size.

Different tokenizers: a text is cut where every model has a token that ends there (their common byte boundaries).
Between two such cuts, model i gives the text the product of its probabilities of its own true tokens there, given all
text before, and the ensemble gives it Σ w_i of these products. With one tokenizer this is `probability`. It is the
likelihood of the models' own tokenizations of the text, as is every model's bits per byte. Because cuts depend on
where later tokens end, the mixture can in principle give all texts together slightly more than 1. Averages of
logarithms have no such definition, since they would have to be scaled over all texts that could stand between two
cuts.

What is scored begins at the first common boundary at or after every model's first prediction. The models run one after
another; of each, one number per token is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fusejax import arguments, scoring, sharding
from fusejax.errors import UserError
from fusejax.evaluation.perplexity import (
    DomainSums,
    needed_tokens,
    require_bytes,
    require_number,
    resolve_stride,
    scored_span,
    spoken_losses,
    token_losses,
    windowed,
)
from fusejax.progress import progress
from fusejax.store import Store
from fusejax.tokenizers import Tokenizer

Average = Literal["probability", "log_probability"]

_HOST_BYTES = 1 << 30  # of whole distributions, for `log_probability`


@dataclass(frozen=True)
class Member:
    """A model of an ensemble, loaded only when its turn comes.

    tokens: for each document "ids" int32 [n] and "boundaries" int32 [n], made by its own `tokenizer`.
    """

    name: str
    tokenizer: Tokenizer
    tokens: Sequence[dict[str, Any]] | Store
    load: Callable[[], Any]  # a Decoder


def measure_ensemble(
    members: Sequence[Member],
    documents: Sequence[dict[str, Any]] | Store,
    *,
    weights: Sequence[float] | None = None,
    average: Average = "probability",
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = 8192,
    mesh: Mesh | None = None,
) -> dict[str, DomainSums]:
    """The sums of every domain for the ensemble; `tokens` counts what is mixed at a time.

    documents: records with "id" and "domain". weights: one for each member, above 0; default: equal ones. The others
    as in `measure`. Raises UserError where the weights do not fit, where `log_probability` is asked of different
    tokenizers or vocabularies, and as `measure` does.
    """
    shares = shares_of([member.name for member in members], weights)
    if average == "log_probability":
        require_alike([(member.name, member.tokenizer) for member in members])
    options = {"max_length": max_length, "stride": stride, "batch_tokens": batch_tokens, "mesh": mesh}
    sums: dict[str, DomainSums] = {}
    if average == "log_probability":
        scored = _geometric(members, shares, len(documents), **options)
    else:
        scored = _arithmetic(members, shares, **options)
    for record, (nats, size, count) in zip(documents, scored, strict=True):
        require_number(nats, "ensemble", record)
        sums.setdefault(record["domain"], DomainSums()).add(DomainSums(nats, size, count, 1))
    require_bytes(sums, "ensemble")
    return sums


def shares_of(names: Sequence[str], weights: Sequence[float] | None) -> np.ndarray:
    """float64 [N], sum 1: the weights of N models, by default equal ones; UserError where they do not fit."""
    given = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(names) or not all(weight > 0 for weight in given):
        raise UserError(f"ensemble: needs one weight above 0 for each of {len(names)} models, not {given}")
    objection = arguments.weights_objection(given)
    if objection:
        raise UserError(f"ensemble: weights: {objection}")
    return np.array(given) / sum(given)


def require_alike(tokenizers: Sequence[tuple[str, Tokenizer]]) -> None:
    """UserError where the tokenizers of two models differ, so that `log_probability` has no meaning."""
    (first, known), *others = tokenizers
    for name, tokenizer in others:
        same = tokenizer.text_fingerprint == known.text_fingerprint
        if not same or tokenizer.adds_bos != known.adds_bos:
            raise UserError(
                f"ensemble: log-probabilities of {first} and {name} cannot be averaged: their tokenizers differ; use "
                "the average of probabilities"
            )


def _arithmetic(members: Sequence[Member], shares: np.ndarray, **options: Any) -> Iterator[tuple[float, int, int]]:
    """(nats, bytes, segments) of each document."""
    losses: list[list[np.ndarray]] = []
    for member in members:
        with progress(f"ensemble: {member.name}", len(member.tokens)) as bar:
            found = []
            ids = (text["ids"] for text in member.tokens)
            losses_of = token_losses(member.load(), member.tokenizer, ids, name=member.name, **options)
            for ce, text in zip(losses_of, member.tokens, strict=True):
                found.append(spoken_losses(ce, text))
                bar.advance(1)
        losses.append(found)
    for i in range(len(members[0].tokens)):
        ends = [np.asarray(member.tokens[i]["boundaries"]) for member in members]
        spans = [scored_span(member.tokenizer, end) for member, end in zip(members, ends, strict=True)]
        cuts = common_cuts(ends, [first for first, _ in spans])
        logprobs_NS = np.stack([
            segment_logprobs(end[len(end) - len(ce[i]) :], ce[i], cuts) for end, ce in zip(ends, losses, strict=True)
        ])  # fmt: skip
        mixed_S = np.logaddexp.reduce(logprobs_NS + np.log(shares)[:, None], axis=0)
        size = int(cuts[-1] - cuts[0]) if len(cuts) else 0
        yield float(-mixed_S.sum()), size, max(len(cuts) - 1, 0)


def common_cuts(ends: Sequence[np.ndarray], firsts: Sequence[int]) -> np.ndarray:
    """Sorted byte offsets at which a token of every model ends, from the first at or after every model's `firsts`.

    ends: byte boundaries of each model's tokens. Where all models predict from the beginning, 0 is one of them.
    """
    start = max(firsts)
    offered = [np.append(end, 0) if first == 0 else end for end, first in zip(ends, firsts, strict=True)]
    shared = reduce(np.intersect1d, offered, offered[0])  # also sorts, and leaves each once
    return shared[shared >= start]


def segment_logprobs(ends: np.ndarray, ce: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """float64 [cuts − 1]: the log-probability of the text between two cuts, of one model.

    ends: byte boundaries of the tokens that have a cross-entropy, ce: their cross-entropies in nats. Of tokens that end
    at the same byte, all belong to the segment that ends there.
    """
    total = np.concatenate([[0.0], np.cumsum(ce, dtype=np.float64)])
    return -np.diff(total[np.searchsorted(ends, cuts, side="right")])


def _geometric(
    members: Sequence[Member], shares: np.ndarray, n_documents: int, **options: Any
) -> Iterator[tuple[float, int, int]]:
    """(nats, bytes, tokens) of each document; as many documents at a time as `_HOST_BYTES` holds distributions of."""
    first = members[0]
    V = first.tokenizer.vocab_size
    room = max(_HOST_BYTES // (4 * V), 1)
    chunk: list[int] = []
    held = 0
    for i in range(n_documents):
        size = len(first.tokens[i]["ids"]) + 1
        if chunk and held + size > room:
            yield from _geometric_chunk(members, shares, chunk, **options)
            chunk, held = [], 0
        chunk.append(i)
        held += size
    if chunk:
        yield from _geometric_chunk(members, shares, chunk, **options)


def _geometric_chunk(
    members: Sequence[Member],
    shares: np.ndarray,
    chunk: list[int],
    *,
    max_length: int,
    stride: int | None,
    batch_tokens: int,
    mesh: Mesh | None,
) -> Iterator[tuple[float, int, int]]:
    first = members[0]
    texts = [first.tokens[i] for i in chunk]
    stride = resolve_stride(stride, max_length)
    inputs, labels, owners = windowed([text["ids"] for text in texts], first.tokenizer, max_length, stride)
    batch_tokens = needed_tokens(inputs, max_length, batch_tokens)
    mesh = sharding.make_mesh() if mesh is None else mesh
    summed: list[np.ndarray] = []
    for member, share in zip(members, shares, strict=True):
        decoder = member.load()
        known = decoder.config.vocab_size
        scoring.check_fits(member.tokenizer, decoder.config.vocab_size, member.name)
        for at, logprobs in _distributions(decoder, inputs, max_length, batch_tokens, mesh):
            if not summed:
                summed = [np.zeros(0, np.float32)] * len(inputs)
            if not len(summed[at]):
                summed[at] = np.zeros((len(inputs[at]), known), np.float32)
            if summed[at].shape[1] != known:
                raise UserError(
                    f"ensemble: {member.name} knows {known} tokens, {first.name} {summed[at].shape[1]}; "
                    "use the average of probabilities"
                )
            summed[at] += np.float32(share) * logprobs
    nats, counts = np.zeros(len(chunk)), np.zeros(len(chunk), int)
    for logits_LV, label_L, (document, counted) in zip(summed, labels, owners, strict=True):
        scores_LV, label_L = logits_LV[counted:].astype(np.float64), label_L[counted:]
        top_L = scores_LV.max(1, initial=-np.inf)
        log_normalizer_L = top_L + np.log(np.exp(scores_LV - top_L[:, None]).sum(1))
        nats[document] += (log_normalizer_L - scores_LV[np.arange(len(label_L)), label_L]).sum()
        counts[document] += len(label_L)
    for text, total, count in zip(texts, nats, counts, strict=True):
        start, end = scored_span(first.tokenizer, text["boundaries"])
        yield float(total), end - start, int(count)


@partial(jax.jit, static_argnums=0)
def _log_softmax(structure: Any, state: Any, ids_BL: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(nnx.merge(structure, state)(ids_BL), axis=-1)


def _distributions(
    decoder: Any, inputs: Sequence[np.ndarray], max_length: int, batch_tokens: int, mesh: Mesh
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the input, log-probabilities float32 [L, V]) of each, in the order that suits the device."""
    structure, state = nnx.split(decoder)
    lengths = np.array([len(line) for line in inputs], np.int64)
    multiple = int(np.prod([mesh.shape[axis] for axis in sharding.BATCH]))
    for batch in scoring.plan(lengths, max_length, batch_tokens, multiple):
        ids_BL = np.zeros((batch.rows, batch.length), np.int32)
        for row, i in enumerate(batch.documents):
            ids_BL[row, : lengths[i]] = inputs[i]
        placed = sharding.put_batch({"ids": ids_BL}, mesh)["ids"]
        logprobs_BLV = np.asarray(_log_softmax(structure, state, placed))
        for row, i in enumerate(batch.documents):
            yield int(i), logprobs_BLV[row, : lengths[i]]

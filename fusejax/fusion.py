"""Fusion: the sources' sparse next-token rows become one target distribution for each row of the target model.

Everything is a pure function of arrays, works under `jax.jit` with any leading dimensions (written `...`), computes in
float32 and never makes an array with a vocabulary dimension. Sizes: S sources, K entries of a source's row, M entries
of a fused row, V the target's vocabulary, Vs a source's. An id of −1 is an empty entry and has probability 0.

The steps, after "Knowledge Fusion of Large Language Models" (FuseLLM, section 3), with the extensions named below:
`map_rows` brings one source's rows into the target's vocabulary, `aligned_ce` and `average_ce` measure how well each
source predicts the text, `fuse` weighs the sources, and `fuse_sources` does all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Collisions = Literal["sum", "first"]
Tail = Literal["tail", "renormalize"]
Kind = Literal["min_ce", "avg_ce", "fixed"]
Weighting = Literal["softmax", "reference"]
Fallback = Literal["gold", "skip"]
Level = Literal["token", "document", "block"]


class TokenTable(NamedTuple):
    """What each source token becomes in the target's vocabulary, after its first c bytes were consumed.

    ids: int32[Vs, C], column c: the target id for the token's bytes after the first c; −1: none (or no bytes left).
    prefix_hash: uint32[Vs, C], column c: a hash of the token's first c bytes. C = 1 without `inside` rows.
    """

    ids: Array
    prefix_hash: Array


class MappedRows(NamedTuple):
    """One source's rows in the target's vocabulary.

    ids: int32[..., M], no id twice in a row. probs: float32[..., M]. valid: bool[...]: the row can be used.
    mass: float32[...]: the probability that the top-k cut and the token map left (0 where not valid).
    """

    ids: Array
    probs: Array
    valid: Array
    mass: Array


class FusedRows(NamedTuple):
    """The target distributions.

    ids: int32[..., M]; an id may occur more than once under `avg_ce` and `fixed`, its probabilities add up.
    probs: float32[..., M], sum ≤ 1; what is missing lies outside the support (the tail).
    source_weights: float32[..., S]: the weight of each source, one-hot for `min_ce`; all 0 where none took part.
    fallback: bool[...]: the target is nothing but the one-hot true next token, for want of an aligned source row.
    mass: float32[...]: the weighted mean of the sources' mass kept (0 for fallback rows).
    """

    ids: Array
    probs: Array
    source_weights: Array
    fallback: Array
    mass: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusionSums:
    """Sums over rows, float32, to be divided by `count` after they were added over devices and steps.

    won: float32[S] weight given to each source on rows that are no fallback; fallback, mass, count: float32[].
    """

    won: Array
    fallback: Array
    mass: Array
    count: Array


def merge_repeated(ids: Array, probs: Array, how: Collisions = "sum") -> tuple[Array, Array]:
    """Give each id of a row once: its first entry takes the sum of the probabilities, or keeps its own (`first`).

    ids int32[..., M], probs float32[..., M]; returns the same shapes, emptied entries being (−1, 0). Costs M² compares
    for a row, which is little beside a row of logits and, unlike a sort, fuses into one pass.

    >>> ids, probs = merge_repeated(jnp.array([7, 3, 7]), jnp.array([0.5, 0.25, 0.125]))
    >>> ids.tolist(), probs.tolist()
    ([7, 3, -1], [0.625, 0.25, 0.0])
    """
    M = ids.shape[-1]
    same_MxM = ids[..., :, None] == ids[..., None, :]
    earlier_MxM = jnp.arange(M)[None, :] < jnp.arange(M)[:, None]
    first = (ids >= 0) & ~jnp.any(same_MxM & earlier_MxM, -1)
    if how == "sum":
        probs = jnp.sum(jnp.where(same_MxM, probs[..., None, :], 0.0), -1)
    return jnp.where(first, ids, -1), jnp.where(first, probs, 0.0)


def map_rows(
    ids: Array,
    logprobs: Array,
    valid: Array,
    table: TokenTable,
    *,
    consumed: Array | None = None,
    source_labels: Array | None = None,
    gold_logprobs: Array | None = None,
    labels: Array | None = None,
    collisions: Collisions = "sum",
    tail: Tail = "tail",
) -> MappedRows:
    """Bring one source's rows into the target's vocabulary.

    ids int32[..., K], logprobs float[..., K] (natural logarithms of the source's own probabilities), valid bool[...].
    An id without an image is dropped; so is an entry whose log-probability is not finite. Entries that meet at one
    target id are added (`collisions="sum"`), or the first, which is the likeliest, wins (`first`, as in FuseLLM).
    `tail="tail"` keeps the source's probabilities, so a row may add up to less than 1; `renormalize` scales it to 1.
    A row of which nothing is left is not valid.

    Rows inside a token: with consumed int32[...] = c > 0 bytes of the source's true next token source_labels int32[...]
    already in the context, only tokens that begin with these bytes and go on stay; they are renormalised, in both
    modes, because the row now is a distribution of the text after these bytes.

    Gold chain: with gold_logprobs float[...] (log-probability from this source row on that its true tokens spell the
    true next target token; −inf: none) and labels int32[...] (that target token), probability is moved from the image
    of the source's true next token to the label, at most what is there, and the rest is added. For c > 0 the value is
    that of the consumed bytes and the label together: it is divided here by the mass of the tokens that stay. The row
    gets one entry more: M = K + 1, else M = K. The total never exceeds 1.
    """
    c = jnp.zeros(valid.shape, jnp.int32) if consumed is None else consumed
    probs = _probabilities(ids, logprobs)
    images = jnp.where(jnp.isfinite(logprobs), _lookup(table.ids, ids, c[..., None], -1), -1)
    if consumed is not None:
        if source_labels is None:
            raise ValueError("map_rows: `consumed` needs `source_labels`")
        begun = _lookup(table.prefix_hash, source_labels, c, 0)
        follows = _lookup(table.prefix_hash, ids, c[..., None], 0) == begun[..., None]
        images = jnp.where((c[..., None] == 0) | follows, images, -1)
        valid = valid & (c < table.ids.shape[1])
    probs = jnp.where(images >= 0, probs, 0.0)
    images, probs = merge_repeated(images, probs, collisions)
    kept = jnp.sum(probs, -1)
    valid = valid & (kept > 0)
    inside = c > 0
    norm = jnp.where(inside & valid, kept, 1.0)
    probs = probs / norm[..., None]
    mass = jnp.where(inside, 1.0, jnp.minimum(kept, 1.0))
    if gold_logprobs is not None:
        if labels is None or source_labels is None:
            raise ValueError("map_rows: `gold_logprobs` needs `labels` and `source_labels`")
        gold = jnp.minimum(_probabilities(labels, gold_logprobs) / norm, 1.0)
        first_image = _lookup(table.ids, source_labels, c, -1)
        images, probs = _move_to_gold(images, probs, labels, first_image, gold)
    total = jnp.sum(probs, -1)
    scale = total if tail == "renormalize" else jnp.maximum(total, 1.0)
    probs = jnp.where(valid[..., None], probs / jnp.where(valid, scale, 1.0)[..., None], 0.0)
    images = jnp.where(valid[..., None], images, -1)
    return MappedRows(images, probs, valid, jnp.where(valid, mass, 0.0))


def _probabilities(ids: Array, logprobs: Array) -> Array:
    """exp(logprobs) in float32; 0 for empty entries and for values that are no logarithm of a probability."""
    logprobs = logprobs.astype(jnp.float32)
    usable = (ids >= 0) & jnp.isfinite(logprobs)
    return jnp.where(usable, jnp.exp(jnp.minimum(jnp.where(usable, logprobs, 0.0), 0.0)), 0.0)


def _lookup(table: Array, ids: Array, column: Array, missing: int) -> Array:
    """table[ids, column]; `missing` where either is out of range."""
    rows, columns = table.shape
    table = jnp.asarray(table)
    known = (ids >= 0) & (ids < rows) & (column >= 0) & (column < columns)
    flat = jnp.clip(ids, 0, rows - 1) * columns + jnp.clip(column, 0, columns - 1)
    return jnp.where(known, table.reshape(-1)[flat], jnp.asarray(missing, table.dtype))


def _move_to_gold(ids: Array, probs: Array, labels: Array, image: Array, gold: Array) -> tuple[Array, Array]:
    """Take `gold` of probability from entry `image`, as far as it is there, and add all of it to entry `labels`."""
    moves = (labels >= 0) & (gold > 0)
    at_image = (ids == image[..., None]) & (ids >= 0) & moves[..., None]
    probs = jnp.where(at_image, jnp.maximum(probs - gold[..., None], 0.0), probs)
    ids = jnp.concatenate([ids, jnp.where(moves, labels, -1)[..., None]], -1)
    probs = jnp.concatenate([probs, jnp.where(moves, gold, 0.0)[..., None]], -1)
    return merge_repeated(ids, probs)


def aligned_ce(ids: Array, probs: Array, valid: Array, labels: Array, vocab_size: int) -> Array:
    """Cross-entropy (nats) of mapped rows on the true next target token: comparable between tokenizers.

    ids int32[..., S, M], probs float[..., S, M], valid bool[..., S], labels int32[...] → float32[..., S]; inf where the
    row is not valid or the label is −1. A probability p counts as 0.98·p + 0.02/V, so that a miss costs a finite sum.
    """
    hit = (ids == labels[..., None, None]) & (ids >= 0)
    p = jnp.sum(jnp.where(hit, probs, 0.0), -1)
    ce = -jnp.log(0.98 * p + 0.02 / vocab_size)
    return jnp.where(valid & (labels >= 0)[..., None], ce, jnp.inf)


def average_ce(ce: Array, segment_ids: Array, level: Level, window: int = 16) -> Array:
    """Mean CE of every row's neighbourhood: what decides between sources at this row.

    ce float[B, L, S] of single rows, segment_ids int32[B, L] (0: padding) → float32[B, L, S]. `document`: all rows of
    the same segment; `block`: all rows of the packed sequence; `token`: the `window` rows around, of the same segment
    ((window − 1)//2 before and window//2 after). Values that are not finite are left out; inf where nothing is left.
    """
    usable = jnp.isfinite(ce) & (segment_ids > 0)[..., None]
    values = jnp.where(usable, ce.astype(jnp.float32), 0.0)
    counts = usable.astype(jnp.float32)
    if level == "token":
        total, n = _window_sums(values, counts, segment_ids, window)
    else:
        groups = (segment_ids > 0).astype(jnp.int32) if level == "block" else segment_ids
        # A packed sequence of L rows has at most L segments; ids need not be dense, so they are numbered by change.
        changed = jnp.concatenate([jnp.zeros_like(groups[:, :1]), groups[:, 1:] != groups[:, :-1]], -1)
        groups = groups if level == "block" else jnp.cumsum(changed, -1)

        def spread(x_LS: Array, group_L: Array) -> Array:
            return jax.ops.segment_sum(x_LS, group_L, num_segments=max(2, x_LS.shape[0]))[group_L]

        total, n = jax.vmap(spread)(values, groups), jax.vmap(spread)(counts, groups)
    return jnp.where(n > 0, total / jnp.maximum(n, 1.0), jnp.inf)


def _window_sums(values: Array, counts: Array, segment_ids: Array, window: int) -> tuple[Array, Array]:
    L, segment_ids = values.shape[1], jnp.asarray(segment_ids)
    before, after = (window - 1) // 2, window // 2

    def add(shift: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        neighbour = jnp.arange(L) + shift - before
        there = jnp.clip(neighbour, 0, L - 1)
        same = (neighbour >= 0) & (neighbour < L) & (segment_ids[:, there] == segment_ids)
        near = same[..., None].astype(jnp.float32)
        return sums[0] + near * values[:, there], sums[1] + near * counts[:, there]

    zero = jnp.zeros_like(values)
    return jax.lax.fori_loop(0, before + after + 1, add, (zero, zero))


def source_weights(
    ce: Array,
    takes_part: Array,
    *,
    kind: Kind = "min_ce",
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
    weighting: Weighting = "softmax",
) -> Array:
    """ce float[..., S], takes_part bool[..., S] → the weights float32[..., S], of sum 1, or 0 where none takes part.

    `min_ce` (FuseLLM, section 3.3): 1 for the least CE; of equal ones the source named first. `avg_ce`:
    softmax(−CE/temperature); with weighting `reference` softmax(exp(−CE)), as the paper's code computes it, which is
    nearly uniform. `fixed`: the given weights. Sources that take no part get 0 and the others' weights are normalised.
    A CE that is not finite counts as the largest of all.
    """
    ce = ce.astype(jnp.float32)
    ce = jnp.where(jnp.isfinite(ce), ce, jnp.finfo(jnp.float32).max)
    any_part = jnp.any(takes_part, -1, keepdims=True)
    if kind == "min_ce":
        winner = jnp.argmin(jnp.where(takes_part, ce, jnp.inf), -1)
        return jax.nn.one_hot(winner, ce.shape[-1], dtype=jnp.float32) * any_part
    if kind == "avg_ce":
        score = jnp.exp(-ce) if weighting == "reference" else -ce / temperature
        score = jnp.maximum(score, jnp.finfo(jnp.float32).min)  # a temperature below 1 must not make −inf − −inf
        part = jnp.where(takes_part, score, -jnp.inf)
        best = jnp.where(any_part, jnp.max(part, -1, keepdims=True), 0.0)
        raw = jnp.exp(part - best)
    elif kind == "fixed":
        if weights is None or len(weights) != ce.shape[-1]:
            raise ValueError(f"fuse: kind 'fixed' needs {ce.shape[-1]} weights, got {weights}")
        raw = jnp.where(takes_part, jnp.asarray(weights, jnp.float32), 0.0)
    else:
        raise ValueError(f"fuse: kind {kind!r} should be min_ce, avg_ce or fixed")
    total = jnp.sum(raw, -1, keepdims=True)
    return jnp.where(total > 0, raw / jnp.where(total > 0, total, 1.0), 0.0)


def fuse(
    ids: Array,
    probs: Array,
    valid: Array,
    ce: Array,
    labels: Array,
    *,
    kind: Kind = "min_ce",
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
    weighting: Weighting = "softmax",
    fallback: Fallback = "gold",
    fallback_ids: Array | None = None,
    mass: Array | None = None,
) -> FusedRows:
    """Fuse S sources' mapped rows: P = Σ_s w_s · P_s (FuseLLM, section 3.3), the weights from `source_weights`.

    ids int32[..., S, M], probs float[..., S, M], valid bool[..., S], ce float[..., S] (the CE that decides), labels
    int32[...] (the true next target token). Where a source's row is not valid, `fallback="gold"` puts the one-hot label
    in its place, and the source takes part as ever (the paper's way); under `skip` it takes no part, and a row in which
    no source does gets the one-hot label, so that its fusion loss is its CLM loss and rows keep equal weight.
    fallback_ids int32[...] takes the label's place in these one-hot rows. mass float[..., S] is averaged into the
    result. `min_ce` gives rows of M entries, the others S·M.

    >>> fused = fuse(
    ...     jnp.array([[[5, 2], [7, 5]]]), jnp.array([[[0.5, 0.25], [0.75, 0.25]]]), jnp.array([[True, True]]),
    ...     ce=jnp.array([[2.0, 1.0]]), labels=jnp.array([5]), kind="min_ce",
    ... )
    >>> fused.ids.tolist(), fused.probs.tolist(), fused.source_weights.tolist()
    ([[7, 5]], [[0.75, 0.25]], [[0.0, 1.0]])
    """
    gold = labels if fallback_ids is None else fallback_ids
    takes_part = valid if fallback == "skip" else jnp.ones_like(valid)
    weights_S = source_weights(ce, takes_part, kind=kind, temperature=temperature, weights=weights, weighting=weighting)
    gold_ids, gold_probs = _one_hot_rows(gold, ids.shape[-1])
    ids = jnp.where(valid[..., None], ids, gold_ids[..., None, :])
    probs = jnp.where(valid[..., None], probs.astype(jnp.float32), gold_probs[..., None, :])
    if kind == "min_ce":
        winner = jnp.argmax(weights_S, -1)[..., None, None]
        ids = jnp.take_along_axis(ids, winner, -2)[..., 0, :]
        probs = jnp.take_along_axis(probs, winner, -2)[..., 0, :]
    else:
        used = weights_S[..., None] > 0  # a source of weight 0 adds no entries, not even empty events
        flat = (*valid.shape[:-1], -1)
        ids = jnp.where(used, ids, -1).reshape(flat)
        probs = jnp.where(used, probs * weights_S[..., None], 0.0).reshape(flat)
    alone = ~jnp.any(weights_S > 0, -1)
    gold_ids, gold_probs = _one_hot_rows(gold, ids.shape[-1])
    ids = jnp.where(alone[..., None], gold_ids, ids)
    probs = jnp.where(alone[..., None], gold_probs, probs)
    is_fallback = ~jnp.any((weights_S > 0) & valid, -1)
    mean_mass = jnp.zeros(labels.shape, jnp.float32)
    if mass is not None:
        mean_mass = jnp.sum(jnp.where(valid, mass * weights_S, 0.0), -1)
    return FusedRows(ids, probs, weights_S, is_fallback, mean_mass)


def _one_hot_rows(labels: Array, width: int) -> tuple[Array, Array]:
    """Rows of `width` entries with all probability on the label; empty rows where the label is −1."""
    first = jnp.arange(width) == 0
    there = first & (labels >= 0)[..., None]
    return jnp.where(there, labels[..., None], -1), there.astype(jnp.float32)


def fuse_sources(
    tables: Sequence[TokenTable],
    source_ids: Array,
    source_logprobs: Array,
    source_valid: Array,
    labels: Array,
    *,
    source_ce: Array | None = None,
    source_consumed: Array | None = None,
    source_labels: Array | None = None,
    gold_logprobs: Array | None = None,
    segment_ids: Array | None = None,
    vocab_size: int | None = None,
    level: Level = "document",
    window: int = 16,
    collisions: Collisions = "sum",
    tail: Tail = "tail",
    kind: Kind = "min_ce",
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
    weighting: Weighting = "softmax",
    fallback: Fallback = "gold",
    fallback_ids: Array | None = None,
) -> FusedRows:
    """`map_rows` for every source, then `fuse`; the one call between a batch and the loss.

    One table for each source. source_ids int32[..., S, K], source_logprobs float[..., S, K], source_valid bool[..., S];
    optional source_consumed, source_labels int32[..., S] and gold_logprobs float[..., S], see `map_rows`. source_ce
    float[..., S] decides between sources; where it is None the CE on the target's own tokens does (`aligned_ce`,
    averaged by `average_ce` with `level` and `window`), which needs vocab_size, segment_ids int32[B, L] and leading
    dimensions [B, L].
    """

    def of(array: Array | None, s: int) -> Array | None:
        return None if array is None else array[..., s]

    mapped = [
        map_rows(
            source_ids[..., s, :],
            source_logprobs[..., s, :],
            source_valid[..., s],
            table,
            consumed=of(source_consumed, s),
            source_labels=of(source_labels, s),
            gold_logprobs=of(gold_logprobs, s),
            labels=labels,
            collisions=collisions,
            tail=tail,
        )
        for s, table in enumerate(tables)
    ]
    ids, probs = (jnp.stack(rows, -2) for rows in ([m.ids for m in mapped], [m.probs for m in mapped]))
    valid, mass = (jnp.stack(rows, -1) for rows in ([m.valid for m in mapped], [m.mass for m in mapped]))
    if source_ce is None:
        if segment_ids is None or vocab_size is None:
            raise ValueError("fuse_sources: without `source_ce`, `segment_ids` and `vocab_size` are needed")
        source_ce = average_ce(aligned_ce(ids, probs, valid, labels, vocab_size), segment_ids, level, window)
    return fuse(
        ids,
        probs,
        valid,
        source_ce,
        labels,
        kind=kind,
        temperature=temperature,
        weights=weights,
        weighting=weighting,
        fallback=fallback,
        fallback_ids=fallback_ids,
        mass=mass,
    )


def fusion_sums(fused: FusedRows, mask: Array) -> FusionSums:
    """Sums for the log over the rows where mask (bool or float[...]) holds: who won, how many fell back, mass kept."""
    mask = mask.astype(jnp.float32)
    own = mask * ~fused.fallback
    axes = tuple(range(mask.ndim))
    return FusionSums(
        won=jnp.sum(fused.source_weights * own[..., None], axes),
        fallback=jnp.sum(mask * fused.fallback),
        mass=jnp.sum(fused.mass * mask),
        count=jnp.sum(mask),
    )

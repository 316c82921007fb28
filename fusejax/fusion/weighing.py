"""How well each source predicts the text, and the weight that it gets for it."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fusejax import arguments

Kind = Literal["min_ce", "avg_ce", "fixed"]
Weighting = Literal["softmax", "reference"]
Level = Literal["token", "document", "block"]


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
    arguments.one_of("level", level, get_args(Level))
    arguments.within("window", window, 1)
    arguments.shape("segment_ids", segment_ids, ce.shape[:-1], f"[B, L] of ce {ce.shape}")
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


def average_per_unit(ce: Array, units: Array, segment_ids: Array, level: Level, window: int = 16) -> Array:
    """`average_ce` of a model's own rows in nats a unit: what compares with a source's CE per byte.

    ce float[B, L] of single rows, units [B, L]: bytes of the tokens that they predict (0: the row is left out),
    segment_ids int32[B, L] → float32[B, L], inf where nothing is left.
    """
    arguments.shape("units", units, ce.shape, "that of ce")
    both = jnp.stack([ce, units.astype(ce.dtype)], -1)
    both = average_ce(jnp.where((units > 0)[..., None], both, jnp.inf), segment_ids, level, window)
    known = jnp.isfinite(both[..., 1])
    return jnp.where(known, both[..., 0] / jnp.where(known, both[..., 1], 1.0), jnp.inf)


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
    half_rewards: bool = False,
) -> Array:
    """ce float[..., S], takes_part bool[..., S] → the weights float32[..., S], of sum 1, or 0 where none takes part.

    `min_ce` (FuseLLM, section 3.3): 1 for the least CE; of equal ones the source named first. `avg_ce`:
    softmax(−CE/temperature); with weighting `reference` softmax(exp(−CE)), as the paper's code computes it, which is
    nearly uniform. `fixed`: the given weights. Sources that take no part get 0 and the others' weights are normalised.
    A CE that is not finite counts as the largest of all.

    half_rewards: as the paper's code does it, `min_ce` takes the greatest exp(−CE), computed in bfloat16, so that CEs
    of up to a hundredth apart tie; `reference` weights are made of the same rewards and rounded to bfloat16, too.
    """
    _check(ce, takes_part, kind, temperature, weights, weighting)
    ce = ce.astype(jnp.float32)
    ce = jnp.where(jnp.isfinite(ce), ce, jnp.finfo(jnp.float32).max)
    any_part = jnp.any(takes_part, -1, keepdims=True)
    if kind == "min_ce":
        decisive = -_half_rewards(ce) if half_rewards else ce
        winner = jnp.argmin(jnp.where(takes_part, decisive, jnp.inf), -1)
        return jax.nn.one_hot(winner, ce.shape[-1], dtype=jnp.float32) * any_part
    if kind == "avg_ce":
        reward = _half_rewards(ce) if half_rewards else jnp.exp(-ce)
        score = reward if weighting == "reference" else -ce / temperature
        score = jnp.maximum(score, jnp.finfo(jnp.float32).min)  # a temperature below 1 must not make −inf − −inf
        part = jnp.where(takes_part, score, -jnp.inf)
        best = jnp.where(any_part, jnp.max(part, -1, keepdims=True), 0.0)
        raw = jnp.exp(part - best)
    else:
        raw = jnp.where(takes_part, jnp.asarray(weights, jnp.float32), 0.0)
    total = jnp.sum(raw, -1, keepdims=True)
    share = jnp.where(total > 0, raw / jnp.where(total > 0, total, 1.0), 0.0)
    return _bfloat16(share) if half_rewards and kind == "avg_ce" else share


def _check(
    ce: Array, takes_part: Array, kind: str, temperature: float, weights: Sequence[float] | None, weighting: str
) -> None:
    arguments.shape("takes_part", takes_part, ce.shape, "that of ce")
    arguments.one_of("kind", kind, get_args(Kind))
    arguments.one_of("weighting", weighting, get_args(Weighting))
    arguments.within("temperature", temperature, above=0)
    if kind != "fixed":
        if weights is not None:
            raise ValueError(f"weights: only used with kind 'fixed', not with {kind!r}")
        return
    if weights is None or len(weights) != ce.shape[-1]:
        raise ValueError(f"weights: kind 'fixed' needs {ce.shape[-1]} weights, got {weights}")
    objection = arguments.weights_objection(weights)
    if objection:
        raise ValueError(f"weights: {objection}")


def _half_rewards(ce: Array) -> Array:
    """1 / exp(CE), every step rounded to bfloat16."""
    return _bfloat16(1 / _bfloat16(jnp.exp(_bfloat16(ce))))


def _bfloat16(x: Array) -> Array:
    """float32 values of bfloat16's precision. A cast there and back would be optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

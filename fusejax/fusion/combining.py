"""Mapped rows of several sources become one target distribution for each row of the target model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fusejax import arguments
from fusejax.fusion.mapping import Collisions, Tail, TokenTable, map_rows
from fusejax.fusion.weighing import Kind, Level, Weighting, aligned_ce, average_ce, source_weights

Fallback = Literal["gold", "skip"]


class FusedRows(NamedTuple):
    """The target distributions.

    ids: int32[..., M]; an id may occur more than once under `avg_ce` and `fixed`, its probabilities add up.
    probs: float32[..., M], sum ≤ 1; what is missing lies outside the support (the tail).
    source_weights: float32[..., S]: the weight of each source, one-hot for `min_ce`; all 0 where none took part.
    fallback: bool[...]: the target is nothing but the one-hot true next token, for want of an aligned source row.
    mass: float32[...]: the weighted mean of the sources' mass kept (0 for fallback rows).
    gated: bool[...]: a fallback because no source has a lower CE than the target; all False without `target_ce`.
    """

    ids: Array
    probs: Array
    source_weights: Array
    fallback: Array
    mass: Array
    gated: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusionSums:
    """Sums over rows, float32, to be divided by `count` after they were added over devices and steps.

    won: float32[S] weight given to each source on rows that are no fallback; fallback, gated, mass, count: float32[].
    """

    won: Array
    fallback: Array
    gated: Array
    mass: Array
    count: Array


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
    half_rewards: bool = False,
    fallback: Fallback = "gold",
    fallback_ids: Array | None = None,
    mass: Array | None = None,
    target_ce: Array | None = None,
) -> FusedRows:
    """Fuse S sources' mapped rows: P = Σ_s w_s · P_s (FuseLLM, section 3.3), the weights from `source_weights`.

    ids int32[..., S, M], probs float[..., S, M], valid bool[..., S], ce float[..., S] (the CE that decides), labels
    int32[...] (the true next target token). Where a source's row is not valid, `fallback="gold"` puts the one-hot label
    in its place, and the source takes part as ever (the paper's way); under `skip` it takes no part, and a row in which
    no source does gets the one-hot label, so that its fusion loss is its CLM loss and rows keep equal weight.
    fallback_ids int32[...] takes the label's place in these one-hot rows (the paper's code puts the current token).
    mass float[..., S] is averaged into the result. `min_ce` gives rows of M entries, the others S·M.
    half_rewards: see `source_weights`. target_ce float[...] (the target's own, in the unit of ce): a source whose CE is
    not below it counts as not valid, for there is nothing to learn from it.

    What ids and probs hold is not checked and goes through as it is: ids of V or more, NaN, sums above 1 (`fusion_loss`
    says what becomes of them there). A label of −1 makes an empty one-hot row; a CE that is not finite counts as the
    largest. Raises ValueError for shapes that do not belong together, and for options that are unknown, out of range
    (unless traced) or without effect.

    >>> fused = fuse(
    ...     jnp.array([[[5, 2], [7, 5]]]), jnp.array([[[0.5, 0.25], [0.75, 0.25]]]), jnp.array([[True, True]]),
    ...     ce=jnp.array([[2.0, 1.0]]), labels=jnp.array([5]), kind="min_ce",
    ... )
    >>> fused.ids.tolist(), fused.probs.tolist(), fused.source_weights.tolist()
    ([[7, 5]], [[0.75, 0.25]], [[0.0, 1.0]])
    """
    lead, why = labels.shape, f"the leading dimensions of labels {labels.shape}"
    arguments.shape("ids", ids, (*lead, *ids.shape[-2:]), f"[..., S, M] with {why}")
    arguments.shape("probs", probs, ids.shape, "that of ids")
    for name, array in {"valid": valid, "ce": ce, "mass": mass}.items():
        arguments.shape(name, array, ids.shape[:-1], f"[..., S] of ids {ids.shape}")
    for name, array in {"fallback_ids": fallback_ids, "target_ce": target_ce}.items():
        arguments.shape(name, array, lead, "that of labels")
    arguments.one_of("fallback", fallback, get_args(Fallback))
    gold = labels if fallback_ids is None else fallback_ids
    reached = jnp.any(valid, -1)
    if target_ce is not None:
        valid = valid & (ce < target_ce[..., None])
    takes_part = valid if fallback == "skip" else jnp.ones_like(valid)
    weights_S = source_weights(
        ce,
        takes_part,
        kind=kind,
        temperature=temperature,
        weights=weights,
        weighting=weighting,
        half_rewards=half_rewards,
    )
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
    return FusedRows(ids, probs, weights_S, is_fallback, mean_mass, reached & ~jnp.any(valid, -1))


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
    target_ce: Array | None = None,
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
    half_rewards: bool = False,
    fallback: Fallback = "gold",
    fallback_ids: Array | None = None,
) -> FusedRows:
    """`map_rows` for every source, then `fuse`; the one call between a batch and the loss.

    One table for each source. source_ids int32[..., S, K], source_logprobs float[..., S, K], source_valid bool[..., S];
    optional source_consumed, source_labels int32[..., S] and gold_logprobs float[..., S], see `map_rows`. source_ce
    float[..., S] decides between sources; where it is None the CE on the target's own tokens does (`aligned_ce`,
    averaged by `average_ce` with `level` and `window`), which needs vocab_size, segment_ids int32[B, L] and leading
    dimensions [B, L]. target_ce float[...]: see `fuse`. Raises ValueError as `map_rows` and `fuse` do.
    """
    lead, S = labels.shape, len(tables)
    why = f"for labels of shape {lead} and {S} tables"
    arguments.shape("source_ids", source_ids, (*lead, S, source_ids.shape[-1]), why)
    arguments.shape("source_logprobs", source_logprobs, source_ids.shape, "that of source_ids")
    per_source = {"source_valid": source_valid, "source_ce": source_ce, "source_consumed": source_consumed}
    per_source |= {"source_labels": source_labels, "gold_logprobs": gold_logprobs}
    for name, array in per_source.items():
        arguments.shape(name, array, (*lead, S), why)
    arguments.shape("segment_ids", segment_ids, lead, "that of labels")

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
        half_rewards=half_rewards,
        fallback=fallback,
        fallback_ids=fallback_ids,
        mass=mass,
        target_ce=target_ce,
    )


def fusion_sums(fused: FusedRows, mask: Array) -> FusionSums:
    """Sums for the log over the rows where mask (bool or float[...]) holds: who won, how many fell back, mass kept."""
    mask = mask.astype(jnp.float32)
    own = mask * ~fused.fallback
    axes = tuple(range(mask.ndim))
    return FusionSums(
        won=jnp.sum(fused.source_weights * own[..., None], axes),
        fallback=jnp.sum(mask * fused.fallback),
        gated=jnp.sum(mask * fused.gated),
        mass=jnp.sum(fused.mass * mask),
        count=jnp.sum(mask),
    )

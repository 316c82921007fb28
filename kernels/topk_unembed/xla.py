"""In blocks over the vocabulary, with a running top-k and a running log-sum-exp: one [T, block] array at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.candidates import Candidates
from fusejax.kernels.topk_unembed.reference import logits_of

_BLOCK_ELEMENTS = 1 << 24  # float32 logits held at a time: 64 MiB


def default_block(T: int) -> int:
    """Vocabulary entries per block for T rows: a multiple of 128, at least 1024."""
    return max(1024, _BLOCK_ELEMENTS // max(T, 1) // 128 * 128)


def topk_unembed(
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    labels_T: jax.Array,
    valid: jax.Array | None = None,
    *,
    k: int,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
    block: int | None,
) -> Candidates:
    """Of the first `vocab_size` columns (and of them those before `valid`): see `fusejax.kernels.topk_unembed`."""
    T = hidden_TD.shape[0]
    block = block or default_block(T)
    carry: tuple[jax.Array, ...] = (
        jnp.full((T, k), -jnp.inf),
        jnp.zeros((T, k), jnp.int32),
        jnp.full(T, -jnp.inf),
        jnp.zeros(T),
        jnp.zeros(T),
    )
    carry = over_blocks(
        partial(_take_block, labels_T, k),
        carry,
        hidden_TD,
        unembedding_DV,
        valid,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        logit_cap=logit_cap,
        block=block,
    )
    values_TK, ids_TK, max_T, sum_T, label_T = carry
    return Candidates(values_TK, ids_TK, max_T + jnp.log(sum_T), label_T)


def over_blocks(
    step: Callable[[tuple[jax.Array, ...], jax.Array, jax.Array], tuple[jax.Array, ...]],
    carry: tuple[jax.Array, ...],
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    valid: jax.Array | None,
    *,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
    block: int,
) -> tuple[jax.Array, ...]:
    """The carry after step(carry, logits float32 [T, ≤ block], the first one's id) for the first `vocab_size` columns.

    The logits of columns from `valid` on are −inf; None: there are none such.
    """

    def take(size: int, carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[jax.Array, ...]:
        table_DB = jax.lax.dynamic_slice_in_dim(unembedding_DV, start, size, axis=1)
        logits_TB = logits_of(hidden_TD, table_DB, logit_scale, logit_cap)
        if valid is not None:
            logits_TB = jnp.where(start + jnp.arange(size) < valid, logits_TB, -jnp.inf)
        return step(carry, logits_TB, start)

    whole = vocab_size // block
    if whole:
        starts = jnp.arange(whole, dtype=jnp.int32) * block
        carry, _ = jax.lax.scan(lambda c, start: (take(block, c, start), None), carry, starts)
    # What no whole block covers is a block of its own: padding the table would copy it.
    if vocab_size % block:
        carry = take(vocab_size % block, carry, jnp.int32(whole * block))
    return carry


def _take_block(
    labels_T: jax.Array, k: int, carry: tuple[jax.Array, ...], logits_TB: jax.Array, start: jax.Array
) -> tuple[jax.Array, ...]:
    """The carry after a block whose first entry is `start`."""
    values_TK, ids_TK, max_T, sum_T, label_T = carry
    size = logits_TB.shape[1]
    if k:
        new_TK, where_TK = jax.lax.top_k(logits_TB, min(k, size))
        # Earlier blocks come first, and top_k keeps the first of equals: ties go to the lower id.
        both = jnp.concatenate([values_TK, new_TK], axis=1)
        both_ids = jnp.concatenate([ids_TK, where_TK.astype(jnp.int32) + start], axis=1)
        values_TK, order_TK = jax.lax.top_k(both, k)
        ids_TK = jnp.take_along_axis(both_ids, order_TK, axis=1)
    top_T = jnp.maximum(max_T, logits_TB.max(axis=1))
    # A row whose logits are all −inf so far would otherwise give −inf − −inf.
    shift_T = jnp.where(top_T == -jnp.inf, 0.0, top_T)
    sum_T = sum_T * jnp.exp(max_T - shift_T) + jnp.exp(logits_TB - shift_T[:, None]).sum(axis=1)
    here_T = labels_T - start
    inside_T = (here_T >= 0) & (here_T < size)
    picked_T = jnp.take_along_axis(logits_TB, jnp.clip(here_T, 0, size - 1)[:, None], axis=1)[:, 0]
    return values_TK, ids_TK, top_T, sum_T, jnp.where(inside_T, picked_T, label_T)

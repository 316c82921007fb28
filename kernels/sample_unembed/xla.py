"""Draws by inversion of the distribution function, in blocks over the vocabulary: one [T, block] array at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.reference import logits_of


def draw(
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    uniforms_TR: jax.Array,
    lse_T: jax.Array,
    before_T: jax.Array,
    valid: jax.Array | None,
    *,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
    block: int,
) -> jax.Array:
    """int32 [T, R]: the column, of the first `vocab_size` and of them those before `valid`, in whose share of the
    distribution function a number lies; −1 where it lies in none. lse_T: the log-normalizer of all columns, here or
    elsewhere; before_T: the probability of those that come before the first."""
    take = partial(_take_block, hidden_TD, unembedding_DV, uniforms_TR, lse_T, valid, logit_scale, logit_cap)
    carry = (jnp.full(uniforms_TR.shape, -1, jnp.int32), before_T)
    whole = vocab_size // block
    if whole:
        starts = jnp.arange(whole, dtype=jnp.int32) * block
        carry, _ = jax.lax.scan(lambda c, start: (take(block, c, start), None), carry, starts)
    if vocab_size % block:
        carry = take(vocab_size % block, carry, jnp.int32(whole * block))
    return carry[0]


def _take_block(hidden_TD, unembedding_DV, uniforms_TR, lse_T, valid, logit_scale, logit_cap, size, carry, start):  # type: ignore[no-untyped-def]
    ids_TR, before_T = carry
    table_DB = jax.lax.dynamic_slice_in_dim(unembedding_DV, start, size, axis=1)
    logits_TB = logits_of(hidden_TD, table_DB, logit_scale, logit_cap)
    if valid is not None:
        logits_TB = jnp.where(start + jnp.arange(size) < valid, logits_TB, -jnp.inf)
    ends_TB = before_T[:, None] + jnp.cumsum(jnp.exp(logits_TB - lse_T[:, None]), axis=1)
    after_T = ends_TB[:, -1]
    found_TR = jax.vmap(partial(jnp.searchsorted, side="right"))(ends_TB, uniforms_TR)
    inside_TR = (uniforms_TR >= before_T[:, None]) & (uniforms_TR < after_T[:, None])
    return jnp.where(inside_TR, found_TR.astype(jnp.int32) + start, ids_TR), after_T

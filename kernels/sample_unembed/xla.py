"""Draws by inversion of the distribution function, in blocks over the vocabulary: one [T, block] array at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.xla import over_blocks


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
    ids_TR, _ = over_blocks(
        partial(_take_block, uniforms_TR, lse_T),
        (jnp.full(uniforms_TR.shape, -1, jnp.int32), before_T),
        hidden_TD,
        unembedding_DV,
        valid,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        logit_cap=logit_cap,
        block=block,
    )
    return ids_TR


def _take_block(
    uniforms_TR: jax.Array, lse_T: jax.Array, carry: tuple[jax.Array, ...], logits_TB: jax.Array, start: jax.Array
) -> tuple[jax.Array, ...]:
    """(the ids found so far, the probability up to the block's end)."""
    ids_TR, before_T = carry
    ends_TB = before_T[:, None] + jnp.cumsum(jnp.exp(logits_TB - lse_T[:, None]), axis=1)
    after_T = ends_TB[:, -1]
    found_TR = jax.vmap(partial(jnp.searchsorted, side="right"))(ends_TB, uniforms_TR)
    inside_TR = (uniforms_TR >= before_T[:, None]) & (uniforms_TR < after_T[:, None])
    return jnp.where(inside_TR, found_TR.astype(jnp.int32) + start, ids_TR), after_T

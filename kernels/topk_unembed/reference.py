"""The definition, in plain jnp on the whole [T, V] array: what the other implementations are tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TopK(NamedTuple):
    """What is kept of next-token distributions, one per leading index."""

    ids: jax.Array  # int32 [..., k]
    logprobs: jax.Array  # float32 [..., k], true log-probabilities, sorted descending
    log_normalizer: jax.Array  # float32 [...], logsumexp of the logits
    ce: jax.Array  # float32 [...], cross-entropy of the label in nats, 0 where there is none


def logits_of(
    hidden_TD: jax.Array, unembedding_DV: jax.Array, logit_scale: float, logit_cap: float | None
) -> jax.Array:
    """float32 [T, V]; the product in the hidden states' dtype, summed in float32."""
    exact = hidden_TD.dtype == jnp.float32
    logits_TV = jnp.dot(
        hidden_TD,
        unembedding_DV.astype(hidden_TD.dtype),
        preferred_element_type=jnp.float32,
        # Accelerators would otherwise round float32 factors to fewer bits.
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )
    if logit_scale != 1.0:
        logits_TV = logits_TV * logit_scale
    return logits_TV if logit_cap is None else logit_cap * jnp.tanh(logits_TV / logit_cap)


def topk_unembed(
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    labels_T: jax.Array,
    *,
    k: int,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
) -> TopK:
    """See `fusejax.kernels.topk_unembed.topk_unembed`; here hidden [T, D] and labels [T]."""
    logits_TV = logits_of(hidden_TD, unembedding_DV, logit_scale, logit_cap)[:, :vocab_size]
    lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
    values_TK, ids_TK = jax.lax.top_k(logits_TV, k)
    label_T = jnp.take_along_axis(logits_TV, jnp.maximum(labels_T, 0)[:, None], axis=-1)[:, 0]
    return TopK(
        ids_TK.astype(jnp.int32),
        values_TK - lse_T[:, None],
        lse_T,
        jnp.where(labels_T >= 0, lse_T - label_T, 0.0),
    )

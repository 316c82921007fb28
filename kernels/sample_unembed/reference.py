"""The definition, in plain jnp on the whole [T, V] array: what the other implementation is tested against."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.reference import logits_of


class Sampled(NamedTuple):
    """Independent draws from next-token distributions, one set per leading index."""

    ids: jax.Array  # int32 [..., R]
    log_normalizer: jax.Array  # float32 [...], logsumexp of the logits
    ce: jax.Array  # float32 [...], cross-entropy of the label in nats, 0 where there is none


def sample_unembed(
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    uniforms_TR: jax.Array,
    labels_T: jax.Array,
    *,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
) -> Sampled:
    """See `fusejax.kernels.sample_unembed.sample_unembed`; here hidden [T, D], uniforms [T, R] and labels [T]."""
    logits_TV = logits_of(hidden_TD, unembedding_DV, logit_scale, logit_cap)[:, :vocab_size]
    lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
    ends_TV = jnp.cumsum(jnp.exp(logits_TV - lse_T[:, None]), axis=-1)
    below_TR = jnp.sum(ends_TV[:, None, :] <= uniforms_TR[:, :, None], axis=-1)
    label_T = jnp.take_along_axis(logits_TV, jnp.maximum(labels_T, 0)[:, None], axis=-1)[:, 0]
    return Sampled(
        jnp.minimum(below_TR, vocab_size - 1).astype(jnp.int32),
        lse_T,
        jnp.where(labels_T >= 0, lse_T - label_T, 0.0),
    )

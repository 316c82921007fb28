"""The fused loss's two steps over one block of logits in plain XLA: the statistics, and the gradient of the logits."""

import jax
import jax.numpy as jnp
from fusejax.kernels.fusion_loss.terms import Options, Slopes, Statistics
from jax import Array

BLOCK_ELEMENTS = 1 << 24  # of one block of logits on a device: 64 MB in float32
LEAST_TOKENS = 512  # fewer, and reading and writing the gradient of the unembedding once a block takes too much of it


def block_tokens(columns: int, dtype: jnp.dtype) -> int:
    """Tokens of one block on a device that holds so many columns of the vocabulary."""
    del dtype  # the logits are float32, whatever the factors are
    return max(LEAST_TOKENS, BLOCK_ELEMENTS // columns)


def statistics(
    h: Array, weights: Array, ids: Array, valid: Array | None, options: Options
) -> tuple[Statistics, tuple[Array, Array]]:
    """h [T, D] @ weights [D, V] → (statistics, what `dlogits` needs).

    ids int32[T, M + 1]: the support's and the label's columns, −1 where there is none here. Columns from `valid` on are
    padding; None: there is no padding.
    """
    z = jnp.einsum("td,dv->tv", h, weights, preferred_element_type=jnp.float32) * options.logit_scale
    cap = options.logit_cap
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    at = _take(z, ids)
    counted = z if valid is None else jnp.where(jnp.arange(z.shape[-1]) < valid, z, -jnp.inf)
    if options.tail:
        counted = _set(counted, ids[:, :-1], -jnp.inf)
    lse = jax.nn.logsumexp(counted, -1)
    tempered = jax.nn.logsumexp(counted / options.temperature, -1) if options.tempered else None
    mean = None
    if options.model_entropy:
        # Σ p log p in this form is a twelfth of the work of Σ p z with its 0 · −∞ masked: it compiles to one lean pass.
        finite = jnp.where(lse == -jnp.inf, 0.0, lse)
        log_p = jnp.maximum(counted - finite[:, None], -100.0)
        mean = finite + jnp.sum(log_p * jnp.exp(log_p), -1)
    return Statistics(at, lse, tempered, mean), (z, counted)


def dlogits(kept: tuple[Array, Array], ids: Array, slopes: Slopes, options: Options) -> Array:
    """∂ Σ loss / ∂ (h @ weights), float32[T, V]."""
    z, counted = kept
    dz = slopes.dense[:, None] * jnp.exp(counted - slopes.shift[:, None])
    if slopes.tempered is not None and slopes.shift_tempered is not None:
        dz += slopes.tempered[:, None] * jnp.exp(counted / options.temperature - slopes.shift_tempered[:, None])
    dz = _add(dz, ids, slopes.at)
    if options.logit_cap is not None:
        dz = dz * (1 - (z / options.logit_cap) ** 2)
    return dz * options.logit_scale


def _take(z: Array, ids: Array) -> Array:
    """z[t, ids[t, m]]; 0 where the id is −1."""
    return jnp.where(ids >= 0, jnp.take_along_axis(z, jnp.maximum(ids, 0), -1), 0.0)


def _set(z: Array, ids: Array, value: float) -> Array:
    """z with z[t, ids[t, m]] = value; ids of −1 are left out."""
    # By rows under vmap: then the tokens are a batch dimension, along which devices need no exchange.
    return jax.vmap(lambda z_V, ids_M: z_V.at[_past_the_end(ids_M, z_V)].set(value, mode="drop"))(z, ids)


def _add(z: Array, ids: Array, values: Array) -> Array:
    """z with values[t, m] added at z[t, ids[t, m]]; ids of −1 are left out."""
    return jax.vmap(lambda z_V, ids_M, a_M: z_V.at[_past_the_end(ids_M, z_V)].add(a_M, mode="drop"))(z, ids, values)


def _past_the_end(ids: Array, z_V: Array) -> Array:
    """−1 would count from the end; mode="drop" leaves out what lies beyond it."""
    return jnp.where(ids >= 0, ids, z_V.shape[0])

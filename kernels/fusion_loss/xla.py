"""The fused loss's two steps over one block of logits in plain XLA: the statistics, and the gradient of the logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from fusejax.kernels.fusion_loss.terms import Options, Slopes, Statistics
from jax import Array


class Kept(NamedTuple):
    """What `dlogits` takes over from `statistics`: e = exp(counted z − top), float32[T, V], and z where it needs it."""

    e: Array
    top: Array
    z: Array | None  # under a cap
    counted: Array | None  # with `Options.tempered`


def statistics(h: Array, weights: Array, ids: Array, valid: Array | None, options: Options) -> tuple[Statistics, Kept]:
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
        # −∞, got from what was taken: so the block is read before it is written, in place, and needs no copy.
        counted = _set(counted, ids[:, :-1], jnp.minimum(at[:, :-1], -jnp.inf))
    top = jnp.max(counted, -1)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    below = counted - top[:, None]
    e = jnp.exp(below)
    total = jnp.sum(e, -1)
    lse = top + jnp.log(total)
    tempered = mean = None
    if options.tempered:
        τ = options.temperature
        tempered = top / τ + jnp.log(jnp.sum(jnp.exp(below / τ), -1))
    if options.model_entropy:
        # e is 0 long before −100; 0 · −∞ would be none.
        mean = top + jnp.sum(e * jnp.maximum(below, -100.0), -1) / jnp.where(total > 0, total, 1.0)
    kept = Kept(e, top, None if cap is None else z, counted if options.tempered else None)
    return Statistics(at, lse, tempered, mean), kept


def dlogits(kept: Kept, ids: Array, slopes: Slopes, options: Options) -> Array:
    """∂ Σ loss / ∂ (h @ weights), float32[T, V]."""
    dz = (slopes.dense * jnp.exp(kept.top - slopes.shift))[:, None] * kept.e
    if slopes.tempered is not None and slopes.shift_tempered is not None and kept.counted is not None:
        dz += slopes.tempered[:, None] * jnp.exp(kept.counted / options.temperature - slopes.shift_tempered[:, None])
    dz = _add(dz, ids, slopes.at)
    if options.logit_cap is not None and kept.z is not None:
        dz = dz * (1 - (kept.z / options.logit_cap) ** 2)
    return dz * options.logit_scale


def _take(z: Array, ids: Array) -> Array:
    """z[t, ids[t, m]]; 0 where the id is −1."""
    return jnp.where(ids >= 0, jnp.take_along_axis(z, jnp.maximum(ids, 0), -1), 0.0)


def _set(z: Array, ids: Array, values: Array) -> Array:
    """z with z[t, ids[t, m]] = values[t, m]; ids of −1 are left out."""
    # By rows under vmap: then the tokens are a batch dimension, along which devices need no exchange.
    return jax.vmap(lambda z_V, ids_M, a_M: z_V.at[_past_the_end(ids_M, z_V)].set(a_M, mode="drop"))(z, ids, values)


def _add(z: Array, ids: Array, values: Array) -> Array:
    """z with values[t, m] added at z[t, ids[t, m]]; ids of −1 are left out."""
    return jax.vmap(lambda z_V, ids_M, a_M: z_V.at[_past_the_end(ids_M, z_V)].add(a_M, mode="drop"))(z, ids, values)


def _past_the_end(ids: Array, z_V: Array) -> Array:
    """−1 would count from the end; mode="drop" leaves out what lies beyond it."""
    return jnp.where(ids >= 0, ids, z_V.shape[0])

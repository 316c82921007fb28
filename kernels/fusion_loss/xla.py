"""The fused loss and its gradients in plain XLA, by blocks of tokens: no array of tokens × vocabulary beyond one block.

Write z_i for a token's logits, y for its label, t_e for the target's events: its support ids, and with a tail one more,
"anything else". One pass over a block's logits gives a log-sum-exp lse, and the loss and its gradient follow from it:

  clm    = lse − z_y                                        ∂/∂z_i = p_i − [i = y]
  fusion = Σ_j q_j (lse' − z_j/τ)   without a tail, lse' = log Σ_i exp(z_i/τ); ∂/∂z_i = (Σq · p'_i − q_i)/τ
  fusion = −Σ_e t_e log s_e         with a tail, s = softmax over events of ℓ/τ, ℓ_e the model's log-probability of e

With g_e = (Σt · s_e − t_e)/τ the gradient under a tail is g_j at the support and g_rest · exp(z_i − lse_rest) outside,
where lse_rest = log Σ_{i outside the support} exp(z_i) is summed directly: 1 − Σ_j p_j would lose all its digits.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Options(NamedTuple):
    """What is fixed at compile time. The tokens are spread over `blocks` in time and over `shards` devices."""

    blocks: int
    shards: int = 1
    temperature: float = 1.0
    tail: bool = False
    nonnegative: bool = False  # a divergence: clear it of rounding below 0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    z_loss: float = 0.0
    model_entropy: bool = False
    gradients: str = "forward"


class Rows(NamedTuple):
    """Per-token inputs; T tokens, M support entries.

    labels: int32[T] (any value where clm_weight is 0). ids: int32[T, M], distinct, −1 = none. q: float32[T, M], 0 where
    none; with a tail and τ ≠ 1 already tempered. rest: float32[T], the tail event's probability. constant: float32[T],
    taken off the fusion loss (the target's entropy, for KL). clm_weight, fusion_weight: float32[T].
    """

    labels: Array
    ids: Array
    q: Array
    rest: Array
    constant: Array
    clm_weight: Array
    fusion_weight: Array


class Sums(NamedTuple):
    """float32[]: Σ clm_weight·clm, Σ fusion_weight·fusion, Σ clm_weight·z_loss, Σ clm_weight·entropy of the model."""

    clm: Array
    fusion: Array
    z_loss: Array
    entropy: Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def losses(hidden: Array, unembedding: Array, rows: Rows, weight_clm: Array, options: Options) -> tuple[Array, Sums]:
    """hidden [T, D], unembedding [D, V], weight_clm λ float32[] → (λ·clm + (1−λ)·fusion + z_loss, the parts).

    Differentiable in hidden and unembedding, through the first result only.
    """
    return _over_blocks(hidden, unembedding, rows, weight_clm, options, with_gradients=False)[0]


def _forward(
    hidden: Array, unembedding: Array, rows: Rows, weight_clm: Array, options: Options
) -> tuple[tuple[Array, Sums], tuple[Array, ...] | tuple]:
    if options.gradients == "forward":
        out, *gradients = _over_blocks(hidden, unembedding, rows, weight_clm, options, with_gradients=True)
        like = (jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), unembedding.dtype))
        return out, (gradients, like, rows, weight_clm)
    out = _over_blocks(hidden, unembedding, rows, weight_clm, options, with_gradients=False)[0]
    return out, (None, (hidden, unembedding), rows, weight_clm)


def _backward(options: Options, saved: tuple, cotangents: tuple[Array, Sums]) -> tuple:
    gradients, like, rows, weight_clm = saved
    if gradients is None:
        hidden, unembedding = like
        _, *gradients = _over_blocks(hidden, unembedding, rows, weight_clm, options, with_gradients=True)
    scaled = ((g * cotangents[0]).astype(x.dtype) for g, x in zip(gradients, like, strict=True))
    return (*scaled, None, None)


losses.defvjp(_forward, _backward)


def _over_blocks(
    hidden: Array,
    unembedding: Array,
    rows: Rows,
    weight_clm: Array,
    options: Options,
    with_gradients: bool,
) -> tuple:
    """Returns ((total, sums), gradient of hidden, gradient of unembedding), the gradients only where asked for."""
    T, D = hidden.shape
    n, shards = options.blocks, options.shards
    size = -(-T // (n * shards)) * shards

    def split(x: Array) -> Array:
        """[T, …] → [size, n, …]: block b is every n-th token, so a T axis sharded over devices stays where it is."""
        x = jnp.pad(x, [(0, size * n - T)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(size, n, *x.shape[1:])

    hidden_SND, rows_SN = split(hidden), jax.tree.map(split, rows)
    weights = unembedding.astype(hidden.dtype)

    def step(carry: tuple, b: Array) -> tuple[tuple, Array | None]:
        total, sums, grad_GDV = carry
        h, r = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, b, 1, keepdims=False), (hidden_SND, rows_SN))
        # Whatever a row that counts for nothing holds (padding may be NaN), 0 · NaN must not reach the gradients.
        h = jnp.where(((r.clm_weight != 0) | (r.fusion_weight != 0))[:, None], h, jnp.zeros((), h.dtype))
        value, parts, dlogits = _block(h, weights, r, weight_clm, options, with_gradients)
        carry_sums = jax.tree.map(jnp.add, sums, parts)
        if dlogits is None:
            return (total + value, carry_sums, None), None
        dlogits = dlogits.astype(h.dtype)
        grad_h = jnp.einsum("tv,dv->td", dlogits, weights, preferred_element_type=jnp.float32)
        h, dlogits = (x.reshape(shards, size // shards, -1) for x in (h, dlogits))
        grad_GDV += jnp.einsum("gtd,gtv->gdv", h, dlogits, preferred_element_type=jnp.float32)
        return (total + value, carry_sums, grad_GDV), grad_h.astype(h.dtype)

    zero = jnp.zeros((), jnp.float32)
    # Each device group adds up its own part; they meet once, after the loop, and not in every block.
    grad_GDV = jnp.zeros((shards, *unembedding.shape), jnp.float32) if with_gradients else None
    carry, grads_NSD = jax.lax.scan(step, (zero, Sums(zero, zero, zero, zero), grad_GDV), jnp.arange(n))
    total, sums, grad_GDV = carry
    if grad_GDV is None:
        return ((total, sums),)
    grad_TD = jnp.swapaxes(jnp.asarray(grads_NSD), 0, 1).reshape(size * n, D)[:T]
    return (total, sums), grad_TD, jnp.sum(grad_GDV, 0)


def _block(
    h: Array, weights: Array, r: Rows, weight_clm: Array, options: Options, with_gradients: bool
) -> tuple[Array, Sums, Array | None]:
    """One block: Σ loss, its parts, and ∂ Σ loss / ∂ (h @ weights)."""
    z = jnp.einsum("td,dv->tv", h, weights, preferred_element_type=jnp.float32) * options.logit_scale
    cap = options.logit_cap
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    z_y = _take(z, r.labels[:, None])[:, 0]
    z_ids = _take(z, r.ids)
    lse, fusion, slope, at_ids = (_tail_terms if options.tail else _plain_terms)(z, z_ids, r, options)
    clm = lse - z_y
    fusion = fusion - r.constant
    if options.nonnegative:
        fusion = jnp.maximum(fusion, 0.0)
    sums = Sums(
        _weighted(r.clm_weight, clm),
        _weighted(r.fusion_weight, fusion),
        options.z_loss * _weighted(r.clm_weight, lse**2),
        _weighted(r.clm_weight, lse - jnp.sum(jnp.exp(z - lse[:, None]) * z, -1))
        if options.model_entropy
        else jnp.zeros((), jnp.float32),
    )
    total = weight_clm * sums.clm + (1 - weight_clm) * sums.fusion + sums.z_loss
    if not with_gradients:
        return total, sums, None
    on_clm = weight_clm * r.clm_weight
    on_fusion = (1 - weight_clm) * r.fusion_weight
    on_p = on_clm + 2 * options.z_loss * r.clm_weight * lse
    dz = slope(on_p, on_fusion)
    ids = jnp.concatenate([r.ids, r.labels[:, None]], -1)
    add = jnp.concatenate([at_ids(on_p, on_fusion), -on_clm[:, None]], -1)
    dz = _add(dz, ids, add)
    if cap is not None:
        dz = dz * (1 - (z / cap) ** 2)
    return total, sums, dz * options.logit_scale


def _plain_terms(z: Array, z_ids: Array, r: Rows, options: Options) -> tuple:
    """(lse, fusion loss, dense part of the gradient, its part at the ids), the support's mass being all there is."""
    τ = options.temperature
    lse = jax.nn.logsumexp(z, -1)
    lse_τ = lse if τ == 1 else jax.nn.logsumexp(z / τ, -1)
    Σq = jnp.sum(r.q, -1)
    fusion = Σq * lse_τ - jnp.sum(r.q * z_ids, -1) / τ

    def slope(on_p: Array, on_fusion: Array) -> Array:
        if τ == 1:
            return (on_p + on_fusion * Σq)[:, None] * jnp.exp(z - lse[:, None])
        tempered = (on_fusion * Σq / τ)[:, None] * jnp.exp(z / τ - lse_τ[:, None])
        return on_p[:, None] * jnp.exp(z - lse[:, None]) + tempered

    def at_ids(on_p: Array, on_fusion: Array) -> Array:
        return -on_fusion[:, None] * r.q / τ

    return lse, fusion, slope, at_ids


def _tail_terms(z: Array, z_ids: Array, r: Rows, options: Options) -> tuple:
    """As `_plain_terms`, with everything outside the support as one more event."""
    τ = options.temperature
    there = r.ids >= 0
    z_ids = jnp.where(there, z_ids, -jnp.inf)
    z_off = _set(z, r.ids, -jnp.inf)
    top = jnp.max(z_off, -1)
    lse_rest = jnp.where(top > -jnp.inf, jax.nn.logsumexp(z_off, -1), -jnp.inf)
    events = jnp.concatenate([z_ids, lse_rest[:, None]], -1)
    exists = events > -jnp.inf  # no tail event where the support is the whole vocabulary
    t = jnp.where(exists, jnp.concatenate([r.q, r.rest[:, None]], -1), 0.0)
    Σt = jnp.sum(t, -1, keepdims=True)
    lse = jax.nn.logsumexp(events, -1)
    log_s = jnp.where(exists, jax.nn.log_softmax(events / τ, -1), 0.0)
    fusion = -jnp.sum(t * log_s, -1)
    g = jnp.where(exists, (Σt * jnp.exp(log_s) - t) / τ, 0.0)
    p = jnp.exp(events - lse[:, None])

    def slope(on_p: Array, on_fusion: Array) -> Array:
        # exp(z − lse_rest) rather than p_i: the model's mass outside the support may be too small for a quotient.
        rest = on_p * p[:, -1] + on_fusion * g[:, -1]
        return rest[:, None] * jnp.exp(z_off - jnp.where(top > -jnp.inf, lse_rest, 0.0)[:, None])

    def at_ids(on_p: Array, on_fusion: Array) -> Array:
        return on_p[:, None] * p[:, :-1] + on_fusion[:, None] * g[:, :-1]

    return lse, fusion, slope, at_ids


def _weighted(weight: Array, value: Array) -> Array:
    """Σ weight·value; a masked row adds exactly 0, whatever its value is."""
    return jnp.sum(jnp.where(weight != 0, weight * value, 0.0))


def _take(z: Array, ids: Array) -> Array:
    """z[t, ids[t, m]]; 0 where the id is out of range."""
    V = z.shape[-1]
    inside = (ids >= 0) & (ids < V)
    return jnp.where(inside, jnp.take_along_axis(z, jnp.clip(ids, 0, V - 1), -1), 0.0)


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

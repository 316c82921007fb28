"""The target's side of a row: its events and their probabilities, from the sparse rows that the fusion leaves.

It is made block by block, beside the logits: rows of a few entries take whole tiles of a TPU's memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from fusejax.kernels.fusion_loss.terms import Options, Rows, Targets
from jax import Array

from fusejax.fusion.mapping import merge_repeated


def targets(rows: Rows, options: Options) -> Targets:
    """Repeats added up, what is no probability left out; scaled to sum 1 without a tail; tempered."""
    ids, q, rest, entropy = _events(rows.ids, rows.probs, options.tail)
    t, t_rest = _tempered(q, rest, ids, options.temperature)
    return Targets(ids, t, t_rest, _entropy(t, t_rest), entropy)


def _events(ids: Array, probs: Array, tail: bool) -> tuple[Array, Array, Array, Array]:
    """(distinct ids, their probabilities, the tail's probability, the entropy of these events)."""
    probs = probs.astype(jnp.float32)
    probs = jnp.where((ids >= 0) & (probs > 0) & jnp.isfinite(probs), probs, 0.0)
    ids, q = merge_repeated(ids, probs)
    if tail:
        rest = _residual(q)
    else:
        total = jnp.sum(q, -1, keepdims=True)
        q = q / jnp.where(total > 0, total, 1.0)
        rest = jnp.zeros(q.shape[:-1], jnp.float32)
    return ids, q, rest, _entropy(q, rest)


def _residual(q: Array) -> Array:
    """max(0, 1 − Σq), exact to about 1e-11: the multiples of 2^-12 in q add up without rounding, and then the rests."""
    coarse = jnp.round(q * 4096) / 4096
    return jnp.maximum((1 - jnp.sum(coarse, -1)) - jnp.sum(q - coarse, -1), 0.0)


def _tempered(q: Array, rest: Array, ids: Array, temperature: float) -> tuple[Array, Array]:
    """Event probabilities to the power 1/τ, scaled to sum 1; rows without any stay empty."""
    if temperature == 1:
        return q, rest
    log_t = jnp.log(jnp.concatenate([jnp.where(ids >= 0, q, 0.0), rest[..., None]], -1)) / temperature
    top = jnp.max(log_t, -1, keepdims=True)
    t = jnp.exp(log_t - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(t, -1, keepdims=True)
    t = t / jnp.where(total > 0, total, 1.0)
    return t[..., :-1], t[..., -1]


def _entropy(q: Array, rest: Array) -> Array:
    return -jnp.sum(_x_log_x(q), -1) - _x_log_x(rest)


@partial(jax.jit, inline=True)
def _x_log_x(x: Array) -> Array:
    return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)

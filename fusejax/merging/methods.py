"""Merging methods: pure functions of one tensor of every model.

N models, each tensor float32 of any shape S; `base` [S] is the model that all of them were trained from, and a *task
vector* is a model's tensor minus the base's. Weights are float32 [N]. All functions can be jitted, with the numbers and
switches after the arrays static.

Everything is per tensor: a fraction of elements is kept of each tensor, and angles are those between tensors.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

_COLLINEAR = 0.9995  # cosine above which the great circle is too short to divide by its sine


def linear(models_NS: jax.Array, weights_N: jax.Array, normalize: bool = True) -> jax.Array:
    """Σ w_i θ_i, over Σ w_i with `normalize` (model soups, Wortsman et al. 2022, arXiv:2203.05482)."""
    total = _combine(models_NS, weights_N)
    return total / _or_one(weights_N.sum()) if normalize else total


def slerp(start: jax.Array, end: jax.Array, t: float) -> jax.Array:
    """The point at `t` of the great circle from `start` to `end` (Shoemake 1985, SIGGRAPH).

    sin((1−t)Ω)/sin Ω · start + sin(tΩ)/sin Ω · end, Ω the angle between the two as vectors. Where they are nearly
    collinear, or one is zero, it is the straight line.
    """
    norms = jnp.linalg.norm(start.ravel()) * jnp.linalg.norm(end.ravel())
    cosine = jnp.vdot(start, end) / jnp.where(norms > 0, norms, 1.0)
    straight = (jnp.abs(cosine) > _COLLINEAR) | (norms == 0)
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    from_start = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    from_end = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
    return from_start * start + from_end * end


def task_arithmetic(
    base: jax.Array, models_NS: jax.Array, weights_N: jax.Array, scale: float = 1.0, normalize: bool = False
) -> jax.Array:
    """base + scale · Σ w_i (θ_i − base) (Ilharco et al. 2023, arXiv:2212.04089); over Σ w_i with `normalize`."""
    change = _combine(models_NS - base, weights_N)
    return base + scale * (change / _or_one(weights_N.sum()) if normalize else change)


def ties(
    base: jax.Array,
    models_NS: jax.Array,
    weights_N: jax.Array,
    density: Sequence[float],
    scale: float = 1.0,
    normalize: bool = True,
) -> jax.Array:
    """Trim, elect a sign, merge what agrees (Yadav et al. 2023, arXiv:2306.01708).

    Of each task vector the `density[i]` part that is largest in magnitude stays; see `consensus` for the rest.
    """
    kept = [keep_largest(model - base, part) for model, part in zip(models_NS, density, strict=True)]
    return base + scale * consensus(jnp.stack(kept), weights_N, normalize)


def dare(
    base: jax.Array,
    models_NS: jax.Array,
    weights_N: jax.Array,
    density: Sequence[float],
    key: jax.Array,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    elect_sign: bool = False,
) -> jax.Array:
    """Drop elements of the task vectors at random, and rescale (Yu et al. 2024, arXiv:2311.03099).

    Each element of task vector i stays with probability density[i] and is divided by it (`rescale`), so that its
    expectation stays. They are added as in `task_arithmetic`, or with `elect_sign` by `consensus`. key: of this tensor;
    the same key gives the same result on any number of devices.
    """
    kept = []
    for i, (model, part) in enumerate(zip(models_NS, density, strict=True)):
        stays = jax.random.bernoulli(jax.random.fold_in(key, i), part, base.shape)
        kept.append(jnp.where(stays, (model - base) / (part if rescale else 1.0), 0.0))
    deltas_NS = jnp.stack(kept)
    if elect_sign:
        return base + scale * consensus(deltas_NS, weights_N, normalize)
    change = _combine(deltas_NS, weights_N)
    return base + scale * (change / _or_one(weights_N.sum()) if normalize else change)


def sce(
    base: jax.Array,
    models_NS: jax.Array,
    top: float = 1.0,
    select: Literal["mask", "weigh"] = "mask",
    scale: float = 1.0,
    normalize: bool = True,
) -> jax.Array:
    """Select, calculate, erase (FuseChat, Wan et al. 2024, arXiv:2408.07990, section 3.3).

    Select: the `top` part of the positions at which the task vectors vary at all, those with the largest variance over
    the models. Calculate: the weight of a model is its share of the squares of the selected elements,
    w_i = Σ δ_i² / Σ_j Σ δ_j². Erase: elements whose sign is not that of the models' sum are left out.

    The paper can be read in two ways. With `mask`, positions that were not selected are zero in all that follows, and
    keep the base's value; with `weigh` the selection decides the weights alone, and whole task vectors are merged.
    normalize: at each position divide by the weights of what was not erased (a mean); else the weighted sum.
    """
    deltas_NS = models_NS - base
    selected_NS = jnp.where(most_varied(deltas_NS, top), deltas_NS, 0.0) if top < 1 else deltas_NS
    squares_N = jnp.square(selected_NS).reshape(len(selected_NS), -1).mean(1)
    total = squares_N.sum()
    weights_N = jnp.where(total > 0, squares_N / _or_one(total), 1 / len(squares_N))
    merged_NS = selected_NS if select == "mask" else deltas_NS
    agrees_NS = jnp.sign(merged_NS) == _majority(merged_NS)
    return base + scale * _agreeing(merged_NS, weights_N, agrees_NS, normalize)


def consensus(deltas_NS: jax.Array, weights_N: jax.Array, normalize: bool) -> jax.Array:
    """The weighted sum (or with `normalize` mean) over the task vectors whose weighted element has the elected sign.

    Elected at each position is the sign of the weighted sum; + where that is zero. Zeros agree with no sign.
    """
    weighted_NS = deltas_NS * _column(weights_N, deltas_NS.ndim)
    agrees_NS = jnp.sign(weighted_NS) == _majority(weighted_NS)
    return _agreeing(deltas_NS, weights_N, agrees_NS, normalize)


def keep_largest(delta: jax.Array, density: float) -> jax.Array:
    """`delta` with all but the ⌊density · size⌋ elements of largest magnitude set to 0; of equals, the first stay."""
    return jnp.where(_largest(jnp.abs(delta), int(density * delta.size)), delta, 0.0) if density < 1 else delta


def most_varied(deltas_NS: jax.Array, top: float) -> jax.Array:
    """bool [S]: the ⌊top · n⌋ positions of largest variance over the models, of the n where it is not zero."""
    variance_S = jnp.var(deltas_NS, axis=0)
    count = jnp.floor(top * (variance_S > 0).sum()).astype(jnp.int32)
    return _largest(variance_S, count) & (variance_S > 0)


def _largest(values: jax.Array, count: jax.Array | int) -> jax.Array:
    """bool, like `values`: exactly the `count` largest; of equals, the first."""
    flat = values.ravel()
    # The least that is in; taken from the sorted values, since an index cannot be beyond them.
    limit = jnp.sort(flat)[jnp.clip(flat.size - count, 0, flat.size - 1)]
    above, equal = flat > limit, flat == limit
    room = count - above.sum()
    chosen = above | (equal & (jnp.cumsum(equal) <= room))
    return (chosen & (count > 0)).reshape(values.shape)


def _majority(values_NS: jax.Array) -> jax.Array:
    return jnp.where(values_NS.sum(0) >= 0, 1.0, -1.0)


def _agreeing(deltas_NS: jax.Array, weights_N: jax.Array, agrees_NS: jax.Array, normalize: bool) -> jax.Array:
    weights_NS = jnp.where(agrees_NS, _column(weights_N, deltas_NS.ndim), 0.0)
    total = (deltas_NS * weights_NS).sum(0)
    return total / _or_one(weights_NS.sum(0)) if normalize else total


def _combine(values_NS: jax.Array, weights_N: jax.Array) -> jax.Array:
    return (values_NS * _column(weights_N, values_NS.ndim)).sum(0)


def _column(weights_N: jax.Array, ndim: int) -> jax.Array:
    return weights_N.reshape(-1, *[1] * (ndim - 1))


def _or_one(divisor: jax.Array) -> jax.Array:
    """What to divide by: weights that sum to nothing leave the sum as it is."""
    return jnp.where(divisor == 0, 1.0, divisor)

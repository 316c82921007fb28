"""What a device finds in its own columns of the vocabulary, and how the findings of several become one result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.reference import TopK


class Candidates(NamedTuple):
    """values float32 [T, k], logits sorted descending, −inf where there are fewer columns; ids int32 [T, k], theirs;
    lse float32 [T], logsumexp of the logits; label float32 [T], the label's logit, 0 where it is elsewhere.
    """

    values: jax.Array
    ids: jax.Array
    lse: jax.Array
    label: jax.Array


def across(found: Candidates, axis: str) -> Candidates:
    """The whole vocabulary's from those of each device of a mesh axis, in the order of their columns."""
    k = found.values.shape[1]
    mine = jnp.concatenate([found.values, found.lse[:, None], found.label[:, None]], axis=1)
    gathered = jax.lax.all_gather(mine, axis)  # [devices, T, k + 2]
    lse, label = jax.nn.logsumexp(gathered[..., k], axis=0), gathered[..., k + 1].sum(axis=0)
    if not k:
        return Candidates(found.values, found.ids, lse, label)
    # Lower columns come first, and top_k keeps the first of equals: ties go to the lower id.
    both = jnp.moveaxis(gathered[..., :k], 0, 1).reshape(-1, gathered.shape[0] * k)
    ids = jax.lax.all_gather(found.ids, axis, axis=1, tiled=True)
    values, order = jax.lax.top_k(both, k)
    return Candidates(values, jnp.take_along_axis(ids, order, axis=1), lse, label)


def finish(found: Candidates, labels_T: jax.Array) -> TopK:
    """Logits to log-probabilities and cross-entropy."""
    ce = jnp.where(labels_T >= 0, found.lse - found.label, 0.0)
    return TopK(found.ids, found.values - found.lse[:, None], found.lse, ce)

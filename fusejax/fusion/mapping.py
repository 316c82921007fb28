"""One source's sparse rows, brought into the target's vocabulary."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

from fusejax import arguments

Collisions = Literal["sum", "first"]
Tail = Literal["tail", "renormalize"]


class TokenTable(NamedTuple):
    """What each source token becomes in the target's vocabulary, after its first c bytes were consumed.

    ids: int32[Vs, C], column c: the target id for the token's bytes after the first c; −1: none.
    prefix_hash: uint32[Vs, C], column c > 0: a hash of the token's first c bytes, 0 where nothing follows them; column
    0: one value for all. C = 1 without `inside` rows.
    """

    ids: Array
    prefix_hash: Array


class MappedRows(NamedTuple):
    """One source's rows in the target's vocabulary.

    ids: int32[..., M], no id twice in a row. probs: float32[..., M]. valid: bool[...]: the row can be used.
    mass: float32[...]: the probability that the top-k cut and the token map left (0 where not valid).
    """

    ids: Array
    probs: Array
    valid: Array
    mass: Array


def merge_repeated(ids: Array, probs: Array, how: Collisions = "sum") -> tuple[Array, Array]:
    """Give each id of a row once: its first entry takes the sum of the probabilities, or keeps its own (`first`).

    ids int32[..., M], probs float32[..., M]; returns the same shapes, emptied entries being (−1, 0). Costs M² compares
    for a row, which is little beside a row of logits and, unlike a sort, fuses into one pass.

    >>> ids, probs = merge_repeated(jnp.array([7, 3, 7]), jnp.array([0.5, 0.25, 0.125]))
    >>> ids.tolist(), probs.tolist()
    ([7, 3, -1], [0.625, 0.25, 0.0])
    """
    arguments.one_of("how", how, get_args(Collisions))
    M = ids.shape[-1]
    same_MxM = ids[..., :, None] == ids[..., None, :]
    earlier_MxM = jnp.arange(M)[None, :] < jnp.arange(M)[:, None]
    first = (ids >= 0) & ~jnp.any(same_MxM & earlier_MxM, -1)
    if how == "sum":
        probs = jnp.sum(jnp.where(same_MxM, probs[..., None, :], 0.0), -1)
    return jnp.where(first, ids, -1), jnp.where(first, probs, 0.0)


def map_rows(
    ids: Array,
    logprobs: Array,
    valid: Array,
    table: TokenTable,
    *,
    consumed: Array | None = None,
    source_labels: Array | None = None,
    gold_logprobs: Array | None = None,
    labels: Array | None = None,
    collisions: Collisions = "sum",
    tail: Tail = "tail",
) -> MappedRows:
    """Bring one source's rows into the target's vocabulary.

    ids int32[..., K], logprobs float[..., K] (natural logarithms of the source's own probabilities), valid bool[...].
    An id without an image, or beyond the table, is dropped; so is an entry whose log-probability is not finite; one
    above 0 counts as 0. Entries that meet at one
    target id are added (`collisions="sum"`), or the first, which is the likeliest, wins (`first`, as in FuseLLM).
    `tail="tail"` keeps the source's probabilities, so a row may add up to less than 1; `renormalize` scales it to 1.
    A row of which nothing is left is not valid.

    Rows inside a token: with consumed int32[...] = c > 0 bytes of the source's true next token source_labels int32[...]
    already in the context, only tokens that begin with these bytes and go on stay, divided by the probability of these
    bytes, because the row now is a distribution of the text after them. What the tail adds to that probability is not
    known: it is taken to hold these bytes as often as the row's own tokens do, so that the tail keeps its share. A
    token that goes on but has no image is among them, and its probability joins the tail, as without consumed bytes.

    Gold chain: with gold_logprobs float[...] (log-probability from this source row on that its true tokens spell the
    true next target token; −inf: none) and labels int32[...] (that target token), probability is moved from the image
    of the source's true next token to the label, at most what is there, and the rest is added. For c > 0 the value is
    that of the consumed bytes and the label together: it is divided here by the probability of the consumed bytes. The
    row gets one entry more: M = K + 1, else M = K. The total never exceeds 1.

    Raises ValueError for shapes that do not belong together and for unknown options.
    """
    arguments.one_of("collisions", collisions, get_args(Collisions))
    arguments.one_of("tail", tail, get_args(Tail))
    arguments.shape("logprobs", logprobs, ids.shape, "that of ids")
    per_row = {"valid": valid, "consumed": consumed, "source_labels": source_labels}
    per_row |= {"gold_logprobs": gold_logprobs, "labels": labels}
    for name, array in per_row.items():
        arguments.shape(name, array, ids.shape[:-1], f"the leading dimensions of ids {ids.shape}")
    c = jnp.zeros(valid.shape, jnp.int32) if consumed is None else consumed
    probs = _probabilities(ids, logprobs)
    norm = jnp.ones(valid.shape, jnp.float32)
    images = jnp.where(jnp.isfinite(logprobs), _lookup(table.ids, ids, c[..., None], -1), -1)
    if consumed is not None:
        if source_labels is None:
            raise ValueError("map_rows: `consumed` needs `source_labels`")
        begun = _lookup(table.prefix_hash, source_labels, c, 0)
        follows = _lookup(table.prefix_hash, ids, c[..., None], 0) == begun[..., None]
        images = jnp.where((c[..., None] == 0) | follows, images, -1)
        valid = valid & (c < table.ids.shape[1])
        listed = jnp.minimum(jnp.sum(probs, -1), 1.0)  # the rest is the tail
        going_on = jnp.sum(jnp.where(follows, probs, 0.0), -1)
        norm = jnp.where((c > 0) & (going_on > 0), going_on / jnp.where(listed > 0, listed, 1.0), 1.0)
    probs = jnp.where(images >= 0, probs, 0.0)
    images, probs = merge_repeated(images, probs, collisions)
    kept = jnp.sum(probs, -1)
    valid = valid & (kept > 0)
    probs = probs / norm[..., None]
    mass = jnp.minimum(kept / norm, 1.0)
    if gold_logprobs is not None:
        if labels is None or source_labels is None:
            raise ValueError("map_rows: `gold_logprobs` needs `labels` and `source_labels`")
        gold = jnp.minimum(_probabilities(labels, gold_logprobs) / norm, 1.0)
        first_image = _lookup(table.ids, source_labels, c, -1)
        images, probs = _move_to_gold(images, probs, labels, first_image, gold)
    total = jnp.sum(probs, -1)
    scale = total if tail == "renormalize" else jnp.maximum(total, 1.0)
    probs = jnp.where(valid[..., None], probs / jnp.where(valid, scale, 1.0)[..., None], 0.0)
    images = jnp.where(valid[..., None], images, -1)
    return MappedRows(images, probs, valid, jnp.where(valid, mass, 0.0))


def _probabilities(ids: Array, logprobs: Array) -> Array:
    """exp(logprobs) in float32; 0 for empty entries and for values that are no logarithm of a probability."""
    logprobs = logprobs.astype(jnp.float32)
    usable = (ids >= 0) & jnp.isfinite(logprobs)
    return jnp.where(usable, jnp.exp(jnp.minimum(jnp.where(usable, logprobs, 0.0), 0.0)), 0.0)


def _lookup(table: Array, ids: Array, column: Array, missing: int) -> Array:
    """table[ids, column]; `missing` where either is out of range."""
    rows, columns = table.shape
    table = jnp.asarray(table)
    known = (ids >= 0) & (ids < rows) & (column >= 0) & (column < columns)
    flat = jnp.clip(ids, 0, rows - 1) * columns + jnp.clip(column, 0, columns - 1)
    return jnp.where(known, table.reshape(-1)[flat], jnp.asarray(missing, table.dtype))


def _move_to_gold(ids: Array, probs: Array, labels: Array, image: Array, gold: Array) -> tuple[Array, Array]:
    """Take `gold` of probability from entry `image`, as far as it is there, and add all of it to entry `labels`."""
    moves = (labels >= 0) & (gold > 0)
    at_image = (ids == image[..., None]) & (ids >= 0) & moves[..., None]
    probs = jnp.where(at_image, jnp.maximum(probs - gold[..., None], 0.0), probs)
    ids = jnp.concatenate([ids, jnp.where(moves, labels, -1)[..., None]], -1)
    probs = jnp.concatenate([probs, jnp.where(moves, gold, 0.0)[..., None]], -1)
    return merge_repeated(ids, probs)

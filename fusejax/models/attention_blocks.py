"""Attention in plain operations, a block of queries at a time, with a backward pass of its own.

The forward pass keeps each query's log-sum-exp beside its output, and the backward pass makes a block's probabilities
anew from it (FlashAttention-2, Dao 2023, algorithms 1 and 2, with whole rows of scores instead of tiles): one pass over
the scores in the place of softmax's own derivative. Every product is written so that the scores come to it as they lie;
on CPUs XLA would write them once more, transposed. Shapes as in `attention`; R = N / G query heads share a key head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fusejax.models.attention import Features, Tokens, alibi_bias, visible

QUERY_BLOCK = 128
PARTS = 4  # of a row, each with a program of its own


def attend_by_head(
    query_BQNK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    tokens: Tokens,
    features: Features,
    at_once: int,
    block: int = QUERY_BLOCK,
) -> jax.Array:
    """`attend_blockwise` of `at_once` pairs of a row and a key head after another.

    With a pair for each core of a CPU the scores of a block stay in that core's own cache. Neither rows nor heads may
    lie on several devices, and `features` may have no ALiBi, whose slopes are of all heads.
    """
    B, L, N, K = query_BQNK.shape
    G = key_BSGK.shape[2]

    def pair(heads: tuple[jax.Array, ...], places: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        query_1LRK, key_1L1K, value_1L1K = (array[None] for array in heads)
        here = Tokens(tokens.index_L, *places)
        return attend_blockwise(query_1LRK, key_1L1K, value_1L1K, here, here, features, block)[0]

    def place(array_BL: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.broadcast_to(array_BL, (B, L)), G, axis=0)[:, None]

    query_PLRK = query_BQNK.reshape(B, L, G, N // G, K).transpose(0, 2, 1, 3, 4).reshape(B * G, L, N // G, K)
    key_PL1K, value_PL1K = (x.transpose(0, 2, 1, 3).reshape(B * G, L, 1, K) for x in (key_BSGK, value_BSGK))
    places = jax.tree.map(place, (tokens.positions_BL, tokens.segments_BL))
    mixed = jax.lax.map(lambda of: pair(*of), ((query_PLRK, key_PL1K, value_PL1K), places), batch_size=at_once)
    return mixed.reshape(B, G, L, N // G, K).transpose(0, 2, 1, 3, 4).reshape(B, L, N, K)


def attend_blockwise(
    query_BQNK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    queries: Tokens,
    keys: Tokens,
    features: Features,
    block: int = QUERY_BLOCK,
) -> jax.Array:
    """`attention.attend_xla`, `block` queries at a time: the scores take B N block S floats and not B N Q S.

    Where the queries stand where the keys stand, the row is done in up to `PARTS` parts, each over the keys up to its
    end only: 5/8 of the work at 4 parts. Reverse-mode derivatives alone.
    """
    n = query_BQNK.shape[1]
    size = -(-n // (PARTS * block)) * block
    if queries is not keys or size >= n:
        return _attend_blocks(query_BQNK, key_BSGK, value_BSGK, queries, keys, features, block)

    def tokens(start: int, stop: int) -> Tokens:
        return jax.tree.map(lambda array: array[..., start:stop], queries)

    parts: list[jax.Array] = []
    for start in range(0, n, size):
        query_part = query_BQNK[:, start : start + size]
        if parts:  # one after another: else the scores of several would be held at the same time
            query_part, parts[-1] = jax.lax.optimization_barrier((query_part, parts[-1]))
        stop = start + size
        keys_part, values_part = key_BSGK[:, :stop], value_BSGK[:, :stop]
        here = tokens(start, stop), tokens(0, stop)
        parts.append(_attend_blocks(query_part, keys_part, values_part, *here, features, block))
    return jnp.concatenate(parts, axis=1)


class _Saved(NamedTuple):
    """What the backward pass needs. logsumexp: float32 [blocks, B, G, R, block]."""

    query_BQNK: jax.Array
    key_BSGK: jax.Array
    value_BSGK: jax.Array
    queries: Tokens
    keys: Tokens
    mixed_BQNK: jax.Array
    logsumexp: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend_blocks(
    query_BQNK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    queries: Tokens,
    keys: Tokens,
    features: Features,
    block: int,
) -> jax.Array:
    return _forward(query_BQNK, key_BSGK, value_BSGK, queries, keys, features, block)[0]


def _forward(
    query_BQNK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    queries: Tokens,
    keys: Tokens,
    features: Features,
    block: int,
) -> tuple[jax.Array, _Saved]:
    key_BGKS, value_BGSK = key_BSGK.transpose(0, 2, 3, 1), value_BSGK.transpose(0, 2, 1, 3)

    def mix(rows: tuple[jax.Array, Tokens]) -> tuple[jax.Array, jax.Array]:
        scores, _ = _scores(rows[0], key_BGKS, rows[1], keys, features)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        exps = jnp.exp(scores - highest)
        sums = jnp.sum(exps, axis=-1, keepdims=True)
        mixed = _over_keys(exps.astype(query_BQNK.dtype), value_BGSK) / sums
        return mixed.astype(query_BQNK.dtype), (highest + jnp.log(sums))[..., 0]

    heads = query_BQNK.shape[2], key_BSGK.shape[2]
    blocks = _heads_first(_split(query_BQNK, 1, block), heads), _split_tokens(queries, block)
    mixed, logsumexp = jax.lax.map(mix, blocks)
    mixed_BQNK = _heads_last(mixed, query_BQNK.shape)
    return mixed_BQNK, _Saved(query_BQNK, key_BSGK, value_BSGK, queries, keys, mixed_BQNK, logsumexp)


def _backward(features: Features, block: int, saved: _Saved, gradient_BQNK: jax.Array) -> tuple[Any, ...]:
    query_BQNK, key_BSGK, value_BSGK, queries, keys, mixed_BQNK, logsumexp = saved
    dtype, heads = query_BQNK.dtype, (query_BQNK.shape[2], key_BSGK.shape[2])
    key_BGSK, key_BGKS = key_BSGK.transpose(0, 2, 1, 3), key_BSGK.transpose(0, 2, 3, 1)
    value_BGKS = value_BSGK.transpose(0, 2, 3, 1)

    def gradients(sums: tuple[jax.Array, jax.Array], rows: tuple[Any, ...]) -> tuple[Any, jax.Array]:
        query, tokens, mixed, gradient, lse = rows
        scores, slope = _scores(query, key_BGKS, tokens, keys, features)
        probs = jnp.exp(scores - lse[..., None])
        along = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
        of_scores = features.scale * probs * (_with_keys(gradient, value_BGKS) - along)
        if slope is not None:
            of_scores *= slope
        of_scores = of_scores.astype(dtype)
        of_key, of_value = _over_queries(query, of_scores), _over_queries(gradient, probs.astype(dtype))
        return (sums[0] + of_key, sums[1] + of_value), _over_keys(of_scores, key_BGSK).astype(dtype)

    # The rows that fill up the last block get a gradient of 0, and so give none.
    blocks = (
        _heads_first(_split(query_BQNK, 1, block), heads),
        _split_tokens(queries, block),
        _heads_first(_split(mixed_BQNK, 1, block), heads),
        _heads_first(_split(gradient_BQNK, 1, block, mode="constant"), heads),
        logsumexp,
    )
    zeros = jnp.zeros(key_BGKS.shape, jnp.float32), jnp.zeros(value_BGKS.shape, jnp.float32)
    (of_key, of_value), of_query = jax.lax.scan(gradients, zeros, blocks)
    of_key, of_value = (x.transpose(0, 3, 1, 2).astype(dtype) for x in (of_key, of_value))
    return _heads_last(of_query, query_BQNK.shape), of_key, of_value, None, None


_attend_blocks.defvjp(_forward, _backward)


def _scores(
    query_BGRQK: jax.Array, key_BGKS: jax.Array, queries: Tokens, keys: Tokens, features: Features
) -> tuple[jax.Array, jax.Array | None]:
    """(float32 scores [B, G, R, Q, S] with -inf where a key is not seen, the soft cap's derivative there or None)."""
    scores, slope = features.scale * _with_keys(query_BGRQK, key_BGKS), None
    if features.softcap is not None:
        capped = jnp.tanh(scores / features.softcap)
        scores, slope = features.softcap * capped, 1 - capped**2
    if features.alibi is not None:
        scores += alibi_bias(queries, keys, features.alibi).reshape(-1, *scores.shape[1:])
    return jnp.where(visible(queries, keys, features.window)[:, :, None], scores, -jnp.inf), slope


def _with_keys(rows_BGRQK: jax.Array, keys_BGKS: jax.Array) -> jax.Array:
    """Products of every row with every key, float32 [B, G, R, Q, S]."""
    product = _product("bgxk,bgks->bgxs", _flat(rows_BGRQK), keys_BGKS)
    return product.reshape(*rows_BGRQK.shape[:4], keys_BGKS.shape[-1])


def _over_keys(weights_BGRQS: jax.Array, values_BGSK: jax.Array) -> jax.Array:
    """Σ over the keys of weight times value, float32 [B, G, R, Q, K]."""
    product = _product("bgxs,bgsk->bgxk", _flat(weights_BGRQS), values_BGSK)
    return product.reshape(*weights_BGRQS.shape[:4], values_BGSK.shape[-1])


def _over_queries(rows_BGRQK: jax.Array, weights_BGRQS: jax.Array) -> jax.Array:
    """Σ over the queries of row times weight, float32 [B, G, K, S]."""
    return _product("bgkx,bgxs->bgks", _flat(rows_BGRQK).swapaxes(2, 3), _flat(weights_BGRQS))


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _flat(array_BGRQx: jax.Array) -> jax.Array:
    """The query heads of a key head, one after another: [B, G, R Q, ...]."""
    B, G, R, Q, last = array_BGRQx.shape
    return array_BGRQx.reshape(B, G, R * Q, last)


def _split(array: jax.Array, axis: int, block: int, mode: str = "edge") -> jax.Array:
    """[blocks, ..., block, ...]. By default what fills up the last block stands where the last row stands."""
    n = array.shape[axis]
    n_blocks = -(-n // block)
    widths = [(0, n_blocks * block - n if at == axis else 0) for at in range(array.ndim)]
    padded = jnp.pad(array, widths, mode=mode)
    return jnp.moveaxis(padded.reshape(*array.shape[:axis], n_blocks, block, *array.shape[axis + 1 :]), axis, 0)


def _split_tokens(tokens: Tokens, block: int) -> Tokens:
    return jax.tree.map(lambda array: _split(array, array.ndim - 1, block), tokens)


def _heads_first(blocks: jax.Array, heads: tuple[int, int]) -> jax.Array:
    """[n, B, Q, N, K] → [n, B, G, R, Q, K]; heads: (N, G)."""
    n, B, Q, N, K = blocks.shape
    return blocks.reshape(n, B, Q, heads[1], N // heads[1], K).transpose(0, 1, 3, 4, 2, 5)


def _heads_last(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[n, B, G, R, Q, K] → `shape`, [B, L, N, K], without the last block's filling."""
    n, B, G, R, Q, K = blocks.shape
    return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * Q, G * R, K)[:, : shape[1]]

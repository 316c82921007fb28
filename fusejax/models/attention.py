"""Causal self-attention over packed documents: rotation, ALiBi and the masked softmax.

Shapes: B sequences, L tokens, N query heads, G key/value heads (N is a multiple of G), K features of a head.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Position of every token in its own segment, int32 [B, L]: 0 where a segment begins, then 1, 2, ..."""
    index_L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)
    before_BL = jnp.pad(segment_ids_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begin_BL = jnp.where(segment_ids_BL != before_BL, index_L, 0)
    return index_L - jax.lax.cummax(begin_BL, axis=1)


def segment_lengths(segment_ids_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """Tokens of the document that each token is of, int32 [B, L]: 1 + the position at the end of its run of ids."""
    length = segment_ids_BL.shape[1]
    after_BL = jnp.pad(segment_ids_BL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends_BL = jnp.where(segment_ids_BL != after_BL, jnp.arange(length, dtype=jnp.int32), length)
    return 1 + jnp.take_along_axis(positions_BL, jax.lax.cummin(ends_BL, axis=1, reverse=True), axis=1)


def causal_mask(segment_ids_BL: jax.Array) -> jax.Array:
    """Which key each query sees, bool [B, 1, L, L]: the same segment, not later.

    Padding (segment 0) is a segment like any other: it sees and is seen by padding only. So every row sees
    at least itself, and no softmax runs over nothing.
    """
    length = segment_ids_BL.shape[1]
    same_BLL = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    return (same_BLL & jnp.tri(length, dtype=bool))[:, None]


def rotate(heads_BLNK: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate the first `rotary_dim` features of each head, the rest pass through; the dtype stays.

    cos, sin: float32 [B, L, 1, rotary_dim / 2]. Feature i is paired with feature i + rotary_dim/2, the layout of most
    Hugging Face checkpoints; where `interleaved`, 2i with 2i + 1.
    """
    half = cos.shape[-1]
    rotated, rest = heads_BLNK[..., : 2 * half], heads_BLNK[..., 2 * half :]
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else jnp.split(rotated, 2, axis=-1)
    parts = [x.astype(heads_BLNK.dtype) for x in (first * cos - second * sin, second * cos + first * sin)]
    joined = jnp.stack(parts, axis=-1).reshape(rotated.shape) if interleaved else jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([joined, rest], axis=-1)


def alibi_slopes(n_heads: int, bias_max: float) -> np.ndarray:
    """One slope per head, float32 [N] (ALiBi, Press et al. 2022, section 3, in MPT's form).

    With P the next power of two, 2^(-bias_max * h / P) for h = 1..P; where N is not a power of two, every second
    slope first and then the ones between, cut at N.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    slopes = 2.0 ** (-bias_max / power * np.arange(1, power + 1))
    if power != n_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes.astype(np.float32)


def alibi_bias(positions_BL: jax.Array, slopes_N: np.ndarray, scale: float = 1.0, bf16: bool = False) -> jax.Array:
    """scale * slope * (key position - query position), float32 [B, N, L, L].

    bf16: slope, position and their product are each rounded to bfloat16 first, as Falcon was trained.
    Made from small arrays right where it is added, so that XLA fuses it and keeps no copy per layer.
    """

    def rounded(x: jax.Array) -> jax.Array:  # a cast there and back is one that XLA may leave out
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if bf16 else x

    slopes, positions = rounded(jnp.asarray(slopes_N)), rounded(positions_BL.astype(jnp.float32))
    height_BNL = rounded(slopes[None, :, None] * positions[:, None])
    return scale * (height_BNL[:, :, None, :] - height_BNL[:, :, :, None])


def attend(
    query_BLNK: jax.Array,
    key_BLGK: jax.Array,
    value_BLGK: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(softcap(scale * q·k) + bias) v over the keys that `mask` allows, [B, L, N, K] in the query's dtype.

    mask: bool [B, 1, L, L], with at least one key for every query; bias: float32 [B, N, L, L]. window: a query sees
    its own token and the window - 1 tokens before it. softcap: cap * tanh(x / cap). Scores and softmax
    are float32. Heads come before tokens in every product: on CPUs XLA is a quarter faster that way than with
    `jax.nn.dot_product_attention`, whose cuDNN implementation takes no segment ids.
    """
    B, L, N, K = query_BLNK.shape
    G = key_BLGK.shape[2]
    query_BGRLK = query_BLNK.reshape(B, L, G, N // G, K).transpose(0, 2, 3, 1, 4)
    key_BGLK, value_BGLK = key_BLGK.transpose(0, 2, 1, 3), value_BLGK.transpose(0, 2, 1, 3)
    scores_BGRLL = scale * jnp.einsum("bgrqk,bgsk->bgrqs", query_BGRLK, key_BGLK, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_BGRLL = softcap * jnp.tanh(scores_BGRLL / softcap)
    if bias is not None:
        scores_BGRLL += bias.reshape(B, G, N // G, L, L)
    if window is not None:
        mask &= ~jnp.tri(L, k=-window, dtype=bool)
    scores_BGRLL = jnp.where(mask[:, :, None], scores_BGRLL, -jnp.inf)
    weights_BGRLL = jax.nn.softmax(scores_BGRLL, axis=-1).astype(query_BLNK.dtype)
    mixed_BGRLK = jnp.einsum("bgrqs,bgsk->bgrqk", weights_BGRLL, value_BGLK)
    return mixed_BGRLK.transpose(0, 3, 1, 2, 4).reshape(B, L, N, K)

"""Causal self-attention over packed documents: rotation, ALiBi and the masked softmax.

Shapes: B sequences, L tokens (or Q queries and S keys), N query heads, G key/value heads (N is a multiple of G), K
features of a head.
"""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import UserError

WHOLE_UP_TO = 512  # queries; more are done in blocks


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


class Alibi(NamedTuple):
    """Attention with linear biases: scale * slope * (key position - query position) is added to the scores."""

    slopes: tuple[float, ...]  # one per head
    scale: float = 1.0
    bf16: bool = False  # slope, position and their product are each rounded to bfloat16, as Falcon was trained


class Features(NamedTuple):
    """What a model's attention has beside the causal mask; every implementation honours all of it or refuses."""

    scale: float
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None = None  # scores become cap * tanh(scores / cap)
    alibi: Alibi | None = None


class Tokens(NamedTuple):
    """Where queries or keys stand. A token sees the tokens of its own segment that are not after it.

    Padding (segment 0) is a segment like any other: it sees and is seen by padding only. So a token sees at least
    itself, and no softmax runs over nothing.
    """

    index_L: jax.Array  # int32: the order of the tokens in the row
    positions_BL: jax.Array  # int32: what ALiBi takes distances of
    segments_BL: jax.Array | None  # int32; None where all tokens are of one segment

    @classmethod
    def of(cls, positions_BL: jax.Array, segments_BL: jax.Array | None = None) -> "Tokens":
        """Tokens that stand one after the other."""
        return cls(jnp.arange(positions_BL.shape[1], dtype=jnp.int32), positions_BL, segments_BL)


def visible(queries: Tokens, keys: Tokens, window: int | None = None) -> jax.Array:
    """Which key each query sees, bool [B or 1, 1, Q, S]."""
    distance_QS = queries.index_L[:, None] - keys.index_L[None, :]
    mask_BQS = (distance_QS >= 0)[None]
    if window is not None:
        mask_BQS &= (distance_QS < window)[None]
    if queries.segments_BL is not None and keys.segments_BL is not None:
        mask_BQS &= queries.segments_BL[:, :, None] == keys.segments_BL[:, None, :]
    return mask_BQS[:, None]


def alibi_bias(queries: Tokens, keys: Tokens, alibi: Alibi) -> jax.Array:
    """What ALiBi adds to the scores, float32 [B, N, Q, S].

    Made from small arrays right where it is added, so that XLA fuses it and keeps no copy per layer.
    """

    def rounded(x: jax.Array) -> jax.Array:  # a cast there and back is one that XLA may leave out
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if alibi.bf16 else x

    def height(tokens: Tokens) -> jax.Array:
        slopes_N, positions_BL = jnp.asarray(alibi.slopes, jnp.float32), tokens.positions_BL.astype(jnp.float32)
        return rounded(rounded(slopes_N)[None, :, None] * rounded(positions_BL)[:, None])

    return alibi.scale * (height(keys)[:, :, None, :] - height(queries)[:, :, :, None])


class Backend(NamedTuple):
    """Which implementation attends, and where: `auto` takes the fastest that honours what is asked.

    Whole rows only: what attends to a cache (a token at a time) is always `xla`.
    """

    name: str = "auto"  # or xla, cudnn, splash: that one, or a UserError where it cannot
    mesh: jax.sharding.Mesh | None = None  # that the arrays are laid out over
    interpret: bool = False  # splash operation by operation, on any platform

    @property
    def device(self) -> Any:
        """One of the devices that the program is for; they need not be here."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def cores(self) -> int:
        """How many cores the program has where it is for one device and that is a CPU, else 0."""
        if self.device.platform != "cpu" or (self.mesh is not None and self.mesh.size > 1):
            return 0
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


AUTO = Backend()


def attend(
    query_BQNK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    queries: Tokens,
    keys: Tokens,
    features: Features,
    backend: Backend = AUTO,
) -> jax.Array:
    """softmax(softcap(scale * q·k) + bias) v over the keys that each query sees, [B, Q, N, K] in the query's dtype.

    Raises UserError where `backend` names an implementation that cannot honour the tokens' segments or the features.
    """
    name = choose(query_BQNK, queries, features, backend) if queries is keys else "xla"
    if name != "xla":
        from fusejax.models import attention_kernels as kernels

        if name == "cudnn":
            return kernels.cudnn(query_BQNK, key_BSGK, value_BSGK, queries, features)
        return kernels.splash(
            query_BQNK, key_BSGK, value_BSGK, queries, features, backend.mesh, interpret=backend.interpret
        )
    if query_BQNK.shape[1] <= WHOLE_UP_TO:
        return attend_xla(query_BQNK, key_BSGK, value_BSGK, queries, keys, features)
    from fusejax.models import attention_blocks

    if queries is keys and features.alibi is None and 0 < backend.cores < query_BQNK.shape[0] * key_BSGK.shape[2]:
        return attention_blocks.attend_by_head(query_BQNK, key_BSGK, value_BSGK, queries, features, backend.cores)
    return attention_blocks.attend_blockwise(query_BQNK, key_BSGK, value_BSGK, queries, keys, features)


def choose(query_BLNK: jax.Array, tokens: Tokens, features: Features, backend: Backend) -> str:
    """The name of the implementation that `backend` means for these arrays."""
    if backend.name == "xla":
        return "xla"
    if backend.name == "auto":
        fast = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(backend.device.platform)
        return "xla" if fast is None or objection(fast, query_BLNK, tokens, features, backend) else fast
    reason = objection(backend.name, query_BLNK, tokens, features, backend)
    if reason:
        raise UserError(f"attention: {backend.name} {reason}; use auto or xla")
    return backend.name


def objection(name: str, query_BLNK: jax.Array, tokens: Tokens, features: Features, backend: Backend) -> str | None:
    """Why `splash` or `cudnn` cannot do this; None where it can."""
    platform, dtype, width = backend.device.platform, query_BLNK.dtype, query_BLNK.shape[-1]
    if name == "splash":
        reasons = [
            (platform != "tpu" and not backend.interpret, f"runs on TPUs, not on {platform}"),
            (features.alibi is not None and features.alibi.bf16, "cannot round ALiBi's bias to bfloat16"),
        ]
    else:
        widest = 256 if float(getattr(backend.device, "compute_capability", None) or 0) >= 9 else 128
        reasons = [
            (platform not in ("gpu", "cuda"), f"runs on NVIDIA GPUs, not on {platform}"),
            (
                tokens.segments_BL is not None and query_BLNK.shape[1] % 2 != 0,
                f"takes documents or padding in rows of an even number of tokens, not of {query_BLNK.shape[1]}",
            ),
            (features.softcap is not None, "has no soft cap of the scores"),
            (features.alibi is not None, "has no ALiBi"),
            (dtype not in (jnp.bfloat16, jnp.float16), f"computes in bfloat16 or float16, not in {dtype}"),
            (width % 8 != 0 or width > widest, f"takes heads of 8, 16, .. {widest} features, not {width}"),
        ]
    return next((reason for holds, reason in reasons if holds), None)


def attend_xla(
    query_BQNK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    queries: Tokens,
    keys: Tokens,
    features: Features,
) -> jax.Array:
    """`attend` in plain operations: the reference.

    Scores and softmax are float32. Heads come before tokens in every product: on CPUs XLA is a quarter faster that
    way than with `jax.nn.dot_product_attention`.
    """
    B, Q, N, K = query_BQNK.shape
    S, G = key_BSGK.shape[1:3]
    query_BGRQK = query_BQNK.reshape(B, Q, G, N // G, K).transpose(0, 2, 3, 1, 4)
    key_BGSK, value_BGSK = key_BSGK.transpose(0, 2, 1, 3), value_BSGK.transpose(0, 2, 1, 3)
    scores_BGRQS = features.scale * jnp.einsum(
        "bgrqk,bgsk->bgrqs", query_BGRQK, key_BGSK, preferred_element_type=jnp.float32
    )
    if features.softcap is not None:
        scores_BGRQS = features.softcap * jnp.tanh(scores_BGRQS / features.softcap)
    if features.alibi is not None:
        scores_BGRQS += alibi_bias(queries, keys, features.alibi).reshape(-1, G, N // G, Q, S)
    mask = visible(queries, keys, features.window)
    scores_BGRQS = jnp.where(mask[:, :, None], scores_BGRQS, -jnp.inf)
    weights_BGRQS = jax.nn.softmax(scores_BGRQS, axis=-1).astype(query_BQNK.dtype)
    mixed_BGRQK = jnp.einsum("bgrqs,bgsk->bgrqk", weights_BGRQS, value_BGSK)
    return mixed_BGRQK.transpose(0, 3, 1, 2, 4).reshape(B, Q, N, K)

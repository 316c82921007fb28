"""One causal decoder for every family: a `DecoderConfig` says which switches are on.

Parameters are declared once, in the modules' constructors, with shape, logical axes and initialiser; random
initialisation, sharding, checkpoints and conversion all derive from that declaration. A `Decoder` just built is
abstract (its parameters are `jax.ShapeDtypeStruct`s); `fill` gives it arrays.

Shapes: B sequences, L tokens, D model width, F MLP width, N query heads, G key/value heads, K features of a
head, V rows of the vocabulary. The parameters of all layers are stacked along a first axis, over which
`jax.lax.scan` runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fusejax.models import attention

Axes = tuple[str | None, ...]
Declare = Callable[[tuple[int, ...], Axes, str], nnx.Param]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder computes, whatever its family calls it."""

    vocab_size: int  # rows of the embedding, padding included
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    max_length: int  # the context that the model was made for; no limit here
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    activation: str = "silu"  # a key of ACTIVATIONS
    gated_mlp: bool = True  # down(activation(gate(x)) * up(x)), else down(activation(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rotary_dim: int = 0  # rotated features of each head; 0: no rotary positions
    rope_theta: float = 10000.0
    alibi_bias_max: float | None = None  # None: no ALiBi
    attention_scale: float | None = None  # None: head_dim ** -0.5
    qk_norm: bool = False  # layer norm over all heads' queries and keys together
    clip_qkv: float | None = None  # queries, keys and values are clipped to +- this
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    tied: bool = False  # the unembedding is the embedding, transposed
    initializer_std: float = 0.02


class Context(NamedTuple):
    """What every layer needs to know about the tokens."""

    mask: jax.Array  # bool [B, 1, L, L]
    positions: jax.Array  # int32 [B, L]
    rotary: tuple[jax.Array, jax.Array] | None  # cos, sin


def declare(shape: tuple[int, ...], axes: Axes, init: str) -> nnx.Param:
    """A parameter without a value. `init`: `normal`, `residual` (normal, smaller with depth), `ones` or `zeros`."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32; the input's dtype comes out."""

    def __init__(self, config: DecoderConfig, width: int, axis: str, declare: Declare, kind: str | None = None):
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.scale = declare((width,), (axis,), "ones")
        self.bias = declare((width,), (axis,), "zeros") if config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y *= self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel + bias over the first `n_in` dimensions of the kernel, in x's dtype."""

    def __init__(self, shape: tuple[int, ...], axes: Axes, n_in: int, bias: bool, declare: Declare, init: str):
        self.n_in = n_in
        self.kernel = declare(shape, axes, init)
        self.bias = declare(shape[n_in:], axes[n_in:], "zeros") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.n_in)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; the mask keeps packed documents apart."""

    def __init__(self, config: DecoderConfig, declare: Declare):
        self.config = c = config
        queries, keys = (c.n_heads, c.head_dim), (c.n_kv_heads, c.head_dim)

        def project(heads: tuple[int, int], axis: str) -> Linear:
            return Linear((c.d_model, *heads), ("embed", axis, None), 1, c.qkv_bias, declare, "normal")

        self.query, self.key = project(queries, "heads"), project(keys, "kv_heads")
        self.value = project(keys, "kv_heads")
        self.out = Linear((*queries, c.d_model), ("heads", None, "embed"), 2, c.out_bias, declare, "residual")
        if c.qk_norm:
            self.query_norm = Norm(c, c.n_heads * c.head_dim, "qkv", declare, "layer")
            self.key_norm = Norm(c, c.n_kv_heads * c.head_dim, "qkv", declare, "layer")

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        c = self.config
        query, key, value = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        if c.clip_qkv is not None:
            query, key, value = (jnp.clip(x, -c.clip_qkv, c.clip_qkv) for x in (query, key, value))
        if c.qk_norm:
            query = self.query_norm(query.reshape(*x_BLD.shape[:2], -1)).reshape(query.shape)
            key = self.key_norm(key.reshape(*x_BLD.shape[:2], -1)).reshape(key.shape)
        if context.rotary is not None:
            query, key = (attention.rotate(x, *context.rotary) for x in (query, key))
        bias = None
        if c.alibi_bias_max is not None:
            slopes = attention.alibi_slopes(c.n_heads, c.alibi_bias_max)
            bias = attention.alibi_bias(context.positions, slopes)
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        return self.out(attention.attend(query, key, value, context.mask, bias, scale))


class MLP(nnx.Module):
    """The feed-forward part, gated or plain."""

    def __init__(self, config: DecoderConfig, declare: Declare):
        self.config = c = config
        inner, outer = ((c.d_model, c.d_mlp), ("embed", "mlp")), ((c.d_mlp, c.d_model), ("mlp", "embed"))
        self.gate = Linear(*inner, 1, c.mlp_bias, declare, "normal") if c.gated_mlp else None
        self.up = Linear(*inner, 1, c.mlp_bias, declare, "normal")
        self.down = Linear(*outer, 1, c.mlp_bias, declare, "residual")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return self.down(activation(self.up(x_BLD)))
        return self.down(activation(self.gate(x_BLD)) * self.up(x_BLD))


class Block(nnx.Module):
    """One layer: pre-norm attention and MLP, one after the other or in parallel."""

    def __init__(self, config: DecoderConfig, declare: Declare):
        self.config = config
        self.attention_norm = Norm(config, config.d_model, "embed", declare)
        self.attention = Attention(config, declare)
        self.mlp_norm = Norm(config, config.d_model, "embed", declare)
        self.mlp = MLP(config, declare)

    def __call__(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        attended_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), context)
        mlp_input_BLD = x_BLD if self.config.parallel_residual else attended_BLD
        return attended_BLD + self.mlp(self.mlp_norm(mlp_input_BLD))


class Decoder(nnx.Module):
    """A causal language model.

    `compute_dtype` is the dtype of activations (float32 or bfloat16), whatever dtype the parameters have; norms,
    attention scores, softmax and logits are float32 always. `remat`: `none`, or `full` to keep each layer's input
    alone and compute the layer again in the backward pass. `unroll`: layers per step of the scan (more than 1 was
    slower on CPUs and compiles longer).

    For pure functions and `jax.jit`: `graphdef, params = nnx.split(model)`, then
    `nnx.merge(graphdef, params).hidden(ids)` inside; `params` is a pytree of arrays.
    """

    def __init__(
        self,
        config: DecoderConfig,
        compute_dtype: Any = jnp.float32,
        remat: Literal["none", "full"] = "none",
        unroll: int = 1,
    ):
        def declare_stacked(shape: tuple[int, ...], axes: Axes, init: str) -> nnx.Param:
            return declare((config.n_layers, *shape), ("layers", *axes), init)

        self.config, self.compute_dtype, self.remat = config, jnp.dtype(compute_dtype), remat
        self.unroll = unroll
        self.embedding = declare((config.vocab_size, config.d_model), ("vocab", "embed"), "normal")
        self.blocks = Block(config, declare_stacked)
        self.final_norm = Norm(config, config.d_model, "embed", declare)
        if not config.tied:
            self.output = declare((config.d_model, config.vocab_size), ("embed", "vocab"), "normal")

    def __call__(
        self, ids_BL: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Logits of each token's next token, float32 [B, L, V]; the arguments are those of `hidden`."""
        return self.logits(self.hidden(ids_BL, segment_ids, positions))

    def hidden(
        self, ids_BL: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """The states after the final norm, [B, L, D] in `compute_dtype`.

        ids_BL: int32, each below `config.vocab_size`. segment_ids: int32 [B, L], 0 for padding, 1.. for the documents
        of a row, each of which sees itself only; default: one document. positions: int32 [B, L]; default: counted
        from the beginning of each run of equal segment ids.
        """
        if segment_ids is None:
            segment_ids = jnp.ones(ids_BL.shape, jnp.int32)
        if positions is None:
            positions = attention.segment_positions(segment_ids)
        c = self.config
        rotary = attention.rotary_angles(positions, c.rotary_dim, c.rope_theta) if c.rotary_dim else None
        context = Context(attention.causal_mask(segment_ids), positions, rotary)
        hidden_BLD = jnp.take(self.embedding[...], ids_BL, axis=0).astype(self.compute_dtype)
        return self.final_norm(self._run_blocks(hidden_BLD, context))

    def _run_blocks(self, hidden_BLD: jax.Array, context: Context) -> jax.Array:
        graphdef, layers = nnx.split(self.blocks)
        n_layers = self.config.n_layers
        unroll = min(self.unroll, n_layers)

        def step(hidden_BLD: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(hidden_BLD, context), None

        if self.remat == "full":
            # A loop cannot merge the second computation with the first; straight-line code could.
            step = jax.checkpoint(step, prevent_cse=unroll > 1)
        return jax.lax.scan(step, hidden_BLD, layers, unroll=unroll)[0]

    def unembedding(self) -> jax.Array:
        """[D, V] in the parameters' dtype; logits = hidden @ unembedding."""
        return self.embedding[...].T if self.config.tied else self.output[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of states [..., D], float32 [..., V]."""
        unembedding_DV = self.unembedding().astype(hidden.dtype)
        return jnp.matmul(hidden, unembedding_DV, preferred_element_type=jnp.float32)


def fill(model: Decoder, make: Callable[[tuple[Any, ...], nnx.Param], jax.Array]) -> Decoder:
    """`model` with every parameter's value replaced by make(path, declaration)."""
    graphdef, params = nnx.split(model)
    filled = [(path, variable.replace(make(path, variable))) for path, variable in nnx.to_flat_state(params)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))

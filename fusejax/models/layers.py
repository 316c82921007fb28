"""The parts of a decoder's layer. Shapes are those of `fusejax.models.decoder`; E experts, of which a token takes T."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fusejax.models import attention
from fusejax.models.config import DecoderConfig

Axes = tuple[str | None, ...]
Declare = Callable[[tuple[int, ...], Axes, str], nnx.Param]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Context(NamedTuple):
    """What every layer needs to know about the tokens."""

    tokens: attention.Tokens
    rotary: tuple[jax.Array, jax.Array] | None  # cos, sin
    rotary_window: tuple[jax.Array, jax.Array] | None  # those of the layers with a window where they are others
    backend: attention.Backend
    cached: attention.Tokens | None = None  # the keys to attend to where they are not only the tokens' own


KeysValues = tuple[jax.Array, jax.Array]  # [B, L, G, K] each


class Layer(NamedTuple):
    """What a layer needs to know about its place; arrays, because one program runs all layers."""

    number: jax.Array  # int32 [], from 1
    has_window: jax.Array  # bool []
    cache: KeysValues | None = None  # of the tokens before; [B, S, G, K] each, S being those of `Context.cached`


def declare(shape: tuple[int, ...], axes: Axes, init: str) -> nnx.Param:
    """A parameter without a value. `init`: `normal`, `residual` (normal, smaller with depth), `ones` or `zeros`."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32; the input's dtype comes out."""

    def __init__(
        self, config: DecoderConfig, shape: tuple[int, ...], axes: Axes, declare: Declare, bias: bool | None = None
    ):
        self.config = config
        bias = config.norm_bias if bias is None else bias
        self.scale = declare(shape, axes, "zeros" if config.norm_offset else "ones") if config.norm_scale else None
        self.bias = declare(shape, axes, "zeros") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.norm_eps)
        if self.scale is not None:
            y *= self.config.norm_offset + self.scale[...].astype(jnp.float32)
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
        if c.qk_norm == "all_heads":
            self.query_norm = Norm(c, (c.n_heads * c.head_dim,), ("qkv",), declare)
            self.key_norm = Norm(c, (c.n_kv_heads * c.head_dim,), ("qkv",), declare)
        elif c.qk_norm == "head":
            self.query_norm, self.key_norm = (Norm(c, (c.head_dim,), (None,), declare) for _ in range(2))
        elif c.qk_norm == "own_head":
            self.query_norm = Norm(c, queries, ("heads", None), declare, bias=False)
            self.key_norm = Norm(c, keys, ("kv_heads", None), declare, bias=False)

    def __call__(self, x_BLD: jax.Array, context: Context, layer: Layer) -> tuple[jax.Array, KeysValues]:
        """(what is added to the residual stream, the tokens' own keys and values)."""
        c = self.config
        query, key, value = self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)
        if c.clip_qkv is not None:
            query, key, value = (jnp.clip(x, -c.clip_qkv, c.clip_qkv) for x in (query, key, value))
        if c.qk_norm == "all_heads":
            query = self.query_norm(query.reshape(*x_BLD.shape[:2], -1)).reshape(query.shape)
            key = self.key_norm(key.reshape(*x_BLD.shape[:2], -1)).reshape(key.shape)
        elif c.qk_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = self._rotate(query, key, context, layer)
        if c.attention_scale_by_layer:
            query = query / layer.number.astype(query.dtype)
        return self.out(self._attend(query, key, value, context, layer)), (key, value)

    def _rotate(self, query: jax.Array, key: jax.Array, context: Context, layer: Layer) -> tuple[jax.Array, jax.Array]:
        angles = context.rotary
        if angles is None:
            return query, key
        if context.rotary_window is not None:
            window, others = context.rotary_window, angles
            cos, sin = (jnp.where(layer.has_window, *pair) for pair in zip(window, others, strict=True))
            angles = (cos, sin)
        return (
            attention.rotate(query, *angles, self.config.rope_interleaved),
            attention.rotate(key, *angles, self.config.rope_interleaved),
        )

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context, layer: Layer) -> jax.Array:
        c, keys = self.config, context.tokens
        if layer.cache is not None and context.cached is not None:
            keys = context.cached
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, new, context.tokens.index_L[0], axis=1)
                for old, new in zip(layer.cache, (key, value), strict=True)
            )
        alibi = None
        if c.alibi_bias_max is not None:
            slopes = attention.alibi_slopes(c.n_heads, c.alibi_bias_max)
            alibi = attention.Alibi(tuple(slopes.tolist()), c.alibi_scale, c.alibi_bf16)
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale

        def attend(window: int | None) -> jax.Array:
            features = attention.Features(scale, window, c.attention_softcap, alibi)
            return attention.attend(query, key, value, context.tokens, keys, features, context.backend)

        if len(set(c.has_window)) == 1:
            return attend(c.window if c.has_window[0] else None)
        # Windows stay static, as kernels want them, though one program runs all layers.
        return jax.lax.cond(layer.has_window, lambda: attend(c.window), lambda: attend(None))


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


class Experts(nnx.Module):
    """A mixture of gated MLPs (Mixtral, Jiang et al. 2024, section 2.1).

    Each token goes to the T experts with the largest router probabilities, weighted by these renormalised. Tokens are
    sorted by expert, so that each expert is one product over its own tokens; no token is dropped.
    """

    def __init__(self, config: DecoderConfig, declare: Declare):
        self.config = c = config
        inner, outer = (c.n_experts, c.d_model, c.d_mlp), (c.n_experts, c.d_mlp, c.d_model)
        self.router = Linear((c.d_model, c.n_experts), ("embed", None), 1, False, declare, "normal")
        self.gate = declare(inner, (None, "embed", "mlp"), "normal")
        self.up = declare(inner, (None, "embed", "mlp"), "normal")
        self.down = declare(outer, (None, "mlp", "embed"), "residual")

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c, dtype = self.config, x_BLD.dtype
        x_SD = x_BLD.reshape(-1, c.d_model)
        probabilities_SE = jax.nn.softmax(self.router(x_SD).astype(jnp.float32), axis=-1)
        weights_ST, experts_ST = jax.lax.top_k(probabilities_SE, c.experts_per_token)
        weights_ST /= weights_ST.sum(-1, keepdims=True)

        order = jnp.argsort(experts_ST.reshape(-1))  # stable: (token, choice) pairs grouped by expert
        tokens = order // c.experts_per_token
        sizes_E = jnp.bincount(experts_ST.reshape(-1), length=c.n_experts).astype(jnp.int32)

        def product(x: jax.Array, kernel: nnx.Param) -> jax.Array:
            return jax.lax.ragged_dot(x, kernel[...].astype(dtype), sizes_E)

        sorted_PD = x_SD[tokens]
        inner_PF = ACTIVATIONS[c.activation](product(sorted_PD, self.gate)) * product(sorted_PD, self.up)
        outer_PD = product(inner_PF, self.down) * weights_ST.reshape(-1)[order][:, None].astype(dtype)
        return jnp.zeros_like(x_SD).at[tokens].add(outer_PD).reshape(x_BLD.shape)


class Block(nnx.Module):
    """One layer: attention and MLP, one after the other or in parallel, with norms before, after or both."""

    def __init__(self, config: DecoderConfig, declare: Declare):
        self.config = c = config
        norm = lambda: Norm(c, (c.d_model,), ("embed",), declare)  # noqa: E731
        self.attention_norm, self.attention = norm(), Attention(c, declare)
        self.mlp_norm = None if c.shared_norm else norm()
        self.mlp = Experts(c, declare) if c.n_experts else MLP(c, declare)
        if c.norm_position == "both":
            self.attention_out_norm, self.mlp_out_norm = norm(), norm()

    def __call__(self, x_BLD: jax.Array, context: Context, layer: Layer) -> tuple[jax.Array, KeysValues]:
        """(the residual stream after the layer, the tokens' own keys and values)."""
        c = self.config
        normed = x_BLD if c.norm_position == "post" else self.attention_norm(x_BLD)
        mixed, own = self.attention(normed, context, layer)
        if self.mlp_norm is None or c.parallel_residual:
            return x_BLD + mixed + self._feed(normed if self.mlp_norm is None else self.mlp_norm(x_BLD), context), own
        if c.norm_position == "both":
            x_BLD += self.attention_out_norm(mixed)
            return x_BLD + self.mlp_out_norm(self._feed(self.mlp_norm(x_BLD), context)), own
        if c.norm_position == "post":
            x_BLD = self.attention_norm(x_BLD + mixed)
            return self.mlp_norm(x_BLD + self._feed(x_BLD, context)), own
        x_BLD = (normed if c.residual_after_norm else x_BLD) + mixed
        normed = self.mlp_norm(x_BLD)
        return (normed if c.residual_after_norm else x_BLD) + self._feed(normed, context), own

    def _feed(self, x_BLD: jax.Array, context: Context) -> jax.Array:
        if context.backend.device.platform != "cpu":
            return self.mlp(x_BLD)
        # As one matrix: of three dimensions XLA transposes the gradients of the wide inner layer on CPUs.
        return self.mlp(x_BLD.reshape(-1, x_BLD.shape[-1])).reshape(x_BLD.shape)

"""One causal decoder for every family: a `DecoderConfig` says which switches are on.

Parameters are declared once, in the modules' constructors, with shape, logical axes and initialiser; random
initialisation, sharding, checkpoints and conversion all derive from that declaration. A `Decoder` just built is
abstract (its parameters are `jax.ShapeDtypeStruct`s); `fill` gives it arrays.

Shapes: B sequences, L tokens, D model width, F MLP width, N query heads, G key/value heads, K features of a
head, V rows of the vocabulary. The parameters of all layers are stacked along a first axis, over which
`jax.lax.scan` runs.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import sharding
from fusejax.config import AttentionBackend, Remat
from fusejax.models import attention, rope
from fusejax.models.attention import Backend
from fusejax.models.config import DecoderConfig, check_ids
from fusejax.models.layers import Axes, Block, Context, KeysValues, Layer, Linear, Norm, declare

# What the backward pass does not compute again; `none` computes nothing again.
REMAT_POLICIES: dict[Remat, Any] = {
    "full": None,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload_dots_with_no_batch_dims": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for S tokens a row, and where each stands.

    All rows have their latest token at the same place, so that one program serves prompts of any length.
    """

    keys: jax.Array  # [layers, B, S, G, K]
    values: jax.Array
    positions: jax.Array  # int32 [B, S]
    segments: jax.Array  # int32 [B, S]: 1 for tokens, 0 for padding
    slot: jax.Array  # int32 []: where the next token goes


class Decoder(nnx.Module):
    """A causal language model.

    `compute_dtype` is the dtype of activations (float32 or bfloat16), whatever dtype the parameters have; norms,
    attention scores, softmax and logits are float32 always. `remat`: what the backward pass computes again. `none`:
    nothing; `full`: all of each layer, of which only the input is kept; else one of jax.checkpoint_policies:
    `dots_saveable` keeps every matrix product, `dots_with_no_batch_dims_saveable` those with weights (not the
    attention's), `offload_dots_with_no_batch_dims` keeps these in the host's memory. `unroll`: layers per step of the
    scan (more than 1 was slower on CPUs and compiles longer). `attention`: see `attention.Backend`. `mesh`: that the
    parameters are laid out over.

    For pure functions and `jax.jit`: `graphdef, params = nnx.split(model)`, then
    `nnx.merge(graphdef, params).hidden(ids)` inside; `params` is a pytree of arrays.
    """

    def __init__(
        self,
        config: DecoderConfig,
        compute_dtype: Any = jnp.float32,
        remat: Remat = "none",
        unroll: int = 1,
        attention: AttentionBackend = "auto",
        mesh: jax.sharding.Mesh | None = None,
    ):
        def declare_stacked(shape: tuple[int, ...], axes: Axes, init: str) -> nnx.Param:
            return declare((config.n_layers, *shape), ("layers", *axes), init)

        self.config, self.compute_dtype, self.remat = config, jnp.dtype(compute_dtype), remat
        self.unroll, self.backend = unroll, Backend(attention, mesh)
        c, width = config, config.embedding_dim or config.d_model
        self.embedding = declare((c.vocab_size, width), ("vocab", "embed"), "normal")
        if c.learned_positions:
            self.positions = declare((c.learned_positions, c.d_model), (None, "embed"), "normal")
        if c.embedding_dim:
            self.project_in = Linear((width, c.d_model), (None, "embed"), 1, False, declare, "normal")
            self.project_out = Linear((c.d_model, width), ("embed", None), 1, False, declare, "normal")
        self.embedding_norm = Norm(c, (c.d_model,), ("embed",), declare) if c.embedding_norm else None
        self.blocks = Block(c, declare_stacked)
        self.final_norm = Norm(c, (c.d_model,), ("embed",), declare) if c.final_norm else None
        if not c.tied:
            self.output = declare((width, c.vocab_size), ("embed", "vocab"), "normal")
        if c.output_bias:
            self.output_bias = declare((c.vocab_size,), ("vocab",), "zeros")

    def __call__(
        self, ids_BL: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Logits of each token's next token, float32 [B, L, V]; the arguments are those of `hidden`."""
        return self.logits(self.hidden(ids_BL, segment_ids, positions))

    def hidden(
        self, ids_BL: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """The states that logits are made of, [B, L, H] in `compute_dtype`.

        H is D, but for the families with an embedding of another width (that) or a bias of the logits (D + 1, the
        last feature being 1). ids_BL: int32, each below `config.vocab_size` (UserError for NumPy's arrays, outside of
        jit, where one is not). segment_ids: int32 [B, L], 0 for padding,
        1.. for the documents of a row, each of which sees itself only; default: one document. positions: int32 [B, L];
        default: counted from the beginning of each run of equal segment ids. Positions beyond a table of learned
        positions give NaN.
        """
        if isinstance(ids_BL, np.ndarray):
            check_ids(ids_BL, self.config.vocab_size, "ids")
        if positions is None:
            one_document = jnp.ones(ids_BL.shape, jnp.int32)
            positions = attention.segment_positions(one_document if segment_ids is None else segment_ids)
        tokens = attention.Tokens.of(positions, segment_ids)
        return self._leave(self._run_blocks(self._embed(ids_BL, positions), self._context(tokens))[0])

    def prefill(
        self, ids_BL: jax.Array, segment_ids: jax.Array, positions: jax.Array, size: int
    ) -> tuple[jax.Array, Cache]:
        """`hidden`, and the keys and values of its tokens in a cache with room for `size` tokens a row.

        Each row ends with its prompt (segment 1), on whose left is padding (segment 0, position 0).
        """
        tokens = attention.Tokens.of(positions, segment_ids)
        hidden_BLD, own = self._run_blocks(self._embed(ids_BL, positions), self._context(tokens))
        free = size - ids_BL.shape[1]
        keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, free), (0, 0), (0, 0))) for x in own)
        positions_BS, segments_BS = (jnp.pad(x, ((0, 0), (0, free))) for x in (positions, segment_ids))
        slot = jnp.asarray(ids_BL.shape[1], jnp.int32)
        return self._leave(hidden_BLD), Cache(keys, values, positions_BS, segments_BS, slot)

    def decode(self, ids_B1: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`hidden` [B, 1, H] of one more token a row, after those of the cache, and the cache with them."""
        slot = cache.slot
        positions_B1 = jax.lax.dynamic_slice_in_dim(cache.positions, slot - 1, 1, axis=1) + 1
        real_B1 = jnp.ones_like(positions_B1)
        own = attention.Tokens(slot[None], positions_B1, real_B1)
        positions_BS, segments_BS = (
            jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
            for old, new in ((cache.positions, positions_B1), (cache.segments, real_B1))
        )
        context = self._context(own)._replace(cached=attention.Tokens.of(positions_BS, segments_BS))
        hidden_B1D, new = self._run_blocks(self._embed(ids_B1, positions_B1), context, (cache.keys, cache.values))
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, x, slot, axis=2)
            for old, x in zip((cache.keys, cache.values), new, strict=True)
        )
        return self._leave(hidden_B1D), Cache(keys, values, positions_BS, segments_BS, slot + 1)

    def _leave(self, hidden_BLD: jax.Array) -> jax.Array:
        """From the residual stream to the states that logits are made of."""
        if self.final_norm is not None:
            hidden_BLD = self.final_norm(hidden_BLD)
        if self.config.embedding_dim:
            hidden_BLD = self.project_out(hidden_BLD)
        if self.config.output_bias:
            return jnp.pad(hidden_BLD, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        return hidden_BLD

    def _embed(self, ids_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        c = self.config
        hidden_BLD = jnp.take(self.embedding[...], ids_BL, axis=0)
        hidden_BLD = sharding.to_batch_rows(hidden_BLD, self.backend.mesh, self.compute_dtype)
        if c.embedding_scale != 1:
            hidden_BLD *= jnp.asarray(c.embedding_scale, self.compute_dtype)
        if c.embedding_dim:
            hidden_BLD = self.project_in(hidden_BLD)
        if c.learned_positions:
            rows = positions_BL + c.position_offset
            hidden_BLD += jnp.take(self.positions[...], rows, axis=0, mode="fill").astype(self.compute_dtype)
        return hidden_BLD if self.embedding_norm is None else self.embedding_norm(hidden_BLD)

    def _context(self, tokens: attention.Tokens) -> Context:
        c, rotary, rotary_window = self.config, None, None
        if c.rotary_dim:
            positions, segments = tokens.positions_BL, tokens.segments_BL
            lengths = attention.segment_lengths(jnp.ones_like(positions) if segments is None else segments, positions)
            rotary = rope.angles(positions, lengths, c.rotary_dim, c.rope_theta, c.rope_scaling)
            if c.rope_theta_window is not None:
                rotary_window = rope.angles(positions, lengths, c.rotary_dim, c.rope_theta_window, None)
        return Context(tokens, rotary, rotary_window, self.backend)

    def _run_blocks(
        self, hidden_BLD: jax.Array, context: Context, cache: KeysValues | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """(hidden, the tokens' own keys and values of all layers [layers, B, L, G, K]); `cache` likewise, of S keys.

        Where the keys and values are not used, the compiler leaves them out.
        """
        graphdef, layers = nnx.split(self.blocks)
        c = self.config
        unroll = min(self.unroll, c.n_layers)

        def step(hidden_BLD: jax.Array, layer: tuple[nnx.State, Layer]) -> tuple[jax.Array, KeysValues]:
            return nnx.merge(graphdef, layer[0])(hidden_BLD, context, layer[1])

        if self.remat != "none":
            # A loop cannot merge the second computation with the first; straight-line code could.
            step = jax.checkpoint(step, prevent_cse=unroll > 1, policy=REMAT_POLICIES[self.remat])
        numbers = jnp.arange(1, c.n_layers + 1, dtype=jnp.int32)
        places = Layer(numbers, jnp.asarray(np.array(c.has_window)), cache)
        return jax.lax.scan(step, hidden_BLD, (layers, places), unroll=unroll)

    def unembedding(self) -> jax.Array:
        """[H, V] in the parameters' dtype; logits = hidden @ unembedding, but for `config.logit_softcap`."""
        unembedding_HV = self.embedding[...].T if self.config.tied else self.output[...]
        if self.config.output_bias:
            return jnp.concatenate([unembedding_HV, self.output_bias[...][None]])
        return unembedding_HV

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of states [..., H], float32 [..., V]."""
        unembedding_HV = self.unembedding().astype(hidden.dtype)
        logits = jnp.matmul(hidden, unembedding_HV, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def fill(model: Decoder, make: Callable[[tuple[Any, ...], nnx.Param], jax.Array]) -> Decoder:
    """`model` with every parameter's value replaced by make(path, declaration)."""
    graphdef, params = nnx.split(model)
    filled = [(path, variable.replace(make(path, variable))) for path, variable in nnx.to_flat_state(params)]
    merged = nnx.merge(graphdef, nnx.from_flat_state(filled))
    del filled, params
    gc.collect()  # flax's flattening leaves the parameters in a cycle; their memory should go with the model
    return merged

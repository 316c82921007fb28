"""One causal decoder for every family: a `DecoderConfig` says which switches are on.

Parameters are declared once, in the modules' constructors, with shape, logical axes and initialiser; random
initialisation, sharding, checkpoints and conversion all derive from that declaration. A `Decoder` just built is
abstract (its parameters are `jax.ShapeDtypeStruct`s); `fill` gives it arrays.

Shapes: B sequences, L tokens, D model width, F MLP width, N query heads, G key/value heads, K features of a
head, V rows of the vocabulary. The parameters of all layers are stacked along a first axis, over which
`jax.lax.scan` runs.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax.models import attention, rope
from fusejax.models.config import DecoderConfig
from fusejax.models.layers import Axes, Block, Context, Layer, Linear, Norm, declare


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
        last feature being 1). ids_BL: int32, each below `config.vocab_size`. segment_ids: int32 [B, L], 0 for padding,
        1.. for the documents of a row, each of which sees itself only; default: one document. positions: int32 [B, L];
        default: counted from the beginning of each run of equal segment ids. Positions beyond a table of learned
        positions give NaN.
        """
        if segment_ids is None:
            segment_ids = jnp.ones(ids_BL.shape, jnp.int32)
        if positions is None:
            positions = attention.segment_positions(segment_ids)
        hidden_BLD = self._run_blocks(self._embed(ids_BL, positions), self._context(segment_ids, positions))
        if self.final_norm is not None:
            hidden_BLD = self.final_norm(hidden_BLD)
        if self.config.embedding_dim:
            hidden_BLD = self.project_out(hidden_BLD)
        if self.config.output_bias:
            return jnp.pad(hidden_BLD, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        return hidden_BLD

    def _embed(self, ids_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        c = self.config
        hidden_BLD = jnp.take(self.embedding[...], ids_BL, axis=0).astype(self.compute_dtype)
        if c.embedding_scale != 1:
            hidden_BLD *= jnp.asarray(c.embedding_scale, self.compute_dtype)
        if c.embedding_dim:
            hidden_BLD = self.project_in(hidden_BLD)
        if c.learned_positions:
            rows = positions_BL + c.position_offset
            hidden_BLD += jnp.take(self.positions[...], rows, axis=0, mode="fill").astype(self.compute_dtype)
        return hidden_BLD if self.embedding_norm is None else self.embedding_norm(hidden_BLD)

    def _context(self, segment_ids: jax.Array, positions: jax.Array) -> Context:
        c, rotary, rotary_window = self.config, None, None
        if c.rotary_dim:
            lengths = attention.segment_lengths(segment_ids, positions)
            rotary = rope.angles(positions, lengths, c.rotary_dim, c.rope_theta, c.rope_scaling)
            if c.rope_theta_window is not None:
                rotary_window = rope.angles(positions, lengths, c.rotary_dim, c.rope_theta_window, None)
        return Context(attention.causal_mask(segment_ids), positions, rotary, rotary_window)

    def _run_blocks(self, hidden_BLD: jax.Array, context: Context) -> jax.Array:
        graphdef, layers = nnx.split(self.blocks)
        c = self.config
        unroll = min(self.unroll, c.n_layers)

        def step(hidden_BLD: jax.Array, layer: tuple[nnx.State, Layer]) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer[0])(hidden_BLD, context, layer[1]), None

        if self.remat == "full":
            # A loop cannot merge the second computation with the first; straight-line code could.
            step = jax.checkpoint(step, prevent_cse=unroll > 1)
        places = Layer(jnp.arange(1, c.n_layers + 1, dtype=jnp.int32), jnp.asarray(np.array(c.has_window)))
        return jax.lax.scan(step, hidden_BLD, (layers, places), unroll=unroll)[0]

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
    return nnx.merge(graphdef, nnx.from_flat_state(filled))

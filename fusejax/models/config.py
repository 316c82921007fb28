"""What a decoder computes, whatever its family calls it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fusejax.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for contexts longer than the original one; see `fusejax.models.rope`."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float  # longest context / original context
    original_length: int  # the context before scaling, in tokens
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    beta_fast: float = 32.0  # yarn: rotations within the original context above which a frequency stays
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by `factor`
    truncate: bool = True  # yarn: these bounds are rounded to whole features
    low_freq_factor: float = 1.0  # llama3: rotations below which a frequency is divided by `factor`
    high_freq_factor: float = 4.0  # llama3: rotations above which it stays
    short_factors: tuple[float, ...] = ()  # longrope: one divisor per frequency, up to the original context
    long_factors: tuple[float, ...] = ()  # longrope: the same, beyond it


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
    max_length: int  # the context that the model was made for; a limit with `learned_positions` alone

    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_scale: bool = True  # False: norms have no parameters
    norm_offset: float = 0.0  # norms multiply by offset + scale
    norm_eps: float = 1e-6
    norm_position: Literal["pre", "post", "both"] = (
        "pre"  # of a layer's parts, or after adding (post); both: in and out
    )
    embedding_norm: bool = False  # one more norm, after the embedding
    final_norm: bool = True
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    shared_norm: bool = False  # in parallel: attention and MLP read the same norm
    residual_after_norm: bool = False  # norm(x) rather than x is what a part's output is added to

    activation: str = "silu"  # a key of layers.ACTIVATIONS
    gated_mlp: bool = True  # down(activation(gate(x)) * up(x)), else down(activation(up(x)))
    mlp_bias: bool = False
    n_experts: int = 0  # 0: one MLP; else a mixture, of which each token takes `experts_per_token`
    experts_per_token: int = 0

    qkv_bias: bool = False
    out_bias: bool = False
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_scale_by_layer: bool = False  # divided by the layer's number, from 1
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    # Norms of queries and keys: over all heads together; over each head, with one scale for all or with its own.
    qk_norm: Literal["all_heads", "head", "own_head"] | None = None
    clip_qkv: float | None = None  # queries, keys and values are clipped to +- this
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    window_layers: tuple[bool, ...] = ()  # which layers have the window; (): all

    rotary_dim: int = 0  # rotated features of each head; 0: no rotary positions
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_theta_window: float | None = None  # theta of the layers with a window, never scaled; None: as the others
    rope_interleaved: bool = False  # feature 2i is paired with 2i + 1, else i with i + rotary_dim/2
    learned_positions: int = 0  # rows of the table of positions; 0: none
    position_offset: int = 0  # the row of position 0
    alibi_bias_max: float | None = None  # None: no ALiBi
    alibi_scale: float = 1.0  # the bias is multiplied by it
    alibi_bf16: bool = False  # slope * position is rounded to bfloat16, for every position

    embedding_dim: int | None = None  # width of the embedding where it is projected to d_model and back
    embedding_scale: float = 1.0
    tied: bool = False  # the unembedding is the embedding, transposed
    output_bias: bool = False
    logit_softcap: float | None = None  # logits become cap * tanh(logits / cap)
    initializer_std: float = 0.02

    @property
    def has_window(self) -> tuple[bool, ...]:
        """Which layers have the window."""
        return self.window_layers or (self.window is not None,) * self.n_layers


def check_ids(ids: np.ndarray | Sequence[int], vocab_size: int, where: str) -> None:
    """UserError, naming the id, unless each is one of the vocabulary: on a device a wrong one passes unnoticed."""
    ids = np.asarray(ids)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise UserError(f"{where}: token id {wrong[0]} is none of the model's: 0 to {vocab_size - 1}")

"""Llama (https://arxiv.org/abs/2302.13971) and the families with its tensors: Mistral, Mixtral, Qwen2 and Qwen3.

OpenLLaMA, Vicuna, SOLAR, Yi, SmolLM and Llama 2 and 3 are all LlamaForCausalLM.
"""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, head_dim, linear, norm, windows
from fusejax.models.families.table import layer_types as write_layer_types
from fusejax.models.keys import Keys, write_rope

COMMON = (
    Key("hidden_size", "d_model"),
    Key("num_hidden_layers", "n_layers"),
    Key("num_attention_heads", "n_heads"),
    Key("intermediate_size", "d_mlp"),
    Key("hidden_act", "activation", "activation", "silu"),
    Key("rms_norm_eps", "norm_eps", "positive", 1e-6),
    Key("initializer_range", "initializer_std", "number", 0.02),
)
ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def rotary(keys: Keys, values: Values, theta: float = 10000.0) -> Values:
    """Heads that are rotated whole."""
    dim = values.get("head_dim") or head_dim(keys, values, "head_dim")
    rope = keys.rope(dim, values["max_length"], theta)
    if rope["rotary_dim"] != dim:
        keys.refuse("partial_rotary_factor", rope["rotary_dim"] / dim, "1")
    return {"head_dim": dim, **rope}


def attention_tensors(c: DecoderConfig) -> Iterator[Tensor]:
    """Separate projections, and norms of queries and keys where there are some."""
    layer = "model.layers.{i}.self_attn"
    for name, param in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"{layer}.{name}_proj", f"blocks.attention.{param}", c.qkv_bias)
    yield from linear(f"{layer}.o_proj", "blocks.attention.out", c.out_bias, n_in=2)
    if c.qk_norm:
        yield from norm(f"{layer}.q_norm", "blocks.attention.query_norm")
        yield from norm(f"{layer}.k_norm", "blocks.attention.key_norm")


def tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "model.layers.{i}"
    yield from embeddings(c, "model.embed_tokens.weight", "lm_head.weight")
    yield from attention_tensors(c)
    for name in ("gate", "up", "down"):
        yield from linear(f"{layer}.mlp.{name}_proj", f"blocks.mlp.{name}", c.mlp_bias)
    yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm")
    yield from norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm")
    yield from norm("model.norm", "final_norm")


def _write(c: DecoderConfig) -> dict[str, Any]:
    return {"head_dim": c.head_dim, **write_rope(c)}


LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    (
        Key("vocab_size", "vocab_size", default=32000),
        *COMMON,
        Key("num_key_value_heads", "n_kv_heads", default=lambda v: v["n_heads"]),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("attention_bias", ("qkv_bias", "out_bias"), "flag", False),
        Key("mlp_bias", "mlp_bias", "flag", False),
        Key("tie_word_embeddings", "tied", "flag", False),
    ),
    tensors,
    derive=rotary,
    write=_write,
    ignored=ROTARY_BUFFERS,
    aliases=("LLaMAForCausalLM",),
)


# Mistral: https://arxiv.org/abs/2310.06825; every layer has the window.
MISTRAL = Family(
    "MistralForCausalLM",
    "mistral",
    (
        Key("vocab_size", "vocab_size", default=32000),
        *COMMON,
        Key("num_key_value_heads", "n_kv_heads", default=8),
        Key("max_position_embeddings", "max_length", default=4096 * 32),
        Key("sliding_window", "window", "window", 4096),
        Key("tie_word_embeddings", "tied", "flag", False),
    ),
    tensors,
    only={"layer_types": ()},
    derive=rotary,
    write=_write,
    ignored=ROTARY_BUFFERS,
)


# Mixtral: https://arxiv.org/abs/2401.04088; the MLP is a mixture of experts.


def _mixtral_tensors(c: DecoderConfig, stacked: bool = False) -> Iterator[Tensor]:
    layer = "model.layers.{i}"
    yield from (tensor for tensor in tensors(c) if ".mlp." not in tensor.name)
    if stacked:
        experts = f"{layer}.mlp.experts"
        yield Tensor(f"{layer}.mlp.gate.weight", ("blocks.mlp.router.kernel",), n_in=1)
        gate_up = ("blocks.mlp.gate", "blocks.mlp.up")
        yield Tensor(f"{experts}.gate_up_proj", gate_up, n_in=1, stacked=True)
        yield Tensor(f"{experts}.down_proj", ("blocks.mlp.down",), n_in=1, stacked=True)
        return
    yield Tensor(f"{layer}.block_sparse_moe.gate.weight", ("blocks.mlp.router.kernel",), n_in=1)
    for name, param in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        yield Tensor(f"{layer}.block_sparse_moe.experts.{{j}}.{name}.weight", (f"blocks.mlp.{param}",), n_in=1)


def _derive_mixtral(keys: Keys, values: Values) -> Values:
    if values["experts_per_token"] > values["n_experts"]:
        keys.refuse("num_experts_per_tok", values["experts_per_token"], f"at most {values['n_experts']}")
    return rotary(keys, values, theta=1e6)


MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    (
        Key("vocab_size", "vocab_size", default=32000),
        *(key for key in COMMON if key.name != "rms_norm_eps"),
        Key("rms_norm_eps", "norm_eps", "positive", 1e-5),
        Key("num_key_value_heads", "n_kv_heads", default=8),
        Key("max_position_embeddings", "max_length", default=4096 * 32),
        Key("sliding_window", "window", "window", None),
        Key("num_local_experts", "n_experts", default=8),
        Key("num_experts_per_tok", "experts_per_token", default=2),
        Key("tie_word_embeddings", "tied", "flag", False),
    ),
    _mixtral_tensors,
    derive=_derive_mixtral,
    write=_write,
    other_tensors=lambda c: _mixtral_tensors(c, stacked=True),
    ignored=ROTARY_BUFFERS,
    synonyms={"num_experts": "num_local_experts"},
)


# Qwen2 and 2.5: https://arxiv.org/abs/2407.10671; biases of queries, keys and values; windows in the later layers.
# Qwen3: https://arxiv.org/abs/2505.09388; norms of queries and keys instead.

_QWEN = (
    Key("vocab_size", "vocab_size", default=151936),
    *COMMON,
    Key("max_position_embeddings", "max_length", default=32768),
    Key("sliding_window", "window", "window", 4096),
    Key("tie_word_embeddings", "tied", "flag", False),
)


def _derive_qwen(keys: Keys, values: Values) -> Values:
    on, first = keys.flag("use_sliding_window", False), keys.number("max_window_layers", 28)
    values = values | ({} if on else {"window": None})
    return rotary(keys, values) | {"window": values["window"]} | windows(keys, values, lambda i: i >= first)


def _write_qwen(c: DecoderConfig) -> dict[str, Any]:
    window = {"use_sliding_window": c.window is not None, "layer_types": write_layer_types(c)}
    return _write(c) | window


QWEN2 = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    (*_QWEN, Key("num_key_value_heads", "n_kv_heads", default=32)),
    tensors,
    fixed={"qkv_bias": True},
    derive=_derive_qwen,
    write=_write_qwen,
    ignored=ROTARY_BUFFERS,
)

QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    (
        *_QWEN,
        Key("num_key_value_heads", "n_kv_heads", default=32),
        Key("attention_bias", ("qkv_bias", "out_bias"), "flag", False),
    ),
    tensors,
    fixed={"qk_norm": "head"},
    derive=lambda keys, values: _derive_qwen(keys.with_default("head_dim", 128), values),
    write=_write_qwen,
)

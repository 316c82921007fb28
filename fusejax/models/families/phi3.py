"""Phi-3 (https://arxiv.org/abs/2404.14219), also Phi-3.5-mini and Phi-4: Llama with fused projections and LongRoPE."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.llama import ROTARY_BUFFERS
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, fused_qkv, head_dim, linear, norm
from fusejax.models.keys import Keys, write_rope


def _derive(keys: Keys, values: Values) -> Values:
    dim = head_dim(keys, values, "head_dim")
    keys = keys.with_default("original_max_position_embeddings", 4096)
    for name in ("rope_scaling", "rope_parameters"):
        section = keys.get(name)
        if isinstance(section, dict) and section.get("rope_type", section.get("type")) == "yarn":
            # An early name of this family's only scaling.
            keys = keys.replaced(**{name: section | {"rope_type": "longrope"}})
    rope = keys.rope(dim, values["max_length"])
    if rope["rope_scaling"] is not None and rope["rope_scaling"].kind != "longrope":
        keys.refuse("rope_scaling", rope["rope_scaling"].kind, "default or longrope")
    return {"head_dim": dim, **rope}


def _write(c: DecoderConfig) -> dict[str, Any]:
    rope, scaling = write_rope(c), c.rope_scaling
    original = scaling.original_length if scaling else c.max_length
    rope["partial_rotary_factor"] = c.rotary_dim / c.head_dim
    return {"head_dim": c.head_dim, "original_max_position_embeddings": original, **rope}


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "model.layers.{i}"
    yield from embeddings(c, "model.embed_tokens.weight", "lm_head.weight")
    yield from fused_qkv(f"{layer}.self_attn.qkv_proj", False)
    yield from linear(f"{layer}.self_attn.o_proj", "blocks.attention.out", False, n_in=2)
    yield Tensor(f"{layer}.mlp.gate_up_proj.weight", ("blocks.mlp.gate.kernel", "blocks.mlp.up.kernel"), n_in=1)
    yield from linear(f"{layer}.mlp.down_proj", "blocks.mlp.down", False)
    yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm")
    yield from norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm")
    yield from norm("model.norm", "final_norm")


PHI3 = Family(
    "Phi3ForCausalLM",
    "phi3",
    (
        Key("vocab_size", "vocab_size", default=32064),
        Key("hidden_size", "d_model", default=3072),
        Key("num_hidden_layers", "n_layers", default=32),
        Key("num_attention_heads", "n_heads", default=32),
        Key("num_key_value_heads", "n_kv_heads", default=lambda v: v["n_heads"]),
        Key("intermediate_size", "d_mlp", default=8192),
        Key("max_position_embeddings", "max_length", default=4096),
        Key("hidden_act", "activation", "activation", "silu"),
        Key("rms_norm_eps", "norm_eps", "positive", 1e-5),
        Key("sliding_window", "window", "window", None),
        Key("tie_word_embeddings", "tied", "flag", False),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    only={"attention_bias": (False,)},
    derive=_derive,
    write=_write,
    ignored=ROTARY_BUFFERS,
)

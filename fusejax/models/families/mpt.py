"""MPT (https://www.databricks.com/blog/mpt-7b): ALiBi, fused projections, tied embeddings, usually no biases."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, fused_qkv, linear, norm
from fusejax.models.keys import Keys


def _derive(keys: Keys, values: Values) -> Values:
    attention = keys.inside("attn_config")
    attention.only("attn_type", "multihead_attention")
    attention.only("prefix_lm", False)
    attention.only("alibi", True)
    # The published code's newer switches, which transformers' class does not have.
    attention.only("rope", False)
    attention.only("qk_gn", False)
    attention.only("kv_n_heads", values["n_heads"])
    attention.only("sliding_window_size", -1)
    for key in ("ffn_config", "fc_type"):
        value = keys.get(key)
        name = value.get("ffn_type" if key == "ffn_config" else "name") if isinstance(value, dict) else value
        if name not in (None, "mptmlp", "torch"):
            keys.refuse(key, value, "mptmlp" if key == "ffn_config" else "torch")
    bias = not keys.flag("no_bias", True)
    return {
        **dict.fromkeys(("norm_bias", "qkv_bias", "out_bias", "mlp_bias"), bias),
        "head_dim": keys.heads(values["d_model"], values["n_heads"]),
        "d_mlp": values["d_model"] * keys.size("expansion_ratio", 4),
        "alibi_bias_max": attention.positive("alibi_bias_max", 8.0),
        "attention_scale": attention.optional("softmax_scale", None),
        "qk_norm": "all_heads" if attention.flag("qk_ln", False) else None,
        "clip_qkv": attention.number("clip_qkv", 0.0) or None,
    }


def _write(c: DecoderConfig) -> dict[str, Any]:
    bias_max = c.alibi_bias_max or 0.0
    return {
        "expansion_ratio": max(1, c.d_mlp // c.d_model),
        "no_bias": not c.qkv_bias,
        "norm_type": "low_precision_layernorm",
        "learned_pos_emb": False,
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": True,
            "alibi_bias_max": int(bias_max) if bias_max.is_integer() else bias_max,
            "clip_qkv": c.clip_qkv,
            "softmax_scale": c.attention_scale,
            "qk_ln": c.qk_norm is not None,
        },
        "tie_word_embeddings": c.tied,
    }


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer, bias = "transformer.blocks.{i}", c.qkv_bias
    yield from embeddings(c, "transformer.wte.weight", "lm_head.weight")
    yield from fused_qkv(f"{layer}.attn.Wqkv", bias)
    yield from linear(f"{layer}.attn.out_proj", "blocks.attention.out", bias, n_in=2)
    if c.qk_norm:
        yield from norm(f"{layer}.attn.q_ln", "blocks.attention.query_norm", bias)
        yield from norm(f"{layer}.attn.k_ln", "blocks.attention.key_norm", bias)
    for name in ("up", "down"):
        yield from linear(f"{layer}.ffn.{name}_proj", f"blocks.mlp.{name}", bias)
    yield from norm(f"{layer}.norm_1", "blocks.attention_norm", bias)
    yield from norm(f"{layer}.norm_2", "blocks.mlp_norm", bias)
    yield from norm("transformer.norm_f", "final_norm", bias)


def _beyond_transformers(c: DecoderConfig) -> list[str]:
    """MptForCausalLM has no biases, no norms of queries and keys, and one width of MLP and range of slopes."""
    found = {
        "no_bias: false": c.qkv_bias,
        "attn_config.qk_ln: true": c.qk_norm is not None,
        "attn_config.alibi_bias_max": c.alibi_bias_max != 8,
        "expansion_ratio": c.d_mlp != 4 * c.d_model,
    }
    return [key for key, present in found.items() if present]


MPT = Family(
    "MptForCausalLM",
    "mpt",
    (
        Key("vocab_size", "vocab_size", default=50368),
        Key("d_model", "d_model", default=2048),
        Key("n_layers", "n_layers", default=24),
        Key("n_heads", "n_heads", default=16),
        Key("max_seq_len", "max_length", default=2048),
        Key("layer_norm_epsilon", "norm_eps", "positive", 1e-5),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={"norm": "layer", "activation": "gelu", "gated_mlp": False, "tied": True},
    only={
        "norm_type": ("low_precision_layernorm", "layernorm"),
        "logit_scale": (),
        "block_overrides": (),
        "norm_eps": (1e-5,),
        "tie_word_embeddings": (True,),
    },
    derive=_derive,
    write=_write,
    aliases=("MPTForCausalLM",),
    synonyms={"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
    unknown_to_transformers=_beyond_transformers,
)

"""GPT-NeoX (https://arxiv.org/abs/2204.06745), also Pythia: partial rotary positions, parallel residual."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, fused_qkv, linear, norm
from fusejax.models.keys import Keys, write_rope


def _derive(keys: Keys, values: Values) -> Values:
    dim = keys.heads(values["d_model"], values["n_heads"])
    rope = keys.rope(dim, values["max_length"], 10000.0, 0.25, "rotary_emb_base", "rotary_pct")
    return {"head_dim": dim, **rope}


def _write(c: DecoderConfig) -> dict[str, Any]:
    rope = write_rope(c)
    return {"rotary_emb_base": rope.pop("rope_theta"), "rotary_pct": c.rotary_dim / c.head_dim, **rope}


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "gpt_neox.layers.{i}"
    yield from embeddings(c, "gpt_neox.embed_in.weight", "embed_out.weight", "lm_head.weight")
    yield from fused_qkv(f"{layer}.attention.query_key_value", c.qkv_bias, groups=c.n_heads)
    yield from linear(f"{layer}.attention.dense", "blocks.attention.out", c.out_bias, n_in=2)
    yield from linear(f"{layer}.mlp.dense_h_to_4h", "blocks.mlp.up", True)
    yield from linear(f"{layer}.mlp.dense_4h_to_h", "blocks.mlp.down", True)
    yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm", True)
    yield from norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", True)
    yield from norm("gpt_neox.final_layer_norm", "final_norm", True)


NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    (
        Key("vocab_size", "vocab_size", default=50432),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("intermediate_size", "d_mlp"),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("hidden_act", "activation", "activation", "gelu"),
        Key("layer_norm_eps", "norm_eps", "positive", 1e-5),
        Key("attention_bias", ("qkv_bias", "out_bias"), "flag", True),
        Key("use_parallel_residual", "parallel_residual", "flag", True),
        Key("tie_word_embeddings", "tied", "flag", False),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={"norm": "layer", "norm_bias": True, "gated_mlp": False, "mlp_bias": True},
    derive=_derive,
    write=_write,
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)

"""GPT-2 (Radford et al. 2019): learned positions, projections stored as [inputs, outputs], tied."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, fused_qkv, linear, norm
from fusejax.models.keys import Keys

SYNONYMS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def _derive(keys: Keys, values: Values) -> Values:
    scaled = keys.flag("scale_attn_weights", True)
    return {
        "head_dim": keys.heads(values["d_model"], values["n_heads"]),
        "learned_positions": values["max_length"],
        "attention_scale": None if scaled else 1.0,
    }


def _write(c: DecoderConfig) -> dict[str, Any]:
    return {"scale_attn_weights": c.attention_scale is None}


def _tensors(c: DecoderConfig, prefix: str = "transformer.") -> Iterator[Tensor]:
    layer = prefix + "h.{i}"
    yield from embeddings(c, f"{prefix}wte.weight", "lm_head.weight")
    yield Tensor(f"{prefix}wpe.weight", ("positions",), embedding=True)
    yield from fused_qkv(f"{layer}.attn.c_attn", True, transposed=True)
    yield from linear(f"{layer}.attn.c_proj", "blocks.attention.out", True, n_in=2, transposed=True)
    yield from linear(f"{layer}.mlp.c_fc", "blocks.mlp.up", True, transposed=True)
    yield from linear(f"{layer}.mlp.c_proj", "blocks.mlp.down", True, transposed=True)
    yield from norm(f"{layer}.ln_1", "blocks.attention_norm", True)
    yield from norm(f"{layer}.ln_2", "blocks.mlp_norm", True)
    yield from norm(f"{prefix}ln_f", "final_norm", True)


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    (
        Key("vocab_size", "vocab_size", default=50257),
        Key("n_embd", "d_model", default=768),
        Key("n_layer", "n_layers", default=12),
        Key("n_head", "n_heads", default=12),
        Key("n_inner", "d_mlp", default=lambda v: 4 * v["d_model"]),
        Key("n_positions", "max_length", default=1024),
        Key("activation_function", "activation", "activation", "gelu_new"),
        Key("layer_norm_epsilon", "norm_eps", "positive", 1e-5),
        Key("scale_attn_by_inverse_layer_idx", "attention_scale_by_layer", "flag", False),
        Key("tie_word_embeddings", "tied", "flag", True),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={
        **dict.fromkeys(("norm_bias", "qkv_bias", "out_bias", "mlp_bias"), True),
        "norm": "layer",
        "gated_mlp": False,
    },
    only={"add_cross_attention": (False,)},
    derive=_derive,
    write=_write,
    other_tensors=lambda c: _tensors(c, prefix=""),  # the first releases
    synonyms=SYNONYMS,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)

"""BLOOM (https://arxiv.org/abs/2211.05100): ALiBi, a norm after the embedding, biases everywhere, tied."""

from collections.abc import Iterator

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, fused_qkv, linear, norm
from fusejax.models.keys import Keys


def _derive(keys: Keys, values: Values) -> Values:
    d_model = values["d_model"]
    return {"d_mlp": 4 * d_model, "head_dim": keys.heads(d_model, values["n_heads"])}


def _tensors(c: DecoderConfig, prefix: str = "transformer.") -> Iterator[Tensor]:
    layer = prefix + "h.{i}"
    yield from embeddings(c, f"{prefix}word_embeddings.weight", "lm_head.weight")
    yield from norm(f"{prefix}word_embeddings_layernorm", "embedding_norm", True)
    yield from fused_qkv(f"{layer}.self_attention.query_key_value", True, groups=c.n_heads)
    yield from linear(f"{layer}.self_attention.dense", "blocks.attention.out", True, n_in=2)
    yield from linear(f"{layer}.mlp.dense_h_to_4h", "blocks.mlp.up", True)
    yield from linear(f"{layer}.mlp.dense_4h_to_h", "blocks.mlp.down", True)
    yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm", True)
    yield from norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", True)
    yield from norm(f"{prefix}ln_f", "final_norm", True)


BLOOM = Family(
    "BloomForCausalLM",
    "bloom",
    (
        Key("vocab_size", "vocab_size", default=250880),
        Key("hidden_size", "d_model", default=64),
        Key("n_layer", "n_layers", default=2),
        Key("n_head", "n_heads", default=8),
        Key("seq_length", "max_length", default=2048),  # no end to its positions; transformers reads no such key
        Key("layer_norm_epsilon", "norm_eps", "positive", 1e-5),
        Key("apply_residual_connection_post_layernorm", "residual_after_norm", "flag", False),
        Key("tie_word_embeddings", "tied", "flag", True),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={
        **dict.fromkeys(("norm_bias", "qkv_bias", "out_bias", "mlp_bias", "embedding_norm"), True),
        **{"norm": "layer", "activation": "gelu_tanh", "gated_mlp": False, "alibi_bias_max": 8.0},
    },
    derive=_derive,
    # Most of the published configurations have some of these.
    synonyms={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    other_tensors=lambda c: _tensors(c, prefix=""),  # the first releases
)

"""OPT (https://arxiv.org/abs/2205.01068): learned positions from row 2 on; the 350M model projects its embedding and
has its norms after each part."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, linear, norm
from fusejax.models.keys import Keys

_OFFSET = 2


def _derive(keys: Keys, values: Values) -> Values:
    before, affine = keys.flag("do_layer_norm_before", True), keys.flag("layer_norm_elementwise_affine", True)
    width = keys.size("word_embed_proj_dim", values["d_model"])
    return {
        "head_dim": keys.heads(values["d_model"], values["n_heads"]),
        "learned_positions": values["max_length"] + _OFFSET,
        "norm_position": "pre" if before else "post",
        "final_norm": before and not keys.flag("_remove_final_layer_norm", False),
        "norm_scale": affine,
        "norm_bias": affine,
        "embedding_dim": None if width == values["d_model"] else width,
    }


def _write(c: DecoderConfig) -> dict[str, Any]:
    before = c.norm_position == "pre"
    return {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not c.final_norm,
        "layer_norm_elementwise_affine": c.norm_scale,
        "word_embed_proj_dim": c.embedding_dim or c.d_model,
    }


def _tensors(c: DecoderConfig, prefix: str = "model.decoder.") -> Iterator[Tensor]:
    layer = prefix + "layers.{i}"
    yield from embeddings(c, f"{prefix}embed_tokens.weight", "lm_head.weight")
    yield Tensor(f"{prefix}embed_positions.weight", ("positions",), embedding=True)
    if c.embedding_dim:
        yield from linear(f"{prefix}project_in", "project_in", False)
        yield from linear(f"{prefix}project_out", "project_out", False)
    for name, param in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"{layer}.self_attn.{name}_proj", f"blocks.attention.{param}", c.qkv_bias)
    yield from linear(f"{layer}.self_attn.out_proj", "blocks.attention.out", c.out_bias, n_in=2)
    yield from linear(f"{layer}.fc1", "blocks.mlp.up", c.mlp_bias)
    yield from linear(f"{layer}.fc2", "blocks.mlp.down", c.mlp_bias)
    if c.norm_scale:
        yield from norm(f"{layer}.self_attn_layer_norm", "blocks.attention_norm", True)
        yield from norm(f"{layer}.final_layer_norm", "blocks.mlp_norm", True)
        if c.final_norm:
            yield from norm(f"{prefix}final_layer_norm", "final_norm", True)


OPT = Family(
    "OPTForCausalLM",
    "opt",
    (
        Key("vocab_size", "vocab_size", default=50272),
        Key("hidden_size", "d_model", default=768),
        Key("num_hidden_layers", "n_layers", default=12),
        Key("num_attention_heads", "n_heads", default=12),
        Key("ffn_dim", "d_mlp", default=3072),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("activation_function", "activation", "activation", "relu"),
        Key("enable_bias", ("qkv_bias", "out_bias", "mlp_bias"), "flag", True),
        Key("tie_word_embeddings", "tied", "flag", True),
        Key("init_std", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={"norm": "layer", "norm_eps": 1e-5, "gated_mlp": False, "position_offset": _OFFSET},
    derive=_derive,
    write=_write,
    other_tensors=lambda c: _tensors(c, prefix="decoder."),  # the first releases
)

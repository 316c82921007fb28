"""StableLM (https://arxiv.org/abs/2402.17834): layer norms, a quarter of each head rotated, gated MLP."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.llama import ROTARY_BUFFERS
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, linear, norm
from fusejax.models.keys import Keys, write_rope


def _derive(keys: Keys, values: Values) -> Values:
    dim, parallel = keys.heads(values["d_model"], values["n_heads"]), keys.flag("use_parallel_residual", False)
    rope = keys.rope(dim, values["max_length"], fraction=0.25)
    qk_norm = "own_head" if keys.flag("qk_layernorm", False) else None
    return {"head_dim": dim, "parallel_residual": parallel, "shared_norm": parallel, "qk_norm": qk_norm, **rope}


def _write(c: DecoderConfig) -> dict[str, Any]:
    return {
        "use_parallel_residual": c.parallel_residual,
        "qk_layernorm": c.qk_norm is not None,
        "partial_rotary_factor": c.rotary_dim / c.head_dim,
        **write_rope(c),
    }


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "model.layers.{i}"
    yield from embeddings(c, "model.embed_tokens.weight", "lm_head.weight")
    for name, param in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"{layer}.self_attn.{name}_proj", f"blocks.attention.{param}", c.qkv_bias)
    yield from linear(f"{layer}.self_attn.o_proj", "blocks.attention.out", False, n_in=2)
    if c.qk_norm:
        for name, param in (("q", "query"), ("k", "key")):
            yield from norm(f"{layer}.self_attn.{name}_layernorm.norms.{{j}}", f"blocks.attention.{param}_norm")
    for name in ("gate", "up", "down"):
        yield from linear(f"{layer}.mlp.{name}_proj", f"blocks.mlp.{name}", False)
    yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm", True)
    if not c.shared_norm:
        yield from norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", True)
    yield from norm("model.norm", "final_norm", True)


STABLELM = Family(
    "StableLmForCausalLM",
    "stablelm",
    (
        Key("vocab_size", "vocab_size", default=50304),
        Key("hidden_size", "d_model", default=2560),
        Key("num_hidden_layers", "n_layers", default=32),
        Key("num_attention_heads", "n_heads", default=32),
        Key("num_key_value_heads", "n_kv_heads", default=32),
        Key("intermediate_size", "d_mlp", default=6912),
        Key("max_position_embeddings", "max_length", default=4096),
        Key("hidden_act", "activation", "activation", "silu"),
        Key("layer_norm_eps", "norm_eps", "positive", 1e-5),
        Key("use_qkv_bias", "qkv_bias", "flag", False),
        Key("tie_word_embeddings", "tied", "flag", False),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={"norm": "layer", "norm_bias": True},
    derive=_derive,
    write=_write,
    ignored=ROTARY_BUFFERS,
)

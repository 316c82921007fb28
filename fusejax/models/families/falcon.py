"""Falcon (https://arxiv.org/abs/2311.16867): 7B (one key head, attention and MLP in parallel), the new decoder of 40B,
180B and 11B (groups of heads), and RW (ALiBi, sequential)."""

from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, fused_qkv, linear, norm
from fusejax.models.keys import Keys, write_rope


def _derive(keys: Keys, values: Values) -> Values:
    n_heads, d_model = values["n_heads"], values["d_model"]
    new, alibi = keys.flag("new_decoder_architecture", False), keys.flag("alibi", False)
    parallel, dim = keys.flag("parallel_attn", True), keys.heads(d_model, n_heads)
    kv_heads = keys.size("num_kv_heads", n_heads)
    if new and not parallel:
        keys.refuse("parallel_attn", False, "true, where new_decoder_architecture is")
    if not new:
        multi_query = keys.flag("multi_query", True)
        if not multi_query and kv_heads != n_heads:
            keys.refuse("num_kv_heads", kv_heads, f"num_attention_heads = {n_heads}, where multi_query is false")
        kv_heads = 1 if multi_query else n_heads
    norms = keys.size("num_ln_in_parallel_attn", 2 if new else 1)
    if norms > 2 or (norms == 2 and not new):
        keys.refuse("num_ln_in_parallel_attn", norms, "1, or 2 with new_decoder_architecture")
    rope = keys.rope(dim, values["max_length"])
    if not alibi and rope["rotary_dim"] != dim:
        keys.refuse("partial_rotary_factor", rope["rotary_dim"] / dim, "1")
    # With ALiBi the bias is added to the scores before both are scaled.
    slopes: Values = {"alibi_bias_max": 8.0, "alibi_scale": dim**-0.5, "alibi_bf16": True}
    return {
        "head_dim": dim,
        "n_kv_heads": kv_heads,
        "d_mlp": keys.size("ffn_hidden_size", 4 * d_model),
        "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
        **(slopes if alibi else rope),
    }


def _is_new(c: DecoderConfig) -> bool:
    """Whether only the new decoder has such heads and norms."""
    return c.n_kv_heads not in (1, c.n_heads) or (c.parallel_residual and not c.shared_norm)


def _write(c: DecoderConfig) -> dict[str, Any]:
    new = _is_new(c)
    return {
        "num_kv_heads": c.n_kv_heads,
        "new_decoder_architecture": new,
        "multi_query": not new and c.n_kv_heads == 1,
        "parallel_attn": c.parallel_residual,
        "num_ln_in_parallel_attn": (1 if c.shared_norm else 2) if new else None,
        "ffn_hidden_size": c.d_mlp,
        "alibi": c.alibi_bias_max is not None,
        **(write_rope(c) if c.rotary_dim else {}),
    }


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "transformer.h.{i}"
    yield from embeddings(c, "transformer.word_embeddings.weight", "lm_head.weight")
    yield from fused_qkv(f"{layer}.self_attention.query_key_value", c.qkv_bias, groups=c.n_kv_heads)
    yield from linear(f"{layer}.self_attention.dense", "blocks.attention.out", c.out_bias, n_in=2)
    yield from linear(f"{layer}.mlp.dense_h_to_4h", "blocks.mlp.up", c.mlp_bias)
    yield from linear(f"{layer}.mlp.dense_4h_to_h", "blocks.mlp.down", c.mlp_bias)
    if c.parallel_residual and not c.shared_norm:
        yield from norm(f"{layer}.ln_attn", "blocks.attention_norm", True)
        yield from norm(f"{layer}.ln_mlp", "blocks.mlp_norm", True)
    else:
        yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm", True)
        if not c.shared_norm:
            yield from norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", True)
    yield from norm("transformer.ln_f", "final_norm", True)


FALCON = Family(
    "FalconForCausalLM",
    "falcon",
    (
        Key("vocab_size", "vocab_size", default=65024),
        Key("hidden_size", "d_model", default=4544),
        Key("num_hidden_layers", "n_layers", default=32),
        Key("num_attention_heads", "n_heads", default=71),
        Key("max_position_embeddings", "max_length", default=2048),
        Key("activation", "activation", "activation", "gelu"),
        Key("bias", ("qkv_bias", "out_bias", "mlp_bias"), "flag", False),
        Key("layer_norm_epsilon", "norm_eps", "positive", 1e-5),
        Key("tie_word_embeddings", "tied", "flag", True),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={"norm": "layer", "norm_bias": True, "gated_mlp": False},
    derive=_derive,
    write=_write,
    synonyms={"n_embed": "hidden_size"},
)

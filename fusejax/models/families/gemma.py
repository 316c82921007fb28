"""Gemma (https://arxiv.org/abs/2403.08295), Gemma 2 (2408.00118) and Gemma 3 (2503.19786, text): norms of 1 + weight,
a scaled embedding, tied; from 2 on norms around each part and windows in most layers."""

import math
from collections.abc import Iterator
from typing import Any

from fusejax.models.config import DecoderConfig
from fusejax.models.families.llama import attention_tensors, rotary
from fusejax.models.families.llama import tensors as llama_tensors
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, layer_types, linear, norm, windows
from fusejax.models.keys import Keys, write_rope


def _keys(vocab_size: int, max_length: int, activation: str) -> tuple[Key, ...]:
    return (
        Key("vocab_size", "vocab_size", default=vocab_size),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("num_key_value_heads", "n_kv_heads"),
        Key("head_dim", "head_dim", default=256),
        Key("intermediate_size", "d_mlp"),
        Key(activation, "activation", "activation", "gelu_pytorch_tanh"),
        Key("max_position_embeddings", "max_length", default=max_length),
        Key("rms_norm_eps", "norm_eps", "positive", 1e-6),
        Key("attention_bias", ("qkv_bias", "out_bias"), "flag", False),
        Key("tie_word_embeddings", "tied", "flag", True),
        Key("initializer_range", "initializer_std", "number", 0.02),
    )


def _scaled(values: Values) -> Values:
    return {"embedding_scale": math.sqrt(values["d_model"])}


def _derive_gemma(keys: Keys, values: Values) -> Values:
    # The first releases say `gelu` and mean its approximation.
    means_tanh = {"activation": "gelu_tanh"} if keys.get("hidden_act") == "gelu" else {}
    return rotary(keys, values) | _scaled(values) | means_tanh


GEMMA = Family(
    "GemmaForCausalLM",
    "gemma",
    _keys(256000, 8192, "hidden_act"),
    llama_tensors,
    fixed={"norm_offset": 1.0},
    only={"use_bidirectional_attention": (False,)},
    derive=_derive_gemma,
    write=write_rope,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "model.layers.{i}"
    yield from embeddings(c, "model.embed_tokens.weight", "lm_head.weight")
    yield from attention_tensors(c)
    for name in ("gate", "up", "down"):
        yield from linear(f"{layer}.mlp.{name}_proj", f"blocks.mlp.{name}", False)
    yield from norm(f"{layer}.input_layernorm", "blocks.attention_norm")
    yield from norm(f"{layer}.post_attention_layernorm", "blocks.attention_out_norm")
    yield from norm(f"{layer}.pre_feedforward_layernorm", "blocks.mlp_norm")
    yield from norm(f"{layer}.post_feedforward_layernorm", "blocks.mlp_out_norm")
    yield from norm("model.norm", "final_norm")


def _scale(keys: Keys) -> Values:
    return {"attention_scale": keys.positive("query_pre_attn_scalar", 256) ** -0.5}


def _write(c: DecoderConfig) -> dict[str, Any]:
    scalar = c.head_dim if c.attention_scale is None else c.attention_scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "layer_types": layer_types(c),
    }


def _derive_gemma2(keys: Keys, values: Values) -> Values:
    rest = windows(keys, values, lambda i: i % 2 == 0)
    return rotary(keys, values) | _scaled(values) | _scale(keys) | rest


GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    (
        *_keys(256000, 8192, "hidden_activation"),
        Key("sliding_window", "window", "window", 4096),
        Key("attn_logit_softcapping", "attention_softcap", "optional", 50.0),
        Key("final_logit_softcapping", "logit_softcap", "optional", 30.0),
    ),
    _tensors,
    fixed={"norm_offset": 1.0, "norm_position": "both"},
    only={"use_bidirectional_attention": (False,)},
    derive=_derive_gemma2,
    write=lambda c: _write(c) | write_rope(c),
)


def _derive_gemma3(keys: Keys, values: Values) -> Values:
    pattern = keys.size("sliding_window_pattern", 6)
    rest = windows(keys, values, lambda i: (i + 1) % pattern != 0)
    window_theta = keys.positive("rope_local_base_freq", 10000.0)
    nested, scaling = keys.inside("rope_parameters"), keys.inside("rope_scaling")
    # transformers' class reads neither of these, and would run another model than the file describes.
    if nested.values and not nested.values.keys() <= {"full_attention", "sliding_attention"}:
        keys.refuse("rope_parameters", nested.values, "one set for full_attention and one for sliding_attention")
    if "rope_type" not in scaling.values:
        scaling.only("type", "default")
    local, own = nested.inside("sliding_attention"), nested.inside("full_attention")
    local.only("rope_type", "default")
    window_theta = local.positive("rope_theta", window_theta)
    both = own.values | scaling.values
    keys = keys.replaced(rope_parameters=both, rope_scaling=both if scaling.values else None)
    rope = rotary(keys, values, theta=1e6)
    has_window = rest.get("window", values["window"]) is not None
    theta = {"rope_theta_window": window_theta if has_window else None}
    return rope | _scaled(values) | _scale(keys) | rest | theta


def _write_gemma3(c: DecoderConfig) -> dict[str, Any]:
    rope = write_rope(c)
    parameters = {"rope_theta": c.rope_theta, **(rope.get("rope_scaling") or {"rope_type": "default"})}
    local = {"rope_type": "default", "rope_theta": c.rope_theta_window or 10000.0}
    return _write(c) | {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}


GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    (
        *_keys(262208, 131072, "hidden_activation"),
        Key("sliding_window", "window", "window", 4096),
        Key("final_logit_softcapping", "logit_softcap", "optional", None),
    ),
    _tensors,
    fixed={"norm_offset": 1.0, "norm_position": "both", "qk_norm": "head"},
    # transformers' class reads `attn_logit_softcapping` and leaves it out of the scores.
    only={"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
    derive=_derive_gemma3,
    write=_write_gemma3,
)

"""One table per family of models: its Hugging Face configuration and its tensors, in both directions.

A family is a `Family`: how to read its config.json as a `DecoderConfig`, how to write one, and one `Tensor` per
tensor on disk. Shapes, transposes and splitting derive from the decoder's own declarations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fusejax.errors import UserError
from fusejax.models.decoder import DecoderConfig
from fusejax.models.keys import ACTIVATION_NAMES, Keys


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk and the parameter, or parameters, that it holds.

    `name` may contain `{i}`, the layer. `params` are paths in the decoder; several of them lie joined along the first
    dimension, one after the other or `interleaved` head by head. A tensor with n_in >= 1 is a matrix [outputs, inputs]
    whose parameter has its inputs in its first `n_in` dimensions; with n_in 0 it has the parameter's elements
    in the parameter's order, as rows (an `embedding`) or flattened (a norm or a bias).
    """

    name: str
    params: tuple[str, ...]
    n_in: int = 0
    embedding: bool = False
    interleaved: bool = False
    aliases: tuple[str, ...] = ()  # other names under which checkpoints hold it
    copies: tuple[str, ...] = ()  # names under which a tied checkpoint may hold it once more


@dataclass(frozen=True)
class Family:
    """A family's table."""

    architecture: str  # transformers' class name, written to config.json
    model_type: str
    read: Callable[[Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Callable[[DecoderConfig], Iterator[Tensor]]
    ignored: tuple[str, ...] = ()  # regular expressions: tensors that hold no parameter (buffers)
    aliases: tuple[str, ...] = ()  # other names of the architecture
    # Switches of ours that transformers' own class of this family silently leaves out.
    unknown_to_transformers: Callable[[DecoderConfig], list[str]] = lambda config: []


def _projection(name: str, param: str, bias: bool, n_in: int = 1) -> Iterator[Tensor]:
    """A linear layer's weight, and its bias where there is one."""
    yield Tensor(f"{name}.weight", (f"{param}.kernel",), n_in)
    if bias:
        yield Tensor(f"{name}.bias", (f"{param}.bias",))


def _norm(name: str, param: str, bias: bool) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (f"{param}.scale",))
    if bias:
        yield Tensor(f"{name}.bias", (f"{param}.bias",))


def _fused(name: str, bias: bool, interleaved: bool = False) -> Iterator[Tensor]:
    """Queries, keys and values in one linear layer."""
    for suffix, leaf, n_in in (("weight", "kernel", 1), ("bias", "bias", 0))[: 2 if bias else 1]:
        params = tuple(f"blocks.attention.{part}.{leaf}" for part in ("query", "key", "value"))
        yield Tensor(f"{name}.{suffix}", params, n_in, interleaved=interleaved)


# Llama: https://arxiv.org/abs/2302.13971; also Llama 2, OpenLLaMA, Vicuna, SOLAR and Yi.


def _read_llama(keys: Keys) -> DecoderConfig:
    n_heads, d_model = keys.size("num_attention_heads"), keys.size("hidden_size")
    head_dim = keys.get("head_dim") and keys.size("head_dim")
    head_dim = head_dim or keys.heads(d_model, n_heads)
    n_kv_heads = keys.size("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        keys.refuse("num_key_value_heads", n_kv_heads, f"a divisor of num_attention_heads = {n_heads}")
    attention_bias, mlp_bias = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
    theta, _ = keys.rope("rope_theta", None, 1.0)
    return DecoderConfig(
        vocab_size=keys.size("vocab_size", 32000),
        d_model=d_model,
        n_layers=keys.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_mlp=keys.size("intermediate_size"),
        max_length=keys.size("max_position_embeddings", 2048),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_act", "silu"),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        rotary_dim=head_dim,
        rope_theta=theta,
        tied=keys.flag("tie_word_embeddings", False),
        initializer_std=keys.number("initializer_range", 0.02),
    )


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": ACTIVATION_NAMES[c.activation][0],
        "max_position_embeddings": c.max_length,
        "initializer_range": c.initializer_std,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # the key that every version of transformers reads
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied,
    }


def _llama_tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "model.layers.{i}"
    copies = ("lm_head.weight",) if c.tied else ()
    yield Tensor("model.embed_tokens.weight", ("embedding",), embedding=True, copies=copies)
    for name, param in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from _projection(f"{layer}.self_attn.{name}_proj", f"blocks.attention.{param}", c.qkv_bias)
    yield from _projection(f"{layer}.self_attn.o_proj", "blocks.attention.out", c.out_bias, n_in=2)
    for name in ("gate", "up", "down"):
        yield from _projection(f"{layer}.mlp.{name}_proj", f"blocks.mlp.{name}", c.mlp_bias)
    yield from _norm(f"{layer}.input_layernorm", "blocks.attention_norm", False)
    yield from _norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", False)
    yield from _norm("model.norm", "final_norm", False)
    if not c.tied:
        yield Tensor("lm_head.weight", ("output",), n_in=1)


# MPT: https://www.databricks.com/blog/mpt-7b; ALiBi, fused projections, tied embeddings, usually no biases.


def _read_mpt(keys: Keys) -> DecoderConfig:
    attention = keys.inside("attn_config")
    attention.only("attn_type", "multihead_attention")
    attention.only("prefix_lm", False)
    attention.only("alibi", True)
    keys.only("norm_type", "low_precision_layernorm", "layernorm")
    keys.only("logit_scale")
    for key in ("ffn_config", "fc_type"):
        value = keys.get(key)
        name = value.get("ffn_type" if key == "ffn_config" else "name") if isinstance(value, dict) else value
        if name not in (None, "mptmlp", "torch"):
            keys.refuse(key, value, "mptmlp" if key == "ffn_config" else "torch")
    keys.only("tie_word_embeddings", True)
    d_model, n_heads = keys.size("d_model", 2048), keys.size("n_heads", 16)
    bias = not keys.flag("no_bias", True)
    clip, scale = attention.number("clip_qkv", 0.0), attention.number("softmax_scale", 0.0)
    return DecoderConfig(
        vocab_size=keys.size("vocab_size", 50368),
        d_model=d_model,
        n_layers=keys.size("n_layers", 24),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=keys.heads(d_model, n_heads),
        d_mlp=d_model * keys.size("expansion_ratio", 4),
        max_length=keys.size("max_seq_len", 2048),
        norm="layer",
        norm_bias=bias,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation="gelu",
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        alibi_bias_max=attention.number("alibi_bias_max", 8.0),
        attention_scale=scale or None,
        qk_norm=attention.flag("qk_ln", False),
        clip_qkv=clip or None,
        tied=True,
        initializer_std=keys.number("initializer_range", 0.02),
    )


def _write_mpt(c: DecoderConfig) -> dict[str, Any]:
    bias_max = c.alibi_bias_max or 0.0
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.d_model,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "expansion_ratio": max(1, c.d_mlp // c.d_model),
        "max_seq_len": c.max_length,
        "layer_norm_epsilon": c.norm_eps,
        "no_bias": not c.qkv_bias,
        "norm_type": "low_precision_layernorm",
        "learned_pos_emb": False,
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": True,
            "alibi_bias_max": int(bias_max) if bias_max.is_integer() else bias_max,
            "clip_qkv": c.clip_qkv,
            "softmax_scale": c.attention_scale,
            "qk_ln": c.qk_norm,
        },
        "initializer_range": c.initializer_std,
        "tie_word_embeddings": c.tied,
    }


def _mpt_tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer, bias = "transformer.blocks.{i}", c.qkv_bias
    yield Tensor("transformer.wte.weight", ("embedding",), embedding=True, copies=("lm_head.weight",))
    yield from _fused(f"{layer}.attn.Wqkv", bias)
    yield from _projection(f"{layer}.attn.out_proj", "blocks.attention.out", bias, n_in=2)
    if c.qk_norm:
        yield from _norm(f"{layer}.attn.q_ln", "blocks.attention.query_norm", bias)
        yield from _norm(f"{layer}.attn.k_ln", "blocks.attention.key_norm", bias)
    for name in ("up", "down"):
        yield from _projection(f"{layer}.ffn.{name}_proj", f"blocks.mlp.{name}", bias)
    yield from _norm(f"{layer}.norm_1", "blocks.attention_norm", bias)
    yield from _norm(f"{layer}.norm_2", "blocks.mlp_norm", bias)
    yield from _norm("transformer.norm_f", "final_norm", bias)


def _mpt_beyond_transformers(c: DecoderConfig) -> list[str]:
    """MptForCausalLM has no biases, no norms of queries and keys, and one width of MLP and range of slopes."""
    found = {
        "no_bias: false": c.qkv_bias,
        "attn_config.qk_ln: true": c.qk_norm,
        "attn_config.alibi_bias_max": c.alibi_bias_max != 8,
        "expansion_ratio": c.d_mlp != 4 * c.d_model,
    }
    return [key for key, present in found.items() if present]


# GPT-NeoX: https://arxiv.org/abs/2204.06745; also Pythia. Partial rotary positions, parallel residual.


def _read_neox(keys: Keys) -> DecoderConfig:
    d_model, n_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head_dim, attention_bias = keys.heads(d_model, n_heads), keys.flag("attention_bias", True)
    theta, fraction = keys.rope("rotary_emb_base", "rotary_pct", 0.25)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        keys.refuse("rotary_pct", fraction, f"an even number of each head's {head_dim} features")
    return DecoderConfig(
        vocab_size=keys.size("vocab_size", 50432),
        d_model=d_model,
        n_layers=keys.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        d_mlp=keys.size("intermediate_size"),
        max_length=keys.size("max_position_embeddings", 2048),
        norm="layer",
        norm_bias=True,
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=keys.activation("hidden_act", "gelu"),
        gated_mlp=False,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=True,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        parallel_residual=keys.flag("use_parallel_residual", True),
        tied=keys.flag("tie_word_embeddings", False),
        initializer_std=keys.number("initializer_range", 0.02),
    )


def _write_neox(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "hidden_act": ACTIVATION_NAMES[c.activation][0],
        "rotary_pct": c.rotary_dim / c.head_dim,
        "rotary_emb_base": c.rope_theta,
        "max_position_embeddings": c.max_length,
        "initializer_range": c.initializer_std,
        "layer_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
        "use_parallel_residual": c.parallel_residual,
        "tie_word_embeddings": c.tied,
    }


def _neox_tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "gpt_neox.layers.{i}"
    copies = ("embed_out.weight", "lm_head.weight") if c.tied else ()
    yield Tensor("gpt_neox.embed_in.weight", ("embedding",), embedding=True, copies=copies)
    yield from _fused(f"{layer}.attention.query_key_value", c.qkv_bias, interleaved=True)
    yield from _projection(f"{layer}.attention.dense", "blocks.attention.out", c.out_bias, n_in=2)
    yield from _projection(f"{layer}.mlp.dense_h_to_4h", "blocks.mlp.up", True)
    yield from _projection(f"{layer}.mlp.dense_4h_to_h", "blocks.mlp.down", True)
    yield from _norm(f"{layer}.input_layernorm", "blocks.attention_norm", True)
    yield from _norm(f"{layer}.post_attention_layernorm", "blocks.mlp_norm", True)
    yield from _norm("gpt_neox.final_layer_norm", "final_norm", True)
    if not c.tied:
        yield Tensor("embed_out.weight", ("output",), n_in=1, aliases=("lm_head.weight",))


FAMILIES = (
    Family("LlamaForCausalLM", "llama", _read_llama, _write_llama, _llama_tensors,
           ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), aliases=("LLaMAForCausalLM",)),
    Family("MptForCausalLM", "mpt", _read_mpt, _write_mpt, _mpt_tensors, aliases=("MPTForCausalLM",),
           unknown_to_transformers=_mpt_beyond_transformers),
    Family("GPTNeoXForCausalLM", "gpt_neox", _read_neox, _write_neox, _neox_tensors,
           ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)),
)  # fmt: skip


def find(hf_config: dict[str, Any], where: str) -> Family:
    """The family of a config.json, by its `architectures`, or by its `model_type` where it has none."""
    architectures = hf_config.get("architectures") or []
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if architectures and architectures[0] in (family.architecture, *family.aliases):
            return family
        if not architectures and model_type == family.model_type:
            return family
    found = f"architecture {architectures[0]}" if architectures else f"model_type {model_type!r}"
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: {found} is not supported; supported: {supported}")


def decoder_config(hf_config: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """What a Hugging Face configuration means; UserError, naming key and value, for what is not implemented."""
    family = find(hf_config, where)
    keys = Keys(hf_config, where, family.architecture)
    keys.only("quantization_config")
    return family.read(keys)


def hf_config(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """A Hugging Face configuration of the given family, the inverse of `decoder_config`.

    Raises UserError where the family cannot express the configuration.
    """
    family = find({"model_type": model_type}, "model_type")
    values = {"architectures": [family.architecture], "model_type": model_type, **family.write(config)}
    back = decoder_config(values, f"{family.architecture}'s configuration")
    for key, value in vars(config).items():
        if getattr(back, key) != value:
            raise UserError(
                f"{key}: {family.architecture} cannot express {value!r} (it would be {getattr(back, key)!r})"
            )
    return values

"""GPT-J (https://github.com/kingoflolz/mesh-transformer-jax): interleaved partial rotary positions, attention and MLP
in parallel on one norm, a bias of the logits."""

from collections.abc import Iterator

from fusejax.models.config import DecoderConfig
from fusejax.models.families.gpt2 import SYNONYMS
from fusejax.models.families.table import Family, Key, Tensor, Values, embeddings, linear, norm
from fusejax.models.keys import Keys


def _derive(keys: Keys, values: Values) -> Values:
    dim = keys.heads(values["d_model"], values["n_heads"])
    if values["rotary_dim"] > dim:
        keys.refuse("rotary_dim", values["rotary_dim"], f"at most each head's {dim} features")
    return {"head_dim": dim}


def _tensors(c: DecoderConfig) -> Iterator[Tensor]:
    layer = "transformer.h.{i}"
    yield from embeddings(c, "transformer.wte.weight", "lm_head.weight")
    yield Tensor("lm_head.bias", ("output_bias",))
    for name, param in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"{layer}.attn.{name}_proj", f"blocks.attention.{param}", False)
    yield from linear(f"{layer}.attn.out_proj", "blocks.attention.out", False, n_in=2)
    yield from linear(f"{layer}.mlp.fc_in", "blocks.mlp.up", True)
    yield from linear(f"{layer}.mlp.fc_out", "blocks.mlp.down", True)
    yield from norm(f"{layer}.ln_1", "blocks.attention_norm", True)
    yield from norm("transformer.ln_f", "final_norm", True)


GPTJ = Family(
    "GPTJForCausalLM",
    "gptj",
    (
        Key("vocab_size", "vocab_size", default=50400),
        Key("n_embd", "d_model", default=4096),
        Key("n_layer", "n_layers", default=28),
        Key("n_head", "n_heads", default=16),
        Key("n_inner", "d_mlp", default=lambda v: 4 * v["d_model"]),
        Key("n_positions", "max_length", default=2048),
        Key("rotary_dim", "rotary_dim", default=64),
        Key("activation_function", "activation", "activation", "gelu_new"),
        Key("layer_norm_epsilon", "norm_eps", "positive", 1e-5),
        Key("tie_word_embeddings", "tied", "flag", False),
        Key("initializer_range", "initializer_std", "number", 0.02),
    ),
    _tensors,
    fixed={
        **dict.fromkeys(("norm_bias", "mlp_bias", "output_bias", "rope_interleaved"), True),
        **{"norm": "layer", "gated_mlp": False, "parallel_residual": True, "shared_norm": True},
    },
    derive=_derive,
    synonyms=SYNONYMS,
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
)

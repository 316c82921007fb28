import dataclasses

import pytest

from fusejax import models
from fusejax.errors import UserError
from fusejax.models import families

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=50, hidden_size=8, intermediate_size=12,
    num_hidden_layers=1, num_attention_heads=2,
)  # fmt: skip
MPT = dict(architectures=["MPTForCausalLM"], model_type="mpt", vocab_size=50, d_model=8, n_heads=2, n_layers=1)
NEOX = dict(
    architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", vocab_size=50, hidden_size=8, intermediate_size=12,
    num_hidden_layers=1, num_attention_heads=2, rotary_pct=0.5,
)  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        LLAMA,
        LLAMA | dict(num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=6),
        LLAMA | dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), hidden_act="gelu", rms_norm_eps=1e-5),
        MPT,
        MPT | dict(no_bias=False, expansion_ratio=3, attn_config=dict(qk_ln=True, clip_qkv=6.0, softmax_scale=0.2)),
        NEOX,
        NEOX | dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new"),
    ],
)
def test_round_trip(values):
    config = models.decoder_config(values)
    assert models.decoder_config(models.hf_config(config, values["model_type"])) == config


def test_published_configurations():
    open_llama = models.decoder_config(
        dict(
            architectures=["LlamaForCausalLM"], hidden_act="silu", hidden_size=4096, intermediate_size=11008,
            max_position_embeddings=2048, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
            rms_norm_eps=1e-6, tie_word_embeddings=False, torch_dtype="float16", vocab_size=32000,
        )
    )  # fmt: skip
    assert models.count_parameters(open_llama) == 6_738_415_616
    mpt = models.decoder_config(
        dict(
            architectures=["MPTForCausalLM"], model_type="mpt", d_model=4096, n_heads=32, n_layers=32, no_bias=True,
            norm_type="low_precision_layernorm", learned_pos_emb=True, logit_scale=None, vocab_size=50432,
            expansion_ratio=4, embedding_fraction=1.0, max_seq_len=2048,
            attn_config=dict(alibi=True, alibi_bias_max=8, attn_impl="torch", attn_type="multihead_attention",
                             clip_qkv=None, prefix_lm=False, qk_ln=False, softmax_scale=None),
        )
    )  # fmt: skip
    assert models.count_parameters(mpt) == 6_649_286_656
    pythia = models.decoder_config(
        dict(
            architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", hidden_act="gelu", hidden_size=512,
            intermediate_size=2048, num_attention_heads=8, num_hidden_layers=6, rotary_emb_base=10000, rotary_pct=0.25,
            rope_scaling=None, tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50304,
        )
    )  # fmt: skip
    assert models.count_parameters(pythia) == 70_426_624
    assert pythia.rotary_dim == 16
    bloom = models.decoder_config(  # names of three generations side by side
        dict(
            architectures=["BloomForCausalLM"], model_type="bloom", n_embed=1024, n_layer=24, num_attention_heads=16,
            n_inner=None, seq_length=2048, vocab_size=250880, pretraining_tp=1, offset_alibi=100,
        )
    )  # fmt: skip
    assert models.count_parameters(bloom) == 559_214_592
    assert (bloom.n_heads, bloom.head_dim) == (16, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            LLAMA | dict(architectures=["XForCausalLM"]),
            "c.json: architecture XForCausalLM is not supported; supported: Ll",
        ),
        (LLAMA | dict(architectures=["LlamaForSequenceClassification"]), "architecture LlamaForSequenceClassification"),
        (
            dict(model_type="x"),
            "model_type 'x' is not supported; supported: LlamaForCausalLM, MistralForCausalLM, ",
        ),
        (LLAMA | dict(rope_scaling=dict(type="ntk", factor=2.0)), "c.json: rope_scaling: rope_type: 'ntk' is not"),
        (LLAMA | dict(rope_scaling=dict(type="linear")), "c.json: rope_scaling: the key factor is missing"),
        (LLAMA | dict(rope_scaling=dict(rope_type="llama3", factor=2)), "scaling: the key low_freq_factor is missing"),
        (
            LLAMA | dict(rope_scaling=dict(rope_type="longrope", long_factor=[1, 2])),
            r"short_factor: None should be a list of 2 numbers",
        ),
        (
            LLAMA | dict(rope_scaling=dict(rope_type="yarn", factor=2, original_max_position_embeddings="8")),
            "original_max_position_embeddings: '8' should be a whole number above 1",
        ),
        (LLAMA | dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor: 0.5 is not"),
        (LLAMA | dict(rope_parameters=dict(full_attention={})), "rope_parameters: full_attention: {} is not"),
        (LLAMA | dict(hidden_act="quick_gelu"), "hidden_act: 'quick_gelu' is not supported; supported: silu"),
        (LLAMA | dict(num_key_value_heads=3), "num_key_value_heads: 3 is not supported .* a divisor of"),
        (LLAMA | dict(num_attention_heads=3), "a width of 8 does not divide into 3 attention heads"),
        (LLAMA | dict(hidden_size="8"), "hidden_size: '8' should be a whole number above 0"),
        (LLAMA | dict(hidden_size=None), "the key hidden_size is missing"),
        (LLAMA | dict(attention_bias=1), "attention_bias: 1 should be true or false"),
        (LLAMA | dict(rms_norm_eps="small"), "rms_norm_eps: 'small' should be a number"),
        (LLAMA | dict(rms_norm_eps=-1), r"rms_norm_eps: -1.0 should be a number above 0"),
        (LLAMA | dict(rope_theta=0), r"rope_theta: 0.0 should be a number above 0"),
        (LLAMA | dict(rope_theta=float("nan")), r"rope_theta: nan should be a number"),
        (LLAMA | dict(rope_scaling=dict(type="linear", factor=0)), r"factor: 0.0 should be a number above 0"),
        (LLAMA | dict(head_dim=7), "its heads have 7 features each; rotary positions need an even number"),
        (LLAMA | dict(architectures="LlamaForCausalLM"), "architectures: 'LlamaForCausalLM' should be a list"),
        (LLAMA | dict(rope_parameters=3), "rope_parameters: 3 should be a section"),
        (LLAMA | dict(quantization_config=dict(bits=4)), "quantization_config: .* is not supported"),
        (LLAMA | dict(is_causal=False), "is_causal: False is not supported for LlamaForCausalLM; supported: True"),
        (
            LLAMA | dict(rope_scaling=dict(rope_type="llama3", factor=2, low_freq_factor=2, high_freq_factor=1)),
            "high_freq_factor: 1.0 is not supported .* a number above low_freq_factor",
        ),
        (
            LLAMA | dict(head_dim=2, rope_scaling=dict(type="dynamic", factor=2)),
            "rope_type: 'dynamic' is not .* more than 2 features",
        ),
        (
            LLAMA | dict(rope_scaling=dict(rope_type="yarn", factor=2, original_max_position_embeddings=1)),
            "original_max_position_embeddings: 1 should be a whole number above 1",
        ),
        (MPT | dict(attn_config=dict(alibi=False)), "attn_config: alibi: False is not supported for MptForCausalLM"),
        (MPT | dict(attn_config=dict(attn_type="multiquery_attention")), "attn_type: 'multiquery_attention' is not"),
        (MPT | dict(attn_config=dict(prefix_lm=True)), "prefix_lm: True is not"),
        (MPT | dict(attn_config=dict(alibi_bias_max=0)), "attn_config: alibi_bias_max: 0.0 should be a number above 0"),
        (MPT | dict(attn_config=dict(rope=True)), "attn_config: rope: True is not .* supported: False"),
        (MPT | dict(attn_config=dict(kv_n_heads=1)), "attn_config: kv_n_heads: 1 is not .* supported: 2"),
        (MPT | dict(attn_config=dict(sliding_window_size=9)), "attn_config: sliding_window_size: 9 is not .*: -1"),
        (MPT | dict(head_dim=8), "head_dim: 8 is not supported for MptForCausalLM; supported: 4"),
        (NEOX | dict(head_dim=8), "head_dim: 8 is not supported for GPTNeoXForCausalLM; supported: 4"),
        (MPT | dict(norm_type="rmsnorm"), "norm_type: 'rmsnorm' is not"),
        (MPT | dict(logit_scale="inv_sqrt_d_model"), "logit_scale: 'inv_sqrt_d_model' is not .* supported: null"),
        (MPT | dict(tie_word_embeddings=False), "tie_word_embeddings: False is not"),
        (MPT | dict(ffn_config=dict(ffn_type="mptglu")), "ffn_config: .*mptglu.* supported: mptmlp"),
        (NEOX | dict(rotary_pct=0.3), "rotary_pct: 0.3 is not .* an even number of each head's 4 features"),
    ],
)
def test_refused_by_key_and_value(values, message):
    with pytest.raises(UserError, match=message) as caught:
        models.decoder_config(values, "c.json")
    assert "\n" not in str(caught.value)


GEMMA = LLAMA | dict(head_dim=4, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("MistralForCausalLM", dict(layer_types=["full_attention"]), "layer_types: .* is not supported for Mistral"),
        ("MixtralForCausalLM", dict(num_experts_per_tok=9), "num_experts_per_tok: 9 is not .* at most 8"),
        ("Qwen2ForCausalLM", dict(layer_types=["chunked_attention"]), "layer_types: .*chunked.* is not"),
        ("Qwen3ForCausalLM", dict(layer_types=["full_attention"] * 2), "layer_types: .* supported: 1 of sliding_att"),
        ("GemmaForCausalLM", dict(use_bidirectional_attention=True), "use_bidirectional_attention: True is not"),
        ("Gemma2ForCausalLM", dict(use_bidirectional_attention=True), "use_bidirectional_attention: True is not"),
        ("Gemma2ForCausalLM", dict(final_logit_softcapping="x"), "final_logit_softcapping: 'x' should be a number"),
        ("Gemma3ForCausalLM", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping: 50.0 is not .*: null"),
        (
            "Gemma3ForCausalLM",
            dict(rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2))),
            "rope_parameters: sliding_attention: rope_type: 'linear' is not supported",
        ),
        (
            "Phi3ForCausalLM",
            dict(rope_scaling=dict(type="linear", factor=2.0)),
            "rope_scaling: 'linear' is not supported",
        ),
        (
            "Phi3ForCausalLM",
            dict(rope_scaling=dict(type="longrope", long_factor=[1, 2])),
            "short_factor: None should be",
        ),
        ("StableLmForCausalLM", dict(partial_rotary_factor=0.25), "partial_rotary_factor: 0.25 is not .* even number"),
        ("GPT2LMHeadModel", dict(add_cross_attention=True), "add_cross_attention: True is not"),
        ("GPT2LMHeadModel", dict(scale_attn_weights=3), "scale_attn_weights: 3 should be true or false"),
        ("GPTJForCausalLM", dict(n_embd=8, n_head=2, rotary_dim=6), "rotary_dim: 6 is not .* at most each head's 4"),
        ("GPTJForCausalLM", dict(n_embd=8, n_head=2, rotary_dim=3), "rotary_dim: 3 is not .* an even number"),
        ("OPTForCausalLM", dict(word_embed_proj_dim=-1), "word_embed_proj_dim: -1 should be a whole number above 0"),
        ("BloomForCausalLM", dict(hidden_size=9), "a width of 9 does not divide into 2 attention heads"),
        ("BloomForCausalLM", dict(n_embed=16), "n_embed: 16 is not supported .* 8, the same as hidden_size"),
        ("GPT2LMHeadModel", dict(n_head=4), "num_attention_heads: 2 is not .* supported: 4, the same as n_head"),
        ("MistralForCausalLM", dict(sliding_window=0), "sliding_window: 0.0 should be a number above 0"),
        ("MistralForCausalLM", dict(sliding_window=2.5), "sliding_window: 2.5 should be a whole number above 0"),
        ("Gemma2ForCausalLM", dict(attn_logit_softcapping=0), "attn_logit_softcapping: 0.0 should be a number above 0"),
        (
            "Gemma3ForCausalLM",
            dict(rope_parameters=dict(rope_type="default", rope_theta=5.0)),
            "rope_parameters: .* one set for full_attention and one for sliding_attention",
        ),
        ("Gemma3ForCausalLM", dict(rope_scaling=dict(type="linear", factor=2)), "rope_scaling: type: 'linear' is not"),
        (
            "FalconForCausalLM",
            dict(num_kv_heads=1, multi_query=False),
            "num_kv_heads: 1 is not .* multi_query is",
        ),
        ("FalconForCausalLM", dict(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn: 2 is not"),
        (
            "FalconForCausalLM",
            dict(new_decoder_architecture=True, parallel_attn=False),
            "parallel_attn: False is not supported",
        ),
        ("Gemma3ForConditionalGeneration", {}, "architecture Gemma3ForConditionalGeneration is not supported"),
    ],
)
def test_other_families_refuse_by_key_and_value(architecture, changes, message):
    values = GEMMA | dict(architectures=[architecture], num_key_value_heads=2) | changes
    with pytest.raises(UserError, match=message) as caught:
        models.decoder_config(values, "c.json")
    assert "\n" not in str(caught.value)


def test_a_family_cannot_express_another():
    llama = models.decoder_config(LLAMA)
    with pytest.raises(UserError, match="MptForCausalLM's configuration: tie_word_embeddings: False is not supported"):
        models.hf_config(llama, "mpt")
    with pytest.raises(UserError, match="norm: LlamaForCausalLM cannot express 'layer'"):
        models.hf_config(dataclasses.replace(llama, parallel_residual=True, norm="layer"), "llama")


# Keys that change nothing about what a causal model computes when it does not train.
NEUTRAL = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "id2label", "label2id"),
    *("problem_type", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder", "is_decoder", "chunk_size_feed_forward"),
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "emb_pdrop", "embd_pdrop", "hidden_dropout"),
    *("layerdrop", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise", "embedding_fraction", "init_device"),
    *("attn_impl", "attn_uses_sequence_id"),
    *("pretraining_tp", "slow_but_exact", "reorder_and_upcast_attn"),  # the same sums in another order
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    "_sliding_window_pattern",  # made from sliding_window_pattern, never read from a file
    "learned_pos_emb",  # a table only where there is no ALiBi, which is refused
}


class Recorded(dict):
    """A config.json that notes which of its keys are looked at."""

    def __init__(self, values, seen):
        super().__init__({key: Recorded(v, seen) if isinstance(v, dict) else v for key, v in values.items()})
        self.seen = seen

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.seen.add(key)
        return super().__contains__(key)

    def __or__(self, other):
        return Recorded(dict(self) | other, self.seen)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.model_type)
def test_every_key_of_transformers_is_read_or_neutral(family):
    """A switch that a newer transformers adds must not be passed over."""
    transformers = pytest.importorskip("transformers")
    values = transformers.CONFIG_MAPPING[family.model_type]().to_dict() | {"architectures": [family.architecture]}
    models.decoder_config(recorded := Recorded(values, set()))
    inside = {key for name in ("attn_config", "rope_parameters") for key in values.get(name) or {}}
    assert (values.keys() | inside) - recorded.seen - NEUTRAL == set()

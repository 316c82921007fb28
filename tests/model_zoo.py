"""Tiny configurations of every family and switch, one a line, and transformers' torch models of them."""

import pytest

V = 91  # rows, of which the last few are padding as far as the tests' ids go
LENGTH = 24  # tokens of a row; beyond the context of every family whose positions have no end

_ROTARY = dict(
    vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, head_dim=8,
)  # fmt: skip
LLAMA = _ROTARY | dict(model_type="llama", num_key_value_heads=4)
MISTRAL = _ROTARY | dict(model_type="mistral", sliding_window=5)
MIXTRAL = _ROTARY | dict(model_type="mixtral", num_local_experts=5, num_experts_per_tok=2)
QWEN2 = _ROTARY | dict(model_type="qwen2", num_hidden_layers=3)
QWEN2.pop("head_dim")
QWEN3 = _ROTARY | dict(model_type="qwen3", head_dim=12)
GEMMA = _ROTARY | dict(model_type="gemma", head_dim=12)
GEMMA2 = _ROTARY | dict(model_type="gemma2", head_dim=12, sliding_window=5, num_hidden_layers=3)
GEMMA3 = _ROTARY | dict(model_type="gemma3_text", head_dim=12, sliding_window=5, num_hidden_layers=3)
GEMMA3 |= dict(sliding_window_pattern=2)
MPT = dict(model_type="mpt", vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
NEOX = dict(
    model_type="gpt_neox", vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=16,
)  # fmt: skip

PHI3 = _ROTARY | dict(model_type="phi3", original_max_position_embeddings=8, pad_token_id=0)
PHI3.pop("head_dim")
STABLELM = PHI3 | dict(model_type="stablelm", partial_rotary_factor=0.5)
STABLELM.pop("original_max_position_embeddings")
GPT2 = dict(model_type="gpt2", vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32)
GPTJ = GPT2 | dict(model_type="gptj", rotary_dim=4)
OPT = dict(
    model_type="opt", vocab_size=V, hidden_size=32, ffn_dim=44, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
BLOOM = dict(model_type="bloom", vocab_size=V, hidden_size=32, n_layer=2, n_head=4)
FALCON = dict(
    model_type="falcon", vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16,
)  # fmt: skip
FALCON_NEW = FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)
FALCON_RW = FALCON | dict(alibi=True, bias=True, multi_query=False, parallel_attn=False)


def rope(kind, **values):
    """`rope_parameters` with an original context of 8 tokens, thrice exceeded by the tests' rows."""
    original = {} if kind in ("linear", "dynamic") else dict(original_max_position_embeddings=8)
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, factor=3.0) | original | values)


LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=2.0)
LONG = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0])

CASES = {
    "llama": LLAMA,
    "llama-gqa": LLAMA | dict(num_key_value_heads=2),
    "llama-mqa": LLAMA | dict(num_key_value_heads=1),
    "llama-tied": LLAMA | dict(tie_word_embeddings=True),
    "llama-biases": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama-head_dim": LLAMA | dict(head_dim=12, rms_norm_eps=1e-3),
    "llama-theta": LLAMA | dict(rope_parameters=dict(rope_type="default", rope_theta=300.0)),
    "llama-old-theta": LLAMA | dict(rope_theta=300.0),
    "llama-gelu": LLAMA | dict(hidden_act="gelu"),
    "llama-gelu_pytorch_tanh": LLAMA | dict(hidden_act="gelu_pytorch_tanh"),
    "llama-relu": LLAMA | dict(hidden_act="relu"),
    "llama-linear": LLAMA | rope("linear"),
    "llama-dynamic": LLAMA | rope("dynamic"),
    "llama-yarn": LLAMA | rope("yarn"),
    "llama-yarn-betas": LLAMA | rope("yarn", beta_fast=4.0, beta_slow=0.5, attention_factor=0.7),
    "llama-yarn-no-truncate": LLAMA | rope("yarn", truncate=False, beta_fast=2.0),
    "llama-yarn-mscale": LLAMA | rope("yarn", mscale=2.0, mscale_all_dim=0.5),
    "llama-yarn-no-factor": LLAMA | rope("yarn", factor=None),
    "llama-llama3": LLAMA | rope("llama3", **LLAMA3),
    "llama-longrope": LLAMA | rope("longrope", **LONG),
    "llama-longrope-factor": LLAMA | rope("longrope", attention_factor=1.3, **LONG),
    "llama-rope_scaling": LLAMA | dict(rope_scaling=dict(type="linear", factor=2.0), rope_theta=50.0),
    "mistral": MISTRAL,
    "mistral-no-window": MISTRAL | dict(sliding_window=None),
    "mistral-yarn": MISTRAL | rope("yarn"),
    "mixtral": MIXTRAL,
    "mixtral-window": MIXTRAL | dict(sliding_window=4, num_experts_per_tok=1),
    "mixtral-all-experts": MIXTRAL | dict(num_experts_per_tok=5),
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | dict(tie_word_embeddings=True),
    "qwen2-window": QWEN2 | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-layer_types": QWEN2 | dict(
        use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2-window-off": QWEN2 | dict(use_sliding_window=False, sliding_window=5, max_window_layers=0),
    "qwen2-yarn": QWEN2 | rope("yarn"),
    "qwen3": QWEN3,
    "qwen3-biases": QWEN3 | dict(attention_bias=True),
    "qwen3-window": QWEN3 | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma": GEMMA,
    "gemma-old-gelu": GEMMA | dict(hidden_act="gelu"),
    "gemma-biases": GEMMA | dict(attention_bias=True),
    "gemma2": GEMMA2,
    "gemma2-no-caps": GEMMA2 | dict(attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma2-small-caps": GEMMA2 | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2-scale": GEMMA2 | dict(query_pre_attn_scalar=20, attention_bias=True),
    "gemma2-layer_types": GEMMA2 | dict(layer_types=["full_attention", "full_attention", "sliding_attention"]),
    "gemma3": GEMMA3,
    "gemma3-linear": GEMMA3 | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gemma3-thetas": GEMMA3 | dict(rope_theta=500.0, rope_local_base_freq=20.0),
    "gemma3-softcap": GEMMA3 | dict(final_logit_softcapping=3.0, query_pre_attn_scalar=20, attention_bias=True),
    "gemma3-all-windows": GEMMA3 | dict(layer_types=["sliding_attention"] * 3),
    "gemma3-no-windows": GEMMA3 | dict(layer_types=["full_attention"] * 3),
    "mpt": MPT,
    "mpt-6-heads": MPT | dict(d_model=36, n_heads=6),
    "mpt-bias_max": MPT | dict(attn_config=dict(alibi_bias_max=3)),
    "mpt-clip_qkv": MPT | dict(attn_config=dict(clip_qkv=0.5)),
    "mpt-softmax_scale": MPT | dict(attn_config=dict(softmax_scale=0.3)),
    "mpt-eps": MPT | dict(layer_norm_epsilon=1e-2),
    "mpt-biases": MPT | dict(no_bias=False),
    "mpt-qk_ln": MPT | dict(attn_config=dict(qk_ln=True, clip_qkv=1.0)),
    "mpt-qk_ln-biases": MPT | dict(no_bias=False, attn_config=dict(qk_ln=True)),
    "mpt-expansion_ratio": MPT | dict(expansion_ratio=2),
    "neox": NEOX,
    "neox-sequential": NEOX | dict(use_parallel_residual=False),
    "neox-rotary-half": NEOX | dict(rotary_pct=0.5, rotary_emb_base=500),
    "neox-rotary-all": NEOX | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1)),
    "neox-linear": NEOX | dict(rope_scaling=dict(type="linear", factor=2.0), rotary_pct=0.5),
    "neox-no-attention_bias": NEOX | dict(attention_bias=False),
    "neox-tied": NEOX | dict(tie_word_embeddings=True),
    "neox-gelu_new": NEOX | dict(hidden_act="gelu_new"),
    "neox-gelu_fast": NEOX | dict(hidden_act="gelu_fast", layer_norm_eps=1e-3),
    "phi3": PHI3,
    "phi3-window": PHI3 | dict(sliding_window=5, tie_word_embeddings=True),
    "phi3-longrope": PHI3 | rope("longrope", factor=None, **LONG),
    "phi3-partial": PHI3 | dict(
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, short_factor=[1.0, 1.1],
                             long_factor=[2.0, 3.0]),
    ),
    "stablelm": STABLELM,
    "stablelm-parallel": STABLELM | dict(use_parallel_residual=True, use_qkv_bias=True),
    "stablelm-qk_layernorm": STABLELM | dict(qk_layernorm=True, tie_word_embeddings=True),
    "stablelm-dynamic": STABLELM | dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | dict(tie_word_embeddings=False, n_inner=44),
    "gpt2-unscaled": GPT2 | dict(scale_attn_weights=False, activation_function="relu"),
    "gpt2-by-layer": GPT2 | dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gptj": GPTJ,
    "gptj-all-rotary": GPTJ | dict(rotary_dim=8, n_inner=44),
    "gptj-tied": GPTJ | dict(tie_word_embeddings=True),
    "opt": OPT,
    "opt-350m": OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=20),
    "opt-no-final-norm": OPT | dict(_remove_final_layer_norm=True, activation_function="gelu"),
    "opt-no-bias": OPT | dict(enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-untied": OPT | dict(tie_word_embeddings=False),
    "bloom": BLOOM,
    "bloom-6-heads": BLOOM | dict(hidden_size=36, n_head=6, tie_word_embeddings=False),
    "bloom-post-layernorm": BLOOM | dict(apply_residual_connection_post_layernorm=True, layer_norm_epsilon=1e-3),
    "falcon": FALCON,
    "falcon-sequential": FALCON | dict(parallel_attn=False, ffn_hidden_size=44),
    "falcon-all-heads": FALCON | dict(multi_query=False, bias=True, tie_word_embeddings=False),
    "falcon-linear": FALCON | rope("linear"),
    "falcon-new": FALCON_NEW,
    "falcon-new-one-norm": FALCON_NEW | dict(num_ln_in_parallel_attn=1, activation="gelu_pytorch_tanh"),
    "falcon-new-all-heads": FALCON_NEW | dict(num_kv_heads=4, bias=True),
    "falcon-alibi": FALCON_RW,
    "falcon-alibi-6-heads": FALCON_RW | dict(hidden_size=36, num_attention_heads=6, parallel_attn=True),
}  # fmt: skip


def add_what_mpt_lacks(model):
    """Give transformers' MPT what the published model has: biases, norms of queries and keys, MLP width, slopes."""
    torch = pytest.importorskip("torch")
    config, width = model.config, model.config.d_model
    bias, bias_max = not config.no_bias, config.attn_config.alibi_bias_max
    build = model.transformer.build_mpt_alibi_tensor
    model.transformer.build_mpt_alibi_tensor = lambda heads, length, device: build(heads, length, bias_max, device)
    for block in model.transformer.blocks:
        block.ffn.up_proj = torch.nn.Linear(width, config.expansion_ratio * width, bias=bias)
        block.ffn.down_proj = torch.nn.Linear(config.expansion_ratio * width, width, bias=bias)
        if bias:
            block.attn.Wqkv.bias = torch.nn.Parameter(torch.zeros(3 * width))
            block.attn.out_proj.bias = torch.nn.Parameter(torch.zeros(width))
            block.norm_1.bias = torch.nn.Parameter(torch.zeros(width))
            block.norm_2.bias = torch.nn.Parameter(torch.zeros(width))
        if config.attn_config.qk_ln:
            q_ln, k_ln = (torch.nn.LayerNorm(width, bias=bias) for _ in range(2))
            block.attn.q_ln, block.attn.k_ln = q_ln, k_ln
            clip, block.attn.clip_qkv = config.attn_config.clip_qkv or 1e9, None

            def normalise(module, args, qkv, q_ln=q_ln, k_ln=k_ln, clip=clip):
                q, k, v = qkv.clamp(-clip, clip).chunk(3, dim=2)
                return torch.cat([q_ln(q), k_ln(k), v], dim=2)

            block.attn.Wqkv.register_forward_hook(normalise)
    if bias:
        model.transformer.norm_f.bias = torch.nn.Parameter(torch.zeros(width))


def torch_model(values):
    """transformers' model of a configuration, with random weights, the norms' among them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**values)
    # Falcon's eager attention adds ALiBi's bias twice, its default once.
    attention = "sdpa" if values.get("alibi") else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    if values["model_type"] == "mpt":
        add_what_mpt_lacks(model)
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith("weight") and bool((parameter == 1).all())
        parameter.data.normal_(1.0 if is_scale else 0.0, 0.4)
    return model


def torch_logits(model, ids, mask=None):
    """float32 [len(ids), V] of one sequence, padded where `mask` is 0."""
    torch = pytest.importorskip("torch")
    ids = torch.tensor(ids)[None]
    kwargs = {}
    if mask is not None:
        kwargs["attention_mask"] = torch.tensor(mask)[None]
        if model.config.model_type not in ("mpt", "bloom"):
            kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits[0].numpy()

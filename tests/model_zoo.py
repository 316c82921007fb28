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
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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

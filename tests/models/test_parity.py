"""Logits equal those of transformers' own torch classes, for every family and switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, L = 91, 24

LLAMA = dict(
    model_type="llama", vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64,
)  # fmt: skip
MPT = dict(model_type="mpt", vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
NEOX = dict(
    model_type="gpt_neox", vocab_size=V, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip

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
    "neox-no-attention_bias": NEOX | dict(attention_bias=False),
    "neox-tied": NEOX | dict(tie_word_embeddings=True),
    "neox-gelu_new": NEOX | dict(hidden_act="gelu_new"),
    "neox-gelu_fast": NEOX | dict(hidden_act="gelu_fast", layer_norm_eps=1e-3),
}


def add_what_mpt_lacks(model):
    """Give transformers' MPT what the published model has: biases, norms of queries and keys, MLP width, slopes."""
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


def random_torch_model(values):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if values["model_type"] == "mpt":
        add_what_mpt_lacks(model)
    for parameter in model.parameters():
        is_scale = parameter.ndim == 1 and bool((parameter == 1).all())
        parameter.data.normal_(1.0 if is_scale else 0.0, 0.4)
    return model


def torch_logits(model, ids, mask=None):
    """float32 [len(ids), V] of one sequence, padded where `mask` is 0."""
    ids = torch.tensor(ids)[None]
    kwargs = {}
    if mask is not None:
        kwargs["attention_mask"] = torch.tensor(mask)[None]
        if model.config.model_type != "mpt":
            kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_torch(case, tmp_path):
    reference = random_torch_model(CASES[case])
    reference.save_pretrained(tmp_path)
    if CASES[case]["model_type"] == "mpt":  # a published folder, from before transformers had the class
        config = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(config.replace("MptForCausalLM", "MPTForCausalLM"))
    model = models.load(tmp_path)
    ids = np.random.default_rng(1).integers(0, V, (4, L))
    ids[0, :3] = V - 1
    segments, positions = np.ones((4, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (4, 1))
    segments[1, 15:] = 0  # right padding
    segments[2, :7] = 0  # left padding
    positions[2] = np.maximum(positions[2] - 7, 0)
    segments[3, 9:] = 2  # two documents
    positions[3, 9:] -= 9
    logits = np.asarray(jax.jit(lambda *args: model(*args))(jnp.asarray(ids), segments, positions))
    assert np.isfinite(logits).all()
    assert logits.dtype == np.float32
    assert np.abs(logits).max() > 1

    def check(got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)

    check(logits[0], torch_logits(reference, ids[0]))
    check(logits[1, :15], torch_logits(reference, ids[1], segments[1])[:15])
    check(logits[2, 7:], torch_logits(reference, ids[2], segments[2])[7:])
    check(logits[3, :9], torch_logits(reference, ids[3, :9]))
    check(logits[3, 9:], torch_logits(reference, ids[3, 9:]))

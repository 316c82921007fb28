"""Floating-point operations of training and of a forward pass, and the chips' peaks, for throughput and MFU.

Counted: matrix products, a multiply-add being two operations. Per token, forward, in a causal sequence of L tokens:

    2 · parameters of the matrices that multiply the token + 4 · n_heads · head_dim · Σ_layers min(L/2, window)

the unembedding and the token's own experts among the matrices, the second term being scores and values over L/2 earlier
tokens on average, or the window's. The backward pass costs twice the forward; recomputation under remat is not counted
(model FLOPs, as in the PaLM paper, appendix B).
"""

from fusejax.models import DecoderConfig

# Dense bf16 peak of one chip, operations a second, from the vendors' data sheets.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
}

MFU_FORMULA = "tokens_per_s * flops_per_token / (devices * peak_flops_per_device)"


def forward_per_token(config: DecoderConfig, length: int) -> float:
    """Operations of one token's forward pass in a sequence of `length` tokens."""
    heads = config.n_heads * config.head_dim
    kv_heads = config.n_kv_heads * config.head_dim
    attention = config.d_model * (2 * heads + 2 * kv_heads)
    mlp = config.d_model * config.d_mlp * (3 if config.gated_mlp else 2)
    if config.n_experts:
        mlp = config.experts_per_token * mlp + config.d_model * config.n_experts
    width = config.embedding_dim or config.d_model
    projections = 2 * config.d_model * width if config.embedding_dim else 0
    matrices = config.n_layers * (attention + mlp) + projections + width * config.vocab_size
    seen = sum(min(length / 2, config.window or length) if window else length / 2 for window in config.has_window)
    return 2.0 * matrices + 4.0 * heads * seen


def training_per_token(config: DecoderConfig, length: int) -> float:
    """Operations of one token's forward and backward pass."""
    return 3.0 * forward_per_token(config, length)


def peak(device_kind: str) -> float | None:
    """bf16 peak of one device, None where it is not known (a CPU, say)."""
    return PEAK.get(device_kind)

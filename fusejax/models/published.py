"""Shapes of a few published models, so that a job with them can be planned where none of their files is.

Each is what the model's config.json says of its sizes; a folder or the hub's cache, where there is one, comes first.
"""

from typing import Any


def _llama(vocab_size: int, max_length: int, norm_eps: float) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": max_length,
        "rms_norm_eps": norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def _pythia(layers: int, width: int, heads: int, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }


_PYTHIA = {
    "70m": _pythia(6, 512, 8, 50304),
    "160m": _pythia(12, 768, 12, 50304),
    "410m": _pythia(24, 1024, 16, 50304),
    "1b": _pythia(16, 2048, 8, 50304),
    "1.4b": _pythia(24, 2048, 16, 50304),
    "2.8b": _pythia(32, 2560, 32, 50304),
    "6.9b": _pythia(32, 4096, 32, 50432),
}

# Hub name → the keys of config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 1e-5),
    "openlm-research/open_llama_7b_v2": _llama(32000, 2048, 1e-6),
    "mosaicml/mpt-7b": {
        "model_type": "mpt",
        "vocab_size": 50432,
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 32,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "no_bias": True,
        "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8},
    },
} | {f"EleutherAI/pythia-{size}{kind}": keys for size, keys in _PYTHIA.items() for kind in ("", "-deduped")}

"""The full step of configs/fusellm-7b.yaml, for real machines: what fusing needs beside plain continual training."""

from pathlib import Path

import pytest

from fusejax import aot, config, models

LLAMA_2_7B = models.DecoderConfig(
    vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_mlp=11008, max_length=4096,
    norm_eps=1e-5, rotary_dim=128,
)  # fmt: skip
SOURCES = (32000, 32000, 50432)  # Llama-2, OpenLLaMA-v2, MPT
RECIPE = Path(__file__).parents[2] / "configs/fusellm-7b.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p:2x2x2", "v6e:2x4"])
def test_7b_fused_step_needs_no_more_memory_than_clm(devices, chip):
    job = config.load(RECIPE)
    fused = aot.train_call(job, LLAMA_2_7B, devices(chip), source_vocabularies=SOURCES).compile()
    clm = aot.train_call(job, LLAMA_2_7B, devices(chip)).compile()
    print(f"\n{chip} fused {fused}\n{chip} clm   {clm}")
    assert fused.temporaries <= 1.03 * clm.temporaries
    assert clm.arguments > 12 * models.count_parameters(LLAMA_2_7B) / len(devices(chip))  # parameters and two moments
    # Over the wires go parameters and gradients, and next to nothing for the targets.
    assert _bytes(fused) <= 1.01 * _bytes(clm)


def _bytes(program):
    return sum(traffic.bytes for traffic in program.collectives.values())

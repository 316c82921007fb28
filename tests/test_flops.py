import jax
import pytest

from fusejax import flops, models
from fusejax.models import DecoderConfig

LLAMA_7B = DecoderConfig(32000, 4096, 32, 32, 32, 128, 11008, 4096, rotary_dim=128)


def test_a_7b_model_costs_about_six_operations_per_parameter():
    parameters = models.count_parameters(LLAMA_7B)
    assert parameters == 6_738_415_616  # Llama-2-7B, as published
    matrices = parameters - 32000 * 4096 - 4096 * (2 * 32 + 1)  # the embedding is looked up, norms are vectors
    attention = 6 * 32 * 4096 * 2048
    assert flops.training_per_token(LLAMA_7B, 2048) == 6 * matrices + attention


def test_a_forward_pass_agrees_with_the_compiler():
    """One layer, so that the scan's body is counted once; the compiler also counts what is no matrix product."""
    config = DecoderConfig(512, 64, 1, 4, 2, 16, 256, 128, rotary_dim=16)
    model = models.init(config, 0)
    ids = jax.ShapeDtypeStruct((1, 128), "int32")
    cost = jax.jit(lambda ids: model(ids)).lower(ids).compile().cost_analysis()
    # All L earlier and later tokens are multiplied, half of them masked.
    full = 128 * flops.forward_per_token(config, 2 * 128)
    assert cost["flops"] == pytest.approx(full, rel=0.15)


def test_unknown_chips_have_no_peak():
    assert flops.peak("cpu") is None
    assert flops.peak("TPU v5p") == 459e12

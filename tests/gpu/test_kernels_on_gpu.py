"""The loss and the top-k on the card itself, against the dense float64 definitions."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusejax.kernels.fusion_loss import reference
from fusejax.kernels.topk_unembed import topk_unembed

from fusejax import loss

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu" and not os.environ.get("FUSEJAX_REQUIRE_GPU"),
    reason="needs an NVIDIA GPU (make test-gpu)",
)
VARIANTS = [
    {"kind": "ce", "tail": "tail"},
    {"kind": "kl", "tail": "renormalize", "temperature": 2.0, "logit_scale": 0.7, "z_loss": 1e-2},
    {"kind": "kl", "tail": "tail", "temperature": 1.5, "logit_cap": 3.0},
]
SIZES = [(37, 48, 701, 5), (300, 256, 50257, 11)]  # tokens, channels, vocabulary, entries


def example(T, D, V, M):
    """As the CPU's tests: masked tokens, missing labels, empty entries, repeated ids; values that bfloat16 holds."""
    rng = np.random.default_rng(T)
    hidden, unembedding = (
        np.asarray(jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16), np.float32)
        for shape, scale in (((T, D), 1.0), ((D, V), D**-0.5))
    )
    labels = np.where(rng.random(T) < 0.1, -1, rng.integers(0, V, T)).astype(np.int32)
    ids = np.where(rng.random((T, M)) < 0.15, -1, rng.integers(0, V, (T, M))).astype(np.int32)
    ids[:, -1] = np.where(rng.random(T) < 0.3, ids[:, 0], ids[:, -1])
    probs = rng.dirichlet(np.full(M + 1, 0.5), T)[:, :M].astype(np.float32)
    mask = np.where(rng.random(T) < 0.2, 0, rng.random(T)).astype(np.float32)
    return hidden, unembedding, labels, ids, np.where(ids >= 0, probs, 0).astype(np.float32), mask


def run(hidden, unembedding, *rows, **options):
    def total(hidden, unembedding):
        sums = loss.fusion_loss(hidden, unembedding, *rows, weight_clm=0.3, **options)
        return sums.total, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, unembedding)
    return sums, gradients


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@pytest.mark.parametrize("T_D_V_M", SIZES)
@pytest.mark.parametrize("options", VARIANTS)
def test_loss_in_bfloat16(implementation, T_D_V_M, options):
    hidden, *rest = example(*T_D_V_M)
    sums, gradients = run(jnp.asarray(hidden, jnp.bfloat16), *rest, implementation=implementation, **options)
    want = reference.losses(hidden, *rest, weight_clm=0.3, **options)
    for name in ("clm", "fusion", "total"):
        np.testing.assert_allclose(getattr(sums, name), getattr(want, name).sum(), rtol=2e-5, err_msg=name)
    exact = reference.gradients(hidden, *rest, weight_clm=0.3, **options)
    for mine, theirs in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(np.float32(mine), theirs, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@pytest.mark.parametrize("options", VARIANTS)
def test_loss_in_float32(implementation, options):
    """With float32 products asked for, what holds on a CPU holds here."""
    arrays = example(*SIZES[1])
    with jax.default_matmul_precision("highest"):
        sums, gradients = run(*arrays, implementation=implementation, **options)
    want = reference.losses(*arrays, weight_clm=0.3, **options)
    for name in ("clm", "fusion", "total"):
        np.testing.assert_allclose(getattr(sums, name), getattr(want, name).sum(), rtol=1e-6, err_msg=name)
    for mine, theirs in zip(gradients, reference.gradients(*arrays, weight_clm=0.3, **options), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


def test_topk():
    hidden, unembedding, labels, *_ = example(*SIZES[1])
    out = topk_unembed(jnp.asarray(hidden), jnp.asarray(unembedding), labels, k=10, vocab_size=50200)
    logits = np.float64(hidden) @ np.float64(unembedding)[:, :50200]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_array_equal(out.ids, np.argsort(-logprobs, -1, kind="stable")[:, :10])
    np.testing.assert_allclose(out.logprobs, np.take_along_axis(logprobs, np.asarray(out.ids), -1), atol=1e-5)

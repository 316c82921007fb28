"""Every implementation of the fused loss against the dense float64 definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusejax.kernels.fusion_loss import reference

from fusejax import loss


def example(T, D, V, M, seed=0, scale=1.0):
    """Random rows with masked tokens, missing labels, empty entries, repeated ids and fractional weights."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(T, D)).astype(np.float32) * scale
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    labels = np.where(rng.random(T) < 0.1, -1, rng.integers(0, V, T)).astype(np.int32)
    ids = np.where(rng.random((T, M)) < 0.15, -1, rng.integers(0, V, (T, M))).astype(np.int32)
    ids[:, -1] = np.where(rng.random(T) < 0.3, ids[:, 0], ids[:, -1])
    probs = rng.dirichlet(np.full(M + 1, 0.5), T)[:, :M].astype(np.float32)
    mask = np.where(rng.random(T) < 0.2, 0, rng.random(T)).astype(np.float32)
    return hidden, unembedding, labels, ids, np.where(ids >= 0, probs, 0).astype(np.float32), mask


def run(hidden, unembedding, labels, ids, probs, mask, **options):
    def total(hidden, unembedding):
        sums = loss.fusion_loss(hidden, unembedding, labels, ids, probs, mask, **options)
        return sums.total, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, unembedding)
    return sums, gradients


def check(arrays, block=None, gradients="forward", implementation="xla", interpret=False, **options):
    kernel = {"implementation": implementation, "interpret": interpret}
    sums, got = run(*arrays, block=block, gradients=gradients, **kernel, **options)
    want = reference.losses(*arrays, **options)
    for name in ("clm", "fusion", "total"):
        np.testing.assert_allclose(getattr(sums, name), getattr(want, name).sum(), rtol=1e-6, atol=1e-6, err_msg=name)
    for mine, theirs in zip(got, reference.gradients(*arrays, **options), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1e-3, np.abs(theirs).max()))


@pytest.mark.parametrize("tail", ["tail", "renormalize"])
@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_variant(kind, tail, temperature):
    check(example(37, 16, 101, 5), block=8, weight_clm=0.3, kind=kind, tail=tail, temperature=temperature)


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize("tail", ["tail", "renormalize"])
def test_cap_scale_and_z_loss(tail, gradients):
    check(
        example(11, 8, 53, 3, seed=1),
        block=4,
        gradients=gradients,
        weight_clm=0.6,
        tail=tail,
        logit_cap=3.0,
        logit_scale=0.7,
        z_loss=1e-2,
    )


@pytest.mark.parametrize("V", [32000, 50257, 50432, 151936])
def test_real_vocabularies(V):
    check(example(7, 16, V, 11, seed=2, scale=0.5), block=3, weight_clm=0.9, kind="kl")


@pytest.mark.parametrize(("T", "M", "block"), [(1, 1, 1), (5, 1, 2), (13, 4, 13), (13, 4, 1000), (16, 2, 5)])
def test_odd_sizes(T, M, block):
    check(example(T, 4, 11, M, seed=T), block=block, weight_clm=0.5)


def test_support_is_the_whole_vocabulary():
    hidden, unembedding, labels, _, _, mask = example(6, 4, 5, 5, seed=3)
    ids = np.tile(np.arange(5, dtype=np.int32), (6, 1))
    probs = np.random.default_rng(3).dirichlet(np.ones(6), 6)[:, :5].astype(np.float32)
    check((hidden, unembedding, labels, ids, probs, mask), weight_clm=0.2)


@pytest.mark.parametrize("tail", ["tail", "renormalize"])
def test_reference_gradient_is_the_derivative_of_the_reference_loss(tail):
    arrays = [np.float64(a) if a.dtype == np.float32 else a for a in example(4, 3, 7, 3, seed=5)]
    options = {"weight_clm": 0.4, "kind": "kl", "tail": tail, "temperature": 1.5, "logit_cap": 4.0, "z_loss": 0.01}
    exact = reference.gradients(*arrays, **options)
    for which in (0, 1):
        for index in np.ndindex(arrays[which].shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arrays]
                moved[which][index] += step
                sides.append(reference.losses(*moved, **options).total.sum())
            np.testing.assert_allclose((sides[0] - sides[1]) / 2e-6, exact[which][index], rtol=1e-6, atol=1e-7)


def test_bfloat16_hidden_states_add_up_in_float32():
    hidden, unembedding, labels, ids, probs, mask = example(24, 64, 97, 4, seed=6, scale=0.2)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(unembedding.astype(jnp.bfloat16), np.float32)
    sums, (grad_hidden, grad_unembedding) = run(hidden, unembedding, labels, ids, probs, mask, weight_clm=0.5)
    arrays = (np.float32(hidden), rounded, labels, ids, probs, mask)
    np.testing.assert_allclose(sums.total, reference.losses(*arrays, weight_clm=0.5).total.sum(), rtol=1e-5)
    want = reference.gradients(*arrays, weight_clm=0.5)
    assert (grad_hidden.dtype, grad_unembedding.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.float32(grad_hidden), want[0], atol=0.02 * np.abs(want[0]).max())
    np.testing.assert_allclose(grad_unembedding, want[1], atol=0.02 * np.abs(want[1]).max())

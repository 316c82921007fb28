"""The Pallas kernels, interpreted, against the dense float64 definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from fusejax.kernels.fusion_loss import reference
from fusejax.kernels.topk_unembed import topk_unembed
from test_fusion_loss import check, example, run
from test_topk_unembed import dense

both = pytest.mark.parametrize("implementation", ["tpu", "gpu"])
VARIANTS = [
    {"kind": "ce", "tail": "tail"},
    {"kind": "kl", "tail": "renormalize", "temperature": 2.0, "logit_scale": 0.7, "z_loss": 1e-2},
    {"kind": "kl", "tail": "tail", "temperature": 1.5, "logit_cap": 3.0, "gradients": "recompute"},
    {"kind": "ce", "tail": "renormalize", "logit_cap": 5.0},
]


@both
@pytest.mark.parametrize("options", VARIANTS)
def test_loss_and_gradients(implementation, options):
    """Tokens that no block and columns that no tile divides, ids of −1, repeated ids, masked rows."""
    check(example(37, 16, 701, 5), block=24, weight_clm=0.3, implementation=implementation, interpret=True, **options)


@both
def test_support_is_the_whole_vocabulary_and_one_token(implementation):
    hidden, unembedding, labels, _, _, mask = example(6, 4, 5, 5, seed=3)
    ids = np.tile(np.arange(5, dtype=np.int32), (6, 1))
    probs = np.random.default_rng(3).dirichlet(np.ones(6), 6)[:, :5].astype(np.float32)
    kernel = {"implementation": implementation, "interpret": True}
    check((hidden, unembedding, labels, ids, probs, mask), weight_clm=0.2, **kernel)
    check(example(1, 4, 130, 1, seed=4), weight_clm=0.5, **kernel)


@both
@pytest.mark.parametrize("tail", ["tail", "renormalize"])
def test_entropy_of_the_model_and_rows_that_count_for_nothing(implementation, tail):
    hidden, unembedding, labels, ids, probs, mask = example(20, 8, 150, 4, seed=5)
    hidden[3] = np.nan
    mask[3] = 0
    arrays = (hidden, unembedding, labels, ids, probs, mask)
    options = {"weight_clm": 0.4, "tail": tail, "model_entropy": True}
    sums, gradients = run(*arrays, implementation=implementation, interpret=True, **options)
    plain, plain_gradients = run(*arrays, **options)
    np.testing.assert_allclose(sums.model_entropy, plain.model_entropy, rtol=1e-6)
    for mine, theirs in zip(gradients, plain_gradients, strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    sums, gradients = run(*arrays[:-1], mask * 0, implementation=implementation, interpret=True, **options)
    assert sums.total == 0
    assert not any(np.any(g) for g in gradients)


@both
def test_bfloat16_loss(implementation):
    hidden, unembedding, *rows = example(24, 64, 197, 4, seed=6, scale=0.2)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(unembedding.astype(jnp.bfloat16), np.float32)
    options = {"weight_clm": 0.5}
    sums, gradients = run(hidden, unembedding, *rows, implementation=implementation, interpret=True, **options)
    exact = (np.float32(hidden), rounded, *rows)
    np.testing.assert_allclose(sums.total, reference.losses(*exact, **options).total.sum(), rtol=1e-5)
    for mine, theirs in zip(gradients, reference.gradients(*exact, **options), strict=True):
        np.testing.assert_allclose(np.float32(mine), theirs, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("T", "V", "vocab_size", "k", "options"),
    [
        (37, 701, 701, 10, {}),
        (16, 300, 291, 5, {"logit_scale": 0.5, "logit_cap": 3.0}),
        (5, 300, 300, 130, {"block": 128}),
        (3, 200, 20, 20, {"block": 128}),
        (4, 140, 140, 0, {}),
    ],
)
def test_topk(T, V, vocab_size, k, options):
    rng = np.random.default_rng(T)
    hidden, table = rng.normal(size=(T, 16)).astype(np.float32), rng.normal(size=(16, V)).astype(np.float32)
    if "logit_cap" not in options:  # whole numbers are summed without rounding: many ties, also across tiles
        hidden, table = np.round(hidden), np.round(table)
    labels = rng.integers(-1, vocab_size, T).astype(np.int32)
    out = topk_unembed(
        hidden, table, labels, k=k, vocab_size=vocab_size, implementation="tpu", interpret=True, **options
    )
    scale, cap = options.get("logit_scale", 1.0), options.get("logit_cap")
    ids, logprobs, lse, ce = dense(hidden, table, labels, k, vocab_size, scale, cap)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(out.log_normalizer, lse, atol=1e-5)
    np.testing.assert_allclose(out.ce, ce, atol=1e-5)


def test_topk_of_a_broken_row_leaves_the_others_alone():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(7, 16)).astype(np.float32), rng.normal(size=(16, 300)).astype(np.float32)
    hidden[2, 0] = np.nan
    out = topk_unembed(hidden, table, k=3, implementation="tpu", interpret=True, block=128)
    plain = topk_unembed(hidden, table, k=3)
    assert np.isnan(out.logprobs[2]).all()
    keep = np.arange(7) != 2
    np.testing.assert_array_equal(out.ids[keep], plain.ids[keep])
    np.testing.assert_allclose(out.logprobs[keep], plain.logprobs[keep], atol=1e-5)

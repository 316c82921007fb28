import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusejax.kernels.topk_unembed import topk_unembed, xla
from fusejax.kernels.topk_unembed.candidates import finish
from hypothesis import given, settings
from hypothesis import strategies as st


def inputs(T=7, D=16, V=300, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(T, D)), dtype)
    table = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    labels = jnp.asarray(rng.integers(-1, V, T), jnp.int32)
    return hidden, table, labels


def dense(hidden, table, labels, k, vocab_size, logit_scale=1.0, logit_cap=None):
    """The same in numpy float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64)[:, :vocab_size] * logit_scale
    if logit_cap:
        logits = logit_cap * np.tanh(logits / logit_cap)
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    ce = np.where(labels >= 0, lse - logits[np.arange(len(labels)), labels], 0)
    return ids, np.take_along_axis(logits, ids, 1) - lse[:, None], lse, ce


@pytest.mark.parametrize(
    ("implementation", "block", "vocab_size"),
    [("reference", None, 300), ("reference", None, 291), ("xla", 64, 300), ("xla", 75, 300), ("xla", 300, 300),
     ("xla", 512, 291), ("xla", 64, 64), ("xla", 8, 20), ("xla", None, 300)],
)  # fmt: skip
def test_equals_a_dense_computation(implementation, block, vocab_size):
    hidden, table, labels = inputs()
    labels = jnp.where(labels < vocab_size, labels, -1)
    out = topk_unembed(hidden, table, labels, k=10, vocab_size=vocab_size, block=block, implementation=implementation)
    ids, logprobs, lse, ce = dense(hidden, table, np.asarray(labels), 10, vocab_size)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(out.log_normalizer, lse, atol=1e-5)
    np.testing.assert_allclose(out.ce, ce, atol=1e-5)


@pytest.mark.parametrize("V", [32000, 50257, 50432, 151936, 262144])
def test_real_vocabularies(V):
    hidden, table, labels = inputs(T=3, D=4, V=V)
    out = topk_unembed(hidden, table, labels, k=10, implementation="xla")
    ids, logprobs, _, ce = dense(hidden, table, np.asarray(labels), 10, V)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(out.ce, ce, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_scale_and_logit_cap(implementation):
    hidden, table, labels = inputs()
    options = {"logit_scale": 0.5, "logit_cap": 3.0, "block": 128, "implementation": implementation}
    out = topk_unembed(hidden, table, labels, k=4, **options)
    ids, logprobs, _, ce = dense(hidden, table, np.asarray(labels), 4, 300, 0.5, 3.0)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(out.ce, ce, atol=1e-5)


@pytest.mark.parametrize("block", [3, 4, 16])
def test_ties_go_to_the_lower_id_across_blocks(block):
    table = jnp.zeros((2, 16)).at[:, 5].set(1.0).at[:, 11].set(1.0)
    out = topk_unembed(jnp.ones((1, 2)), table, k=6, block=block)
    assert out.ids[0].tolist() == [5, 11, 0, 1, 2, 3]


@pytest.mark.parametrize(("T", "V", "k"), [(513, 700, 3), (1024, 1300, 10), (3, 4000, 1), (2, 4001, 32), (5, 64, 64)])
def test_search_by_groups_and_by_some_tokens_at_a_time(T, V, k):
    hidden, table, labels = inputs(T=T, V=V, D=4)
    out = topk_unembed(hidden, table, labels, k=k)
    ids, logprobs, lse, ce = dense(hidden, table, np.asarray(labels), k, V)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(out.log_normalizer, lse, atol=1e-5)
    np.testing.assert_allclose(out.ce, ce, atol=1e-5)
    found = np.take_along_axis(np.asarray(hidden, np.float64) @ np.asarray(table, np.float64), np.asarray(out.ids), 1)
    np.testing.assert_allclose(found - lse[:, None], logprobs, atol=1e-5)  # rounding may change the order of two
    assert (np.asarray(out.ids) == ids).mean() > 0.99


@pytest.mark.parametrize("block", [64, 300, None])
def test_accelerators_search_all_tokens_at_once(block):
    hidden, table, labels = inputs(T=600)
    options = {"k": 10, "vocab_size": 300, "logit_scale": 1.0, "logit_cap": None, "block": block}
    found = [
        finish(xla.topk_unembed(hidden, table, labels, platform=platform, **options), labels)
        for platform in ("tpu", "gpu", "cpu")
    ]
    expected = dense(hidden, table, np.asarray(labels), 10, 300)
    for out in found:
        np.testing.assert_array_equal(out.ids, expected[0])
        np.testing.assert_allclose(out.logprobs, expected[1], atol=1e-5)
        np.testing.assert_allclose(out.ce, expected[3], atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(40, 3000), st.sampled_from([0, 1, 5, 100]))
@settings(max_examples=30, deadline=None)
def test_the_largest_by_groups_are_those_of_top_k(seed, k, size, kinds):
    """With many ties, and −inf among them; kinds 0: all different."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, size)) if not kinds else rng.integers(0, kinds, (3, size))
    x = jnp.asarray(np.where(rng.random((3, size)) < rng.random(), -np.inf, x), jnp.float32)
    for ours, theirs in zip(xla._largest(x, k), jax.lax.top_k(x, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_leading_dimensions_and_no_top_k():
    hidden, table, labels = inputs(T=6)
    flat = topk_unembed(hidden, table, labels, k=3)
    out = topk_unembed(hidden.reshape(2, 3, -1), table, labels.reshape(2, 3), k=3)
    np.testing.assert_array_equal(out.ids, flat.ids.reshape(2, 3, 3))
    alone = topk_unembed(hidden, table, labels, k=0, block=100)
    assert alone.ids.shape == (6, 0)
    np.testing.assert_allclose(alone.ce, flat.ce, atol=1e-5)


def test_bfloat16_hidden_states_are_summed_in_float32():
    hidden, table, labels = inputs(dtype=jnp.bfloat16, D=256)
    out = topk_unembed(hidden, table, labels, k=3, block=128)
    rounded = np.asarray(table.astype(jnp.bfloat16), np.float64)
    ids, logprobs, *_ = dense(np.asarray(hidden, np.float64), rounded, np.asarray(labels), 3, 300)
    np.testing.assert_array_equal(out.ids, ids)
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-4)


def test_a_broken_row_leaves_the_others_alone():
    hidden, table, labels = inputs()
    broken = topk_unembed(hidden.at[2, 0].set(jnp.nan), table, labels, k=3, block=128)
    good = topk_unembed(hidden, table, labels, k=3, block=128)
    assert np.isnan(broken.logprobs[2]).all()
    keep = np.arange(7) != 2
    np.testing.assert_array_equal(broken.logprobs[keep], good.logprobs[keep])


def test_never_holds_the_whole_logits():
    hidden, table, labels = inputs(T=64, D=8, V=4096)
    run = jax.jit(lambda h, t, y: topk_unembed(h, t, y, k=4, block=256))
    text = run.lower(hidden, table, labels).as_text()
    assert "64x256xf32" in text
    assert "64x4096xf32" not in text


def test_more_than_the_vocabulary_is_refused():
    hidden, table, _ = inputs()
    with pytest.raises(ValueError, match="vocab_size"):
        topk_unembed(hidden, table, k=301)


def test_wrong_options_are_one_line():
    hidden, table = jnp.ones((2, 3, 4)), jnp.ones((4, 8))
    for change, message in (
        ({"implementation": "gpu"}, "implementation: 'gpu' should be auto, reference, xla or tpu"),
        ({"block": -1}, "block: -1 should"),
        ({"logit_cap": 0.0}, "logit_cap: 0 should"),
        ({"labels": jnp.zeros((3, 2), jnp.int32)}, r"labels: shape \(3, 2\) should be \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            topk_unembed(hidden, table, k=2, **change)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fusejax.kernels.sample_unembed import sample_unembed
from hypothesis import given, settings
from hypothesis import strategies as st


def example(T, D, V, R, seed=0):
    rng = np.random.default_rng(seed)
    hidden, table = rng.normal(size=(T, D)), 2 * rng.normal(size=(D, V))
    uniforms, labels = rng.random((T, R)), rng.integers(-1, V, T)
    return tuple(jnp.asarray(x, jnp.float32) for x in (hidden, table, uniforms)), jnp.asarray(labels, jnp.int32)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([50, 64, 257]), st.sampled_from([7, 64, 100, 1000]), st.booleans(), st.integers(0, 9))
def test_equals_the_inverse_of_the_distribution_function(V, block, capped, seed):
    (hidden, table, uniforms), labels = example(6, 8, V, 20, seed)
    vocab_size = V - 5
    options = {"vocab_size": vocab_size, "logit_scale": 0.7, "logit_cap": 3.0 if capped else None}
    out = sample_unembed(hidden, table, uniforms, labels, block=block, **options)
    logits = 0.7 * np.asarray(hidden, np.float64) @ np.asarray(table, np.float64)
    logits = (3.0 * np.tanh(logits / 3.0) if capped else logits)[:, :vocab_size]
    probs = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    ends = np.cumsum(probs, -1)
    u = np.asarray(uniforms, np.float64)
    truth = (ends[:, None] <= u[:, :, None]).sum(-1)
    unsure = np.abs(ends[:, None] - u[:, :, None]).min(-1) < 1e-5
    np.testing.assert_array_equal(np.where(unsure, 0, out.ids), np.where(unsure, 0, truth))
    known = np.asarray(labels)
    ce = -np.log(probs[np.arange(6), np.clip(known, 0, vocab_size - 1)])
    inside = (known >= 0) & (known < vocab_size)
    np.testing.assert_allclose(np.asarray(out.ce)[inside], ce[inside], rtol=1e-5, atol=1e-5)
    assert (np.asarray(out.ce)[known < 0] == 0).all()
    plain = sample_unembed(hidden, table, uniforms, labels, implementation="reference", **options)
    np.testing.assert_array_equal(np.where(unsure, 0, out.ids), np.where(unsure, 0, plain.ids))


def test_shares_are_unbiased():
    (hidden, table, _), _ = example(3, 4, 30, 1)
    uniforms = jax.random.uniform(jax.random.key(1), (3, 200_000))
    ids = np.asarray(sample_unembed(hidden, table, uniforms, block=8).ids)
    probs = np.asarray(jax.nn.softmax(hidden @ table))
    shares = np.stack([np.bincount(row, minlength=30) / ids.shape[1] for row in ids])
    np.testing.assert_allclose(shares, probs, atol=5 * np.sqrt(0.25 / ids.shape[1]))


def test_a_number_beside_every_share_takes_another_draw():
    (hidden, table, _), _ = example(2, 4, 30, 1)
    out = sample_unembed(hidden, table, jnp.array([[0.0, 1.5], [0.3, 0.999999]]))
    assert (np.asarray(out.ids) >= 0).all()
    assert out.ids[0, 1] == out.ids[0, 0]


@pytest.mark.parametrize("rounds", [1, 40])
def test_leading_dimensions(rounds):
    (hidden, table, uniforms), labels = example(6, 8, 40, rounds)
    flat = sample_unembed(hidden, table, uniforms, labels)
    shaped = sample_unembed(
        hidden.reshape(2, 3, 8), table, uniforms.reshape(2, 3, rounds), labels.reshape(2, 3), block=16
    )
    np.testing.assert_array_equal(shaped.ids.reshape(6, rounds), flat.ids)
    assert shaped.ce.shape == (2, 3)


def test_wrong_arguments_are_one_line():
    hidden, table, uniforms = jnp.ones((2, 3, 4)), jnp.ones((4, 8)), jnp.zeros((2, 3, 5))
    for change, message in (
        ({"implementation": "tpu"}, "implementation: 'tpu' should be reference or xla"),
        ({"block": 0}, "block: 0 should"),
        ({"vocab_size": 9}, "vocab_size <= V"),
        ({"labels": jnp.zeros((3, 2), jnp.int32)}, r"labels: shape \(3, 2\) should be \(2, 3\)"),
        ({"uniforms": jnp.zeros((3, 2, 5))}, r"uniforms: shape"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_unembed(hidden, table, **({"uniforms": uniforms} | change))

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax import fusion, loss

T, D, V, M = 12, 6, 17, 4
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=15, deadline=None)


def example(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = (rng.normal(size=(T, D)) * scale).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    labels = np.where(rng.random(T) < 0.1, -1, rng.integers(0, V, T)).astype(np.int32)
    ids = np.stack([rng.permutation(V)[:M] for _ in range(T)]).astype(np.int32)
    probs = rng.dirichlet(np.full(M + 1, 0.5), T)[:, :M].astype(np.float32)
    return hidden, unembedding, labels, ids, probs, rng.random(T).astype(np.float32)


def _value_and_grad(hidden, unembedding, labels, ids, probs, mask, weight_clm, **options):
    def total(hidden, unembedding):
        sums = loss.fusion_loss(
            hidden, unembedding, labels, ids, probs, mask, weight_clm=weight_clm, block=5, **options
        )
        return sums.total, sums

    (_, sums), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, unembedding)
    return sums, gradients


value_and_grad = jax.jit(_value_and_grad, static_argnames=("kind", "tail", "temperature", "model_entropy"))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 2e-5, "atol": 2e-5} | tolerance)), a, b)


@few
@given(seeds, st.sampled_from(["tail", "renormalize"]))
def test_one_hot_targets_are_the_clm_loss(seed, tail):
    hidden, unembedding, labels, ids, probs, mask = example(seed)
    ids[:] = -1
    ids[:, 1] = labels
    probs[:] = ids >= 0
    fused = value_and_grad(hidden, unembedding, labels, ids, probs, mask, 0.25, tail=tail)
    plain = value_and_grad(hidden, unembedding, labels, ids, probs, mask, 1.0, tail=tail)
    close(fused[0].fusion, fused[0].clm)
    close(fused[0].total, plain[0].total)
    close(fused[1], plain[1])


def test_clm_loss_is_the_dense_cross_entropy():
    hidden, unembedding, labels, *_, mask = example(0)
    weights = np.where(labels >= 0, mask, 0)

    def dense(hidden, unembedding):
        log_p = jax.nn.log_softmax(hidden @ unembedding)
        return -jnp.sum(weights * log_p[jnp.arange(T), labels])

    got = jax.jit(jax.value_and_grad(lambda h, w: loss.clm_loss(h, w, labels, mask, block=5).total, (0, 1)))(
        hidden, unembedding
    )
    close(got, jax.value_and_grad(dense, (0, 1))(hidden, unembedding))


@few
@given(seeds)
def test_splitting_a_batch_and_padding_it_change_nothing(seed):
    hidden, unembedding, *rows = example(seed)
    whole = value_and_grad(hidden, unembedding, *rows, 0.4)
    halves = []
    for keep in (np.arange(T) < 7, np.arange(T) >= 7):  # the other half is padding
        labels, ids, probs, mask = rows
        padded = (np.where(keep, labels, -1), ids, np.where(keep[:, None], probs, np.nan), mask)
        halves.append(value_and_grad(np.where(keep[:, None], hidden, 3.0), unembedding, *padded, 0.4))
    added = jax.tree.map(jnp.add, *halves)
    close(added[0], whole[0])
    close(added[1], whole[1])


@few
@given(seeds)
def test_order_and_repeats_of_a_row_do_not_matter(seed):
    hidden, unembedding, labels, ids, probs, mask = example(seed)
    plain = value_and_grad(hidden, unembedding, labels, ids, probs, mask, 0.4, kind="kl")
    ids = np.concatenate([ids[:, ::-1], ids, np.full((T, 1), -1, np.int32)], 1)
    probs = np.concatenate([probs[:, ::-1] * 0.25, probs * 0.75, np.ones((T, 1), np.float32)], 1)
    close(value_and_grad(hidden, unembedding, labels, ids, probs, mask, 0.4, kind="kl"), plain)


def dense_kl(hidden, unembedding, full_TV):
    z = np.float64(hidden) @ np.float64(unembedding)
    log_p = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    return np.sum(full_TV * (np.log(full_TV) - log_p), -1)


@few
@given(seeds, st.floats(0.1, 20.0))
def test_tail_divergence_is_between_zero_and_the_full_one(seed, scale):
    hidden, unembedding, labels, *_ = example(seed, scale)
    full_TV = np.random.default_rng(seed).dirichlet(np.full(V, 0.3), T) + 1e-12
    full_TV /= full_TV.sum(-1, keepdims=True)
    ids = np.argsort(-full_TV)[:, :M].astype(np.int32)
    probs = np.take_along_axis(full_TV, ids, -1).astype(np.float32)
    for t in range(T):
        one = np.float32(np.arange(T) == t)
        sums, _ = value_and_grad(hidden, unembedding, np.abs(labels), ids, probs, one, 0.0, kind="kl")
        full = dense_kl(hidden, unembedding, full_TV)[t]
        assert 0 <= sums.fusion <= full * (1 + 1e-5) + 1e-5


@few
@given(seeds, st.sampled_from([("ce", 1.0), ("kl", 2.0)]))
def test_no_gradient_at_the_targets_own_distribution(seed, variant):
    kind, temperature = variant
    hidden, unembedding, labels, ids, _, mask = example(seed)
    own = jax.nn.softmax(hidden @ unembedding)
    probs = np.take_along_axis(np.asarray(own), ids, -1)
    options = {"kind": kind, "temperature": temperature, "tail": "tail"}
    sums, gradients = value_and_grad(hidden, unembedding, np.abs(labels), ids, probs, mask, 0.0, **options)
    close(gradients, jax.tree.map(np.zeros_like, gradients), atol=3e-6)
    if kind == "kl":
        assert 0 <= sums.fusion < 1e-5


def test_mass_outside_the_support_is_punished_under_tail_only():
    # 99.9% of the model's mass on tokens that the target does not have; the rest in the target's own proportions.
    z = np.log(np.array([[0.0007, 0.0003, *[0.999 / (V - 2)] * (V - 2)]], np.float32))
    rows = (np.eye(V, dtype=np.float32), np.array([0]), np.array([[0, 1]]), np.array([[0.7, 0.3]], np.float32))
    sums, (gradient, _) = value_and_grad(z, *rows, np.ones(1), 0.0, kind="kl")
    assert sums.fusion > 6.5
    np.testing.assert_allclose(gradient[0, :2], [0.0007 - 0.7, 0.0003 - 0.3], rtol=1e-3)
    np.testing.assert_allclose(gradient[0, 2:].sum(), 0.999, rtol=1e-3)


@pytest.mark.parametrize("residual", [0.0, 1e-7, 1e-12, -1e-6])
@pytest.mark.parametrize("gap", [0.0, 17.0, 200.0])
def test_tiny_tails_on_both_sides(residual, gap):
    """Target residual `residual` (below 0: rounding made the row too heavy), model residual about V·exp(−gap)."""
    z = np.zeros((1, V), np.float32)
    z[0, :2] = gap
    q = np.array([[0.5, 0.5 - residual]], np.float32)
    rows = (np.eye(V, dtype=np.float32), np.array([0]), np.array([[0, 1]]), q, np.ones(1))
    sums, (gradient, _) = value_and_grad(z, *rows, 0.0, kind="kl")
    support, rest = np.float64(q[0]), max(1 - np.float64(q[0]).sum(), 0.0)
    log_p = np.append(z[0, :2], np.log(V - 2.0)) - np.logaddexp(gap + np.log(2.0), np.log(V - 2.0))
    t = np.append(support, rest)
    want = np.sum(t[t > 0] * (np.log(t[t > 0]) - log_p[t > 0]))
    np.testing.assert_allclose(sums.fusion, max(want, 0), rtol=1e-5, atol=3e-7)
    on_events = t.sum() * np.exp(log_p) - t
    np.testing.assert_allclose(gradient[0, :2], on_events[:2], atol=1e-6)
    np.testing.assert_allclose(gradient[0, 2:], on_events[2] / (V - 2), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("tail", ["tail", "renormalize"])
def test_all_masked_is_exactly_zero(tail):
    hidden, unembedding, labels, ids, probs, mask = example(1)
    hidden[0], hidden[1] = np.nan, np.inf
    for rows in ((np.full_like(labels, -1), ids, probs, mask), (labels, ids, probs, mask * 0)):
        result = value_and_grad(hidden, unembedding, *rows, 0.4, tail=tail)
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("tail", ["tail", "renormalize"])
def test_empty_targets_and_bad_probabilities_count_for_nothing(tail):
    hidden, unembedding, labels, ids, probs, mask = example(2)
    plain = value_and_grad(hidden, unembedding, labels, ids * 0 - 1, probs, mask, 0.5, tail=tail)
    close(plain[0].fusion, 0.0)
    close(plain[1], jax.tree.map(lambda g: 0.5 * g, value_and_grad(*example(2), 1.0)[1]))
    bad = np.where(np.arange(M) == 2, np.float32(np.nan), probs)
    dropped = np.where(np.arange(M) == 2, np.float32(0), probs)
    close(
        value_and_grad(hidden, unembedding, labels, ids, bad, mask, 0.5, tail=tail),
        value_and_grad(hidden, unembedding, labels, ids, dropped, mask, 0.5, tail=tail),
    )


def test_entropies_and_counts():
    hidden, unembedding, labels, ids, probs, mask = example(3)
    sums, _ = value_and_grad(hidden, unembedding, labels, ids, probs, mask, 0.5, model_entropy=True)
    weights = np.where(labels >= 0, mask, 0)
    p = np.float64(jax.nn.softmax(hidden @ unembedding))
    t = np.concatenate([np.float64(probs), 1 - np.float64(probs).sum(-1, keepdims=True)], -1)
    close(sums.model_entropy, np.sum(weights * -np.sum(p * np.log(p), -1)))
    close(sums.target_entropy, np.sum(weights * -np.sum(t * np.log(t), -1)))
    close(sums.count, weights.sum())


def test_fusion_mask_weighs_the_fusion_term_alone():
    hidden, unembedding, labels, ids, probs, mask = example(4)
    options = {"weight_clm": 0.5, "block": 5}
    alone = loss.fusion_loss(hidden, unembedding, labels, ids, probs, mask * 0, fusion_mask=jnp.ones(T), **options)
    usual = loss.fusion_loss(hidden, unembedding, np.abs(labels), ids, probs, **options)
    close(alone.fusion, usual.fusion)
    close(alone.total, 0.5 * usual.fusion)
    assert alone.count == 0


def test_leading_dimensions_and_gradient_modes_agree():
    hidden, unembedding, *rows = example(5)
    shaped = [hidden.reshape(3, 4, D), *(r.reshape(3, 4, *r.shape[1:]) for r in rows)]
    results = []
    for gradients in ("forward", "recompute"):

        def total(h, w, mode=gradients):
            return 2.0 * loss.fusion_loss(h, w, *shaped[1:], weight_clm=0.4, block=5, gradients=mode).total

        results.append(jax.jit(jax.value_and_grad(total, (0, 1)))(shaped[0], unembedding))
    close(results[0], results[1], rtol=1e-6, atol=1e-6)
    sums, (grad_hidden, grad_unembedding) = value_and_grad(hidden, unembedding, *rows, 0.4)
    close(results[0][0], 2 * sums.total)
    close(results[0][1], (2 * grad_hidden.reshape(3, 4, D), 2 * grad_unembedding))


def test_clm_weight_schedule():
    assert loss.clm_weight(7, 10, 0.9) == np.float32(0.9)
    close(loss.clm_weight(jnp.int32(5), 10, 0.5, "linear"), 0.75)
    close(loss.clm_weight(10, 10, 0.5, "linear"), 1.0)
    with pytest.raises(ValueError, match="constant or linear"):
        loss.clm_weight(0, 1, 0.5, "cosine")


def test_no_buffer_of_tokens_times_vocabulary():
    tokens, vocab = 256, 4096
    hidden, unembedding = jnp.zeros((tokens, 8)), jnp.zeros((8, vocab))
    labels, ids, probs = jnp.zeros(tokens, jnp.int32), jnp.zeros((tokens, 10), jnp.int32), jnp.zeros((tokens, 10))

    def total(h, w):
        return loss.fusion_loss(h, w, labels, ids, probs, weight_clm=0.9, block=32).total

    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(hidden, unembedding).compile()
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    ]
    assert 32 * vocab <= max(sizes) < tokens * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4


@few
@given(seeds, st.sampled_from(["tail", "renormalize"]), st.sampled_from(["ce", "kl"]))
def test_temperature_one_is_the_limit_of_temperatures(seed, tail, kind):
    arrays = (*example(seed), 0.3)
    none = value_and_grad(*arrays, tail=tail, kind=kind)
    nearly = value_and_grad(*arrays, tail=tail, kind=kind, temperature=1 + 1e-6)
    # Under `tail` tempering scales a target of events to sum 1, which it is anyway.
    close(nearly, none, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_sources", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("fallback", ["gold", "skip"])
def test_without_any_aligned_row_fusion_is_clm(n_sources, fallback):
    hidden, unembedding, labels, _, _, mask = example(n_sources)
    tables = [fusion.TokenTable(jnp.zeros((5, 1), jnp.int32), jnp.zeros((5, 1), jnp.uint32))] * n_sources
    shape = (T, n_sources)
    fused = fusion.fuse_sources(
        tables, jnp.zeros((*shape, M), jnp.int32), jnp.zeros((*shape, M)), jnp.zeros(shape, bool), labels,
        source_ce=jnp.full(shape, jnp.inf), fallback=fallback,
    )  # fmt: skip
    assert np.all(fused.fallback)
    sums, gradients = value_and_grad(hidden, unembedding, labels, fused.ids, fused.probs, mask, 0.25)
    plain, plain_gradients = value_and_grad(hidden, unembedding, labels, fused.ids, fused.probs, mask, 1.0)
    close((sums.fusion, sums.total, gradients), (plain.clm, plain.total, plain_gradients))
    close(sums.target_entropy, 0.0)


def test_entropy_of_the_model_changes_neither_loss_nor_gradient():
    arrays = (*example(5), 0.3)
    with_it, without = (value_and_grad(*arrays, model_entropy=asked) for asked in (True, False))
    close(with_it[1], without[1], atol=1e-6)
    close(with_it[0].total, without[0].total)
    assert without[0].model_entropy == 0
    assert 0 < with_it[0].model_entropy < with_it[0].count * np.log(V)


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "foo"}, "kind: 'foo' should be ce or kl"),
    ({"tail": "foo"}, "tail: 'foo' should be tail or renormalize"),
    ({"gradients": "foo"}, "gradients: 'foo' should be forward or recompute"),
    ({"implementation": "foo"}, "implementation: 'foo' should be auto, xla, tpu or gpu"),
    ({"block": 0}, "block: 0 should be a finite number, at least 1"),
    ({"block": -1}, "block: -1 should"),
    ({"logit_cap": 0.0}, "logit_cap: 0 should be a finite number, greater than 0"),
    ({"temperature": 0.0}, "temperature: 0 should be a finite number, greater than 0"),
    ({"temperature": -1}, "temperature: -1 should"),
    ({"z_loss": np.nan}, "z_loss: nan should be a finite number, at least 0"),
    ({"weight_clm": 2.0}, "weight_clm: 2 should be a finite number, at least 0, at most 1"),
])  # fmt: skip
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        loss.fusion_loss(*example(0), **({"weight_clm": 0.5} | options))


@pytest.mark.parametrize("at", range(6))
def test_arrays_of_different_tokens_are_refused(at):
    arrays = list(example(0))
    arrays[at] = arrays[at].T if arrays[at].ndim > 1 else arrays[at].reshape(2, -1)
    with pytest.raises(ValueError, match=r"^\w+: shape \(.*\) should be \(.*\), "):
        loss.fusion_loss(*arrays, weight_clm=0.5)
    hidden, unembedding = np.zeros((2, 3, D), np.float32), np.zeros((D, V), np.float32)
    with pytest.raises(ValueError, match=r"^labels: shape \(3, 2\) should be \(2, 3\), the leading dimensions"):
        loss.clm_loss(hidden, unembedding, np.zeros((3, 2), np.int32))


def test_support_without_a_tail_token_leaves_missing_mass_out():
    hidden, unembedding, *_ = example(0)
    ids = np.tile(np.arange(V, dtype=np.int32), (T, 1))
    probs = np.full((T, V), 0.5 / V, np.float32)
    labels = np.zeros(T, np.int32)
    sums = loss.fusion_loss(hidden, unembedding, labels, ids, probs, weight_clm=0.0)
    log_p = jax.nn.log_softmax(hidden @ unembedding)
    np.testing.assert_allclose(sums.fusion, -np.sum(probs * log_p), rtol=1e-5)

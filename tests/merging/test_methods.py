"""Every method against its published definition, written out in float64 numpy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.merging import methods

SHAPES = [(7,), (5, 6), (3, 4, 5)]


def tensors(shape, n=3, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    models = base + 0.1 * rng.standard_normal((n, *shape))
    # Exactly what float32 holds, so that both sides start from the same numbers.
    return base.astype(np.float32), models.astype(np.float32)


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=2e-6, atol=2e-7)


def trim(delta, density):
    flat = delta.ravel()
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    kept = np.zeros_like(flat)
    for i in order[: int(density * flat.size)]:
        kept[i] = flat[i]
    return kept.reshape(delta.shape)


def elect(weighted, weights, deltas, normalize):
    """TIES, element by element."""
    result = np.zeros(weighted.shape[1:])
    for at in np.ndindex(*result.shape):
        column = weighted[(slice(None), *at)]
        sign = 1 if column.sum() >= 0 else -1
        agrees = np.sign(column) == sign
        total = weights[agrees].sum() if normalize else 1.0
        result[at] = column[agrees].sum() / (total or 1.0)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(shape, normalize):
    _, models = tensors(shape)
    weights = np.array([0.5, 2.0, 1.0], np.float32)
    wanted = np.tensordot(weights.astype(np.float64), models.astype(np.float64), 1)
    close(methods.linear(models, weights, normalize), wanted / 3.5 if normalize else wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(shape, t):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, *shape)).astype(np.float32)
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    wanted = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    close(methods.slerp(a, b, t), wanted.reshape(shape))


def test_slerp_of_quarter_turn_keeps_the_norm():
    a, b = np.array([2.0, 0.0], np.float32), np.array([0.0, 2.0], np.float32)
    close(methods.slerp(a, b, 0.5), [2**0.5, 2**0.5])


@pytest.mark.parametrize("end", [[3.0, 6.0], [-1.0, -2.0], [0.0, 0.0]])
def test_slerp_of_collinear_tensors_is_a_line(end):
    a, b = np.array([1.0, 2.0], np.float32), np.array(end, np.float32)
    close(methods.slerp(a, b, 0.25), 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(normalize):
    base, models = tensors((5, 6))
    weights = np.array([0.5, -0.25, 1.0], np.float32)
    change = np.tensordot(weights.astype(np.float64), models.astype(np.float64) - base, 1)
    wanted = base + 0.7 * (change / 1.25 if normalize else change)
    close(methods.task_arithmetic(base, models, weights, 0.7, normalize), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(shape, normalize):
    base, models = tensors(shape)
    weights, density = np.array([0.5, 2.0, 1.0], np.float32), [0.4, 1.0, 0.7]
    deltas = np.stack([trim(m.astype(np.float64) - base, d) for m, d in zip(models, density, strict=True)])
    column = weights.astype(np.float64).reshape(-1, *[1] * len(shape))
    wanted = base + 0.9 * elect(deltas * column, weights.astype(np.float64), deltas, normalize)
    close(methods.ties(base, models, weights, density, 0.9, normalize), wanted)


def test_ties_by_hand():
    """Yadav et al., figure 1's steps: trim to the largest, elect by summed magnitude, average those that agree."""
    base = np.zeros(4, np.float32)
    models = np.array([[3.0, -1.0, 0.5, 2.0], [1.0, 2.0, -0.5, 4.0]], np.float32)
    merged = methods.ties(base, models, np.ones(2, np.float32), [0.5, 0.5])
    # Kept: [3, 0, 0, 2] and [0, 2, 0, 4].
    close(merged, [3.0, 2.0, 0.0, 3.0])


def test_of_equal_magnitudes_the_first_stay():
    kept = methods.keep_largest(np.array([1.0, -1.0, 1.0, -1.0], np.float32), 0.5)
    assert np.asarray(kept).tolist() == [1.0, -1.0, 0.0, 0.0]


@given(st.integers(0, 40), st.integers(1, 60), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_exactly_so_many_are_kept(percent, size, seed):
    values = np.random.default_rng(seed).integers(1, 4, size).astype(np.float32)
    kept = np.asarray(methods.keep_largest(values, percent / 40))
    assert (kept != 0).sum() == int(percent / 40 * size)
    assert not (kept == 0).any() or not (kept != 0).any() or values[kept == 0].max() <= kept[kept != 0].min()


@pytest.mark.parametrize("elect_sign", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_dare(elect_sign, rescale):
    base, models = tensors((40, 50))
    weights, density, key = np.array([0.5, 2.0, 1.0], np.float32), [0.3, 1.0, 0.6], jax.random.key(4)
    found = methods.dare(base, models, weights, density, key, 0.9, False, rescale, elect_sign)
    deltas = []
    for i, (model, part) in enumerate(zip(models, density, strict=True)):
        stays = np.asarray(jax.random.bernoulli(jax.random.fold_in(key, i), part, base.shape))
        assert stays.mean() == pytest.approx(part, abs=0.05)
        deltas.append(np.where(stays, (model.astype(np.float64) - base) / (part if rescale else 1), 0))
    deltas, column = np.stack(deltas), weights.astype(np.float64)[:, None, None]
    change = elect(deltas * column, weights, deltas, False) if elect_sign else (deltas * column).sum(0)
    np.testing.assert_allclose(np.asarray(found), base + 0.9 * change, rtol=1e-5, atol=1e-6)


def test_dare_keeps_the_expectation():
    base = np.zeros(200_000, np.float32)
    models = np.full((1, base.size), 2.0, np.float32)
    merged = methods.dare(base, models, np.ones(1, np.float32), [0.2], jax.random.key(0))
    assert sorted(set(np.asarray(merged).tolist())) == [0.0, 10.0]
    assert float(merged.mean()) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("select", ["mask", "weigh"])
@pytest.mark.parametrize("top", [1.0, 0.4])
@pytest.mark.parametrize("normalize", [True, False])
def test_sce(select, top, normalize):
    base, models = tensors((5, 6))
    models[:, 0] = base[0]  # positions where nothing varies are not counted
    deltas = models.astype(np.float64) - base
    variance = deltas.var(0)
    order = sorted(np.ndindex(*variance.shape), key=lambda at: -variance[at])
    chosen = np.zeros(variance.shape, bool)
    for at in order[: int(top * (variance > 0).sum())]:
        chosen[at] = True
    selected = deltas * chosen if top < 1 else deltas
    weights = np.array([(d**2).sum() for d in selected])
    weights /= weights.sum()
    used = selected if select == "mask" else deltas
    change = np.zeros(base.shape)
    for at in np.ndindex(*base.shape):
        column = used[(slice(None), *at)]
        agrees = np.sign(column) == (1 if column.sum() >= 0 else -1)
        total = weights[agrees].sum() if normalize else 1.0
        change[at] = (weights[agrees] * column[agrees]).sum() / (total or 1.0)
    close(methods.sce(base, models, top, select, 0.9, normalize), base + 0.9 * change)


def test_sce_by_hand():
    base = np.zeros(3, np.float32)
    models = np.array([[2.0, 1.0, 1.0], [-1.0, 1.0, 1.5]], np.float32)
    # Variances 2.25, 0, 0.0625: of the two that vary, half is the first; weights 4 : 1.
    close(methods.sce(base, models, 0.5, "mask"), [2.0, 0.0, 0.0])
    close(methods.sce(base, models, 0.5, "weigh"), [2.0, 1.0, 0.8 * 1.0 + 0.2 * 1.5])


@pytest.mark.parametrize("call", [
    lambda b, m, w: methods.ties(b, m, w, [0.5] * 3),
    lambda b, m, w: methods.task_arithmetic(b, m, w),
    lambda b, m, w: methods.sce(b, m, 0.5),
    lambda b, m, w: methods.dare(b, m, w, [0.5] * 3, jax.random.key(0)),
])  # fmt: skip
def test_models_equal_to_the_base_change_nothing(call):
    base, _ = tensors((5, 6))
    close(call(base, np.stack([base] * 3), np.ones(3, np.float32)), base)


@given(st.permutations(range(3)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_order_of_models_does_not_matter(order, seed):
    base, models = tensors((4, 5), seed=seed)
    weights, order = np.array([0.5, 2.0, 1.0], np.float32), list(order)
    for call in (
        lambda m, w: methods.linear(m, w),
        lambda m, w: methods.ties(base, m, w, [0.5] * 3),
        lambda m, w: methods.sce(base, m, 0.5),
    ):
        close(call(models[order], weights[order]), np.asarray(call(models, weights)))

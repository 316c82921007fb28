import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusejax import optimizer
from fusejax.config import OptimizerConfig


def test_cosine_with_warmup():
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.1, end_ratio=0.1)
    schedule = optimizer.make_schedule(config, 100)
    rates = np.array([schedule(step) for step in range(101)])
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-5)
    np.testing.assert_allclose(rates[10], 2.0, rtol=1e-6)
    np.testing.assert_allclose(rates[55], 0.2 + 1.8 / 2, rtol=1e-6)
    np.testing.assert_allclose(rates[100], 0.2, rtol=1e-6)


@pytest.mark.parametrize(("kind", "middle", "end"), [("linear", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_other_schedules(kind, middle, end):
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, schedule=kind)
    schedule = optimizer.make_schedule(config, 10)
    assert (float(schedule(0)), float(schedule(5)), float(schedule(10))) == (1.0, middle, end)


def test_one_step_runs_have_a_rate():
    assert float(optimizer.make_schedule(OptimizerConfig(warmup_ratio=0.5), 1)(0)) > 0


def test_adamw_by_hand():
    """Two steps against the formula: clipped gradient, bias-corrected moments, decoupled decay on matrices alone."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_ratio=0, weight_decay=0.5, grad_clip=1.0, beta1=0.8, beta2=0.9
    )
    params = {"m": {"kernel": jnp.array([[1.0, -2.0]])}, "v": {"bias": jnp.array([3.0])}}
    transform, _ = optimizer.make(config, 10)
    state = transform.init(params)
    p = np.array([1.0, -2.0, 3.0])
    first, second = np.zeros(3), np.zeros(3)
    for t, gradient in enumerate([[3.0, 0.0, 4.0], [0.1, 0.2, 0.3]], start=1):
        g = np.array(gradient)
        updates, state = transform.update(
            {"m": {"kernel": jnp.array([g[:2]])}, "v": {"bias": jnp.array(g[2:])}}, state, params
        )
        params = optax.apply_updates(params, updates)
        g = g / max(1.0, np.linalg.norm(g))
        first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g * g
        move = (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.9**t)) + 1e-8)
        p = p - 0.1 * (move + 0.5 * p * np.array([1, 1, 0]))
    np.testing.assert_allclose(np.concatenate([params["m"]["kernel"][0], params["v"]["bias"]]), p, rtol=1e-5)


def test_wsd_is_flat_then_falls_to_the_end():
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1, schedule="wsd", decay_ratio=0.2, end_ratio=0.5)
    schedule = optimizer.make_schedule(config, 100)
    rates = np.array([float(schedule(step)) for step in range(101)])
    np.testing.assert_allclose(rates[9:81], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rates[[85, 90, 100]], [0.875, 0.75, 0.5], rtol=1e-6)


def one_update(config, p, g):
    params = {"m": {"kernel": jnp.array([p])}, "v": {"bias": jnp.array(p)}}
    transform, _ = optimizer.make(config, 10)
    updates, _ = transform.update(
        {"m": {"kernel": jnp.array([g])}, "v": {"bias": jnp.array(g)}}, transform.init(params), params
    )
    return np.array(updates["m"]["kernel"][0]), np.array(updates["v"]["bias"])


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_lion_by_hand(decay):
    config = OptimizerConfig(
        kind="lion", learning_rate=0.1, schedule="constant", warmup_ratio=0, weight_decay=0.5, grad_clip=9, decay=decay
    )
    p, g = np.array([1.0, -2.0, 4.0]), np.array([0.5, 0.1, -0.3])
    matrix, bias = one_update(config, p, g)
    np.testing.assert_allclose(matrix, -0.1 * (np.sign(g) + 0.5 * p), rtol=1e-6)
    np.testing.assert_allclose(bias, -0.1 * (np.sign(g) + (0.5 * p if decay == "all" else 0)), rtol=1e-6)


def test_adafactor_by_hand():
    """The first step: gradient over its own size, clipped to RMS 1, times the parameters' RMS; decay on matrices."""
    config = OptimizerConfig(
        kind="adafactor", learning_rate=0.1, schedule="constant", warmup_ratio=0, weight_decay=0.5, grad_clip=9
    )
    p, g = np.array([1.0, -2.0, 4.0]), np.array([0.5, 0.1, -0.3])
    matrix, bias = one_update(config, p, g)
    size = np.sqrt(np.mean(p**2))
    np.testing.assert_allclose(matrix, -0.1 * (np.sign(g) * size + 0.5 * p), rtol=1e-5)
    np.testing.assert_allclose(bias, -0.1 * np.sign(g) * size, rtol=1e-5)


def test_global_norm():
    assert float(optimizer.global_norm({"a": jnp.array([3.0]), "b": jax.numpy.array([4.0])})) == 5.0

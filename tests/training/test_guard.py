import jax.numpy as jnp
import numpy as np

from fusejax.config import GuardConfig
from fusejax.training import guard


def passes(config, losses, norms=None):
    state, fine = guard.init(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        ok, state = guard.check(config, state, jnp.float32(loss), jnp.float32(norm))
        fine.append(bool(ok))
    return fine, {key: float(value) for key, value in state.items()}


def test_what_is_no_number_is_skipped_and_counted():
    fine, state = passes(GuardConfig(), [2.0, np.nan, 2.0, np.inf, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, np.nan, np.inf])
    assert fine == [True, False, True, False, False, False]
    assert (state["skipped"], state["in_a_row"], state["seen"]) == (4, 3, 2)
    assert state["mean"] == 2.0


def test_a_spike_is_skipped_once_noise_is_known():
    noise = np.random.default_rng(0).normal(3.0, 0.1, 200).tolist()
    fine, state = passes(GuardConfig(spike=6), [*noise, 4.0, 3.1, 9.0])
    assert fine == [True] * 200 + [False, True, False]
    assert abs(state["mean"] - 3.0) < 0.05
    assert abs(np.sqrt(state["variance"]) - 0.1) < 0.05
    assert passes(GuardConfig(spike=6), [*noise[:10], 9.0])[0][-1]  # too early to tell
    assert all(passes(GuardConfig(), [*noise, 9.0])[0])  # not asked for


def test_variance_is_that_of_the_first_values():
    values = [1.0, 4.0, 2.0, 7.0]
    state = passes(GuardConfig(), values)[1]
    np.testing.assert_allclose([state["mean"], state["variance"]], [np.mean(values), np.var(values)], rtol=1e-6)

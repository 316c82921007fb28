"""JAX brings all processes to the number after the largest that one gave: numbers rise, and come from one place."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from fusejax import sharding
from fusejax.checkpoint import Checkpoints
from fusejax.config import CheckpointConfig
from fusejax.training import preemption


@pytest.fixture
def asked(monkeypatch):
    """The numbers that JAX is asked with."""
    numbers = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: bool(numbers.append(number)))
    return numbers


def test_numbers_rise_over_the_runs_of_a_process(asked, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for _ in range(2):
        with preemption.Notice() as notice:
            assert not notice.came()
            assert not notice.came()
    assert asked == list(range(asked[0], asked[0] + 4))


def test_a_save_does_not_ask(asked, tmp_path):
    state = {"w": jax.device_put(jnp.ones(3), sharding.replicated(sharding.make_mesh()))}
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        checkpoints.save(57, state, {})
        assert checkpoints.latest() == 57
    assert asked == []

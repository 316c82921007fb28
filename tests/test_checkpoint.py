import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import sharding
from fusejax.checkpoint import Checkpoints
from fusejax.config import CheckpointConfig
from fusejax.errors import UserError


def state(value):
    whole = sharding.replicated(sharding.make_mesh())
    tree = {"params": {"w": jnp.full((3, 2), value)}, "step": jnp.int32(value)}
    return jax.device_put(tree, whole)


def test_saves_restores_and_keeps_n(tmp_path):
    config = CheckpointConfig(keep=2)
    with Checkpoints(tmp_path / "c", config) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"n": step})
        checkpoints.save(3, state(9), {})  # the same step again changes nothing
    with Checkpoints(tmp_path / "c", config) as checkpoints:
        step, restored = checkpoints.restore(state(0))
    assert step == 3
    np.testing.assert_array_equal(restored["params"]["w"], np.full((3, 2), 3.0))
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["2", "3"]


def test_what_is_beside_it_and_the_best(tmp_path):
    config = CheckpointConfig(keep=1, keep_best=1)
    with Checkpoints(tmp_path / "c", config) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
            checkpoints.save(step, state(step), {"n": step}, loss)
        checkpoints.wait()
        assert checkpoints.about() == {"n": 4}
        assert checkpoints.restore(state(0))[0] == 4
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["2", "4"]


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state(1), {})
    (tmp_path / "c" / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        assert checkpoints.latest() == 1


def test_nothing_to_restore_and_damaged_ones_are_user_errors(tmp_path):
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoints.restore(state(0))
        checkpoints.save(1, state(1), {})
    other = {"params": {"w": state(0)["params"]["w"], "new": state(0)["step"]}, "step": state(0)["step"]}
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints, pytest.raises(UserError, match="cannot be"):
        checkpoints.restore(other)


def test_full_disk_is_a_user_error_and_keeps_what_is_there(tmp_path, monkeypatch):
    from fusejax import outputs

    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state(1), {})
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match="disk is full"):
            checkpoints.save(2, state(2), {})
        assert checkpoints.restore(state(0))[0] == 1

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fusejax import sharding
from fusejax.config import MeshConfig
from fusejax.errors import UserError


def test_too_many_devices_asked_for():
    with pytest.raises(UserError, match=r"1 x 2 x 64 needs 128 devices"):
        sharding.make_mesh(MeshConfig(fsdp=2, tensor=64))


def test_rules_on_an_abstract_mesh():
    mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)
    assert sharding.named(mesh, ("layers", "embed", "mlp"), (3, 8, 8)).spec == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.named(mesh, ("vocab", "embed"), (7, 8)).spec == PartitionSpec(None, "fsdp")
    assert sharding.named(mesh, ("heads", "kv_heads"), (4, 4)).spec == PartitionSpec("tensor", None)


def test_put_batch():
    mesh = sharding.make_mesh()
    batch = sharding.put_batch({"ids": np.arange(6).reshape(2, 3)}, mesh)
    np.testing.assert_array_equal(batch["ids"], np.arange(6).reshape(2, 3))
    assert batch["ids"].sharding.spec == PartitionSpec(("data", "fsdp"))

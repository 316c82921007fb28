"""The mesh of a job: given, automatic, and over several slices or hosts."""

import itertools
import socket
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from environment import on_cpus

from fusejax import config, models, sharding, training
from fusejax.config import MeshConfig
from fusejax.errors import UserError

AUTO = MeshConfig.model_validate("auto")
LLAMA = models.DecoderConfig(
    vocab_size=32000, d_model=4096, n_layers=2, n_heads=32, n_kv_heads=32, head_dim=128, d_mlp=8, max_length=64
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What mesh_utils asks of a device."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def coords(self):
        """In a slice of 2 x 2 chips."""
        return [self.id % 2, self.id // 2 % 2, 0]


def machine(n, per_process=None, per_slice=None, platform="tpu"):
    return [Device(i, i // (per_process or n), i // (per_slice or n), platform) for i in range(n)]


def sizes(mesh):
    return (mesh.data, mesh.fsdp, mesh.tensor)


@pytest.mark.parametrize(
    ("devices", "given", "rows", "model", "chosen"),
    [
        (machine(8), AUTO, None, None, (1, 8, 1)),
        (machine(1), AUTO, 128, LLAMA, (1, 1, 1)),
        (machine(8), MeshConfig(fsdp=-1, tensor=2), 128, LLAMA, (1, 4, 2)),
        (machine(8), MeshConfig(data=-1, fsdp=2), 128, LLAMA, (4, 2, 1)),
        (machine(8), MeshConfig(data=1, fsdp=2), 128, LLAMA, (1, 2, 1)),
        # Two slices, two hosts of GPUs, and GPUs with a process each.
        (machine(32, per_process=4, per_slice=16), AUTO, 128, LLAMA, (2, 16, 1)),
        (machine(16, per_process=8, platform="gpu"), AUTO, 128, LLAMA, (2, 8, 1)),
        (machine(16, per_process=1, per_slice=8, platform="gpu"), AUTO, 128, LLAMA, (2, 8, 1)),
        (machine(8, per_process=1, platform="gpu"), AUTO, 128, LLAMA, (1, 8, 1)),
        # Hosts of one slice are not apart.
        (machine(16, per_process=4), AUTO, 128, LLAMA, (1, 16, 1)),
        # `tensor` where the batch has too few sequences, and `data` where fsdp does not divide the width.
        (machine(64), AUTO, 16, LLAMA, (1, 16, 4)),
        (machine(6), AUTO, 6, LLAMA, (3, 2, 1)),
    ],
)  # fmt: skip
def test_axes_that_are_chosen(devices, given, rows, model, chosen):
    assert sizes(sharding.resolve(given, devices, rows, model)) == chosen


def test_what_cannot_be_chosen_is_one_line():
    with pytest.raises(UserError, match=r"mesh: data x tensor = 1 x 3 does not divide the 8 devices"):
        sharding.resolve(MeshConfig(fsdp=-1, tensor=3), machine(8))
    with pytest.raises(UserError, match=r"take all 8 devices and let data x fsdp divide the 6 sequences"):
        sharding.resolve(MeshConfig(fsdp=-1), machine(8), rows=6)


def test_in_a_configuration():
    values = {"target": "t", "corpus": {"path": "c"}, "mesh": "auto", "batch": {"sequences": 3}}
    assert config.validate(values).mesh == MeshConfig(data=-1, fsdp=-1, tensor=-1)
    for wrong in (0, -2):
        with pytest.raises(UserError, match=r"mesh.fsdp: .*at least 1, or -1"):
            config.validate(values | {"mesh": {"fsdp": wrong}})


def test_an_override_beside_auto(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("{target: t, corpus: {path: c}, mesh: auto}")
    assert sizes(config.load(path, ["mesh.fsdp=4"]).mesh) == (1, 4, 1)
    assert config.load(path, ["mesh=auto"]).mesh == AUTO
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(config.load(path)))
    assert config.load(again).mesh == AUTO


@pytest.mark.parametrize(
    ("shape", "over_slices"),
    [((2, 4, 1), "data"), ((4, 2, 1), "data"), ((1, 8, 1), "fsdp"), ((1, 4, 2), "fsdp"), ((1, 1, 8), "tensor")],
)
def test_the_outermost_axis_goes_over_the_slices(monkeypatch, shape, over_slices):
    """By what mesh_utils makes of devices that say which slice they are of."""
    made = {}
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes, axis_types: made.update(devices=devices))
    devices = machine(8, per_slice=4)
    sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, shape, strict=True))), devices[::-1])
    slices = np.vectorize(lambda device: device.slice_index)(made["devices"])
    assert slices.shape == shape
    assert len({device.id for device in made["devices"].flat}) == 8
    axis = sharding.AXES.index(over_slices)
    others = [np.ptp(slices, axis=i).max() for i in range(3) if i != axis]
    assert others == [0, 0], "only one axis crosses from slice to slice"
    assert np.ptp(slices, axis=axis).max() == 1


def test_every_shape_once():
    assert sorted(sharding.mesh_shapes(12)) == sorted(
        shape for shape in itertools.product(range(1, 13), repeat=3) if np.prod(shape) == 12
    )


TWO = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from fusejax import sharding
from fusejax.config import MeshConfig
mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=-1))
batch = sharding.put_batch({"x": np.arange(16.0)}, mesh)["x"]
total = jax.jit(lambda x: x.sum(), out_shardings=sharding.replicated(mesh))(batch)
print(sharding.described(mesh), [d.process_index for d in mesh.devices[:, 0, 0]], float(total))
"""


def test_data_goes_over_two_hosts():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(i)], stdout=subprocess.PIPE, text=True, env=on_cpus(4)
        )
        for i in range(2)
    ]
    for process in running:
        said = process.communicate(timeout=120)[0].splitlines()  # gloo has something to say before
        assert said[-1] == "data 2 x fsdp 4 x tensor 1, of 8 cpu [0, 1] 120.0"
        assert process.returncode == 0


def test_this_machine_is_taken_whole():
    assert sharding.make_mesh(AUTO).size == len(jax.devices())


def test_a_run_says_what_was_chosen(make_job, capsys):
    job = make_job(mesh="auto")
    trainer = training.Trainer.make(job, 10, with_sources=False)
    n = len(jax.devices())
    assert trainer.mesh.size == n
    assert f"mesh: data 1 x fsdp {n} x tensor 1, of {n} cpu" in capsys.readouterr().out

"""The only file that names mesh axes.

A mesh has three: `data` (replicas of the model), `fsdp` (parameters, optimizer state and batch split) and `tensor`
(heads, MLP and vocabulary split). Parameters declare *logical* axes; the rules below say which mesh axis each goes to.
Programs are jitted with these NamedShardings as input and output shardings, which is what `pjit` has become in JAX.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fusejax.config import Config, KernelsConfig, MeshConfig
from fusejax.errors import UserError
from fusejax.kernels.placement import Placement

AXES = ("data", "fsdp", "tensor")

# Logical axis → mesh axis; an axis that is not listed is replicated.
RULES: dict[str, str] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "qkv": "tensor",
    "vocab": "tensor",
}

BATCH = ("data", "fsdp")  # the batch dimension is split over both


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh of a configuration, of the first of `devices` (default: this machine's); one device without it.

    Raises UserError where the mesh asks for more devices than there are.
    """
    shape = (config.data, config.fsdp, config.tensor) if config else (1, 1, 1)
    if devices is None:
        devices = jax.devices() if config else jax.local_devices()
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor = {shape[0]} x {shape[1]} x {shape[2]} needs {needed} devices, "
            f"here {'is' if len(devices) == 1 else 'are'} {len(devices)} ({devices[0].platform})"
        )
    if config and needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh: data x fsdp x tensor = {shape[0]} x {shape[1]} x {shape[2]} takes {needed} of the {len(devices)} "
            f"devices of {jax.process_count()} processes; it should take all"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def named(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes.

    A dimension that its mesh axis does not divide stays whole, and a mesh axis is used once per array.
    """
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = RULES.get(axis) if axis else None
        if mesh_axis in spec or (mesh_axis and size % mesh.shape[mesh_axis]):
            mesh_axis = None
        spec.append(mesh_axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def spread(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The largest dimension that `fsdp` divides split over it; for tensors of which nothing else is known."""
    spec: list[str | None] = [None] * len(shape)
    divided = [i for i, size in enumerate(shape) if size and size % mesh.shape["fsdp"] == 0]
    if divided:
        spec[max(divided, key=lambda i: shape[i])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def placement(mesh: Mesh | None) -> Placement | None:
    """How hidden states [tokens, D] and an unembedding [D, V] lie on the mesh; None on one device."""
    if mesh is None or mesh.size == 1:
        return None
    return Placement(mesh, batch=BATCH, vocab=RULES["vocab"], embed=RULES["embed"])


def attention_specs(mesh: Mesh, rows: int, n_heads: int, n_kv_heads: int) -> tuple[PartitionSpec, PartitionSpec]:
    """How attention over [rows, L, heads, K] and over [rows, L] is split: by rows and by heads.

    What a mesh axis does not divide stays whole: every device of that axis then does all of it.
    """
    batch = BATCH if rows % int(np.prod([mesh.shape[axis] for axis in BATCH])) == 0 else None
    n_shards = mesh.shape["tensor"]
    heads = "tensor" if n_heads % n_shards == n_kv_heads % n_shards == 0 else None
    return PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)


def to_batch_rows(looked_up_BLD: jax.Array, mesh: Mesh | None, dtype: Any) -> jax.Array:
    """Rows looked up in a table split by columns over `fsdp`, in `dtype`, brought to the devices of their sequences.

    Said in two steps, since XLA finds the exchange between them, but replicates the whole array where it must go from
    the table's layout to the batch's in one. Where an axis does not divide a dimension it is left to XLA.
    """
    B, _, D = looked_up_BLD.shape
    if mesh is None or mesh.shape["tensor"] == 1 or mesh.shape["fsdp"] == 1:
        return looked_up_BLD.astype(dtype)
    if B % (mesh.shape["data"] * mesh.shape["fsdp"]) or D % mesh.shape["fsdp"]:
        return looked_up_BLD.astype(dtype)
    by_columns, by_rows = PartitionSpec("data", None, "fsdp"), PartitionSpec(BATCH)
    x = jax.lax.with_sharding_constraint(looked_up_BLD, NamedSharding(mesh, by_columns)).astype(dtype)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, by_rows))


def check_kernels(config: KernelsConfig, mesh: Mesh) -> None:
    """UserError where a kernel is asked for that the mesh's devices cannot run."""
    platform = mesh.devices.flat[0].platform
    for name, chosen in (("fusion_loss", config.fusion_loss), ("topk_unembed", config.topk_unembed)):
        if chosen in ("tpu", "gpu") and chosen != {"cuda": "gpu"}.get(platform, platform):
            raise UserError(f"kernels.{name}: {chosen!r} needs a {chosen.upper()}, here is {platform}; use auto or xla")


def one_by_one(function: Callable[..., Any], batch: Any, others: Any, mesh: Mesh | None) -> Any:
    """function(batch, others) of a batch of rows, each device going over its own rows one after another.

    batch: a pytree of [B, ...]; function: from one row of it, [1, ...], to a pytree of [1, ...].
    """

    def rows(batch: Any, others: Any) -> Any:
        one = jax.tree.map(lambda x: x[:, None], batch)
        return jax.tree.map(lambda x: x[:, 0], jax.lax.map(lambda row: function(row, others), one))

    if mesh is None or mesh.size == 1:
        return rows(batch, others)
    split, whole = PartitionSpec(BATCH), PartitionSpec()
    return jax.shard_map(rows, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False)(batch, others)


def local_mesh(config: MeshConfig | None = None) -> Mesh:
    """A mesh of this process' own devices, for work that is split by document over the processes.

    In a job of one process it is that of the configuration. Else `tensor` stays as it is where this process has so many
    devices, and the rest of them is `fsdp`.
    """
    if jax.process_count() == 1:
        return make_mesh(config)
    devices = jax.local_devices()
    tensor = config.tensor if config and len(devices) % config.tensor == 0 else 1
    shape = (1, len(devices) // tensor, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def sources_mesh(config: Config) -> Mesh:
    """What a source is laid out over: this process' own devices, or under `cache.mesh: job` those of all processes."""
    return make_mesh(config.mesh) if config.cache.mesh == "job" else local_mesh(config.mesh)


def whole_mesh() -> Mesh:
    """A mesh that splits parameters and batch over all devices of this process, for work without a configuration."""
    return local_mesh(MeshConfig(fsdp=len(jax.local_devices())))


def local_rows(n: int, mesh: Mesh) -> list[int]:
    """Which of a batch's n rows this process' devices hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((n,)).values()
    return sorted({row for place in places if place for row in range(*place[0].indices(n))})


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, n: int | None = None) -> dict[str, jax.Array]:
    """Host arrays [B, ...] as global arrays split over the mesh.

    n: rows of the whole batch, where the arrays hold this process' `local_rows(n, mesh)` alone; default: they hold all.
    """
    sharding = batch_sharding(mesh)
    at = None if n is None else {row: i for i, row in enumerate(local_rows(n, mesh))}

    def put(array: np.ndarray) -> jax.Array:
        if n is None or at is None:
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(n)
            return array[at[start] : at[start] + stop - start]

        return jax.make_array_from_callback((n, *array.shape[1:]), sharding, part)

    return {name: put(array) for name, array in batch.items()}


def put_parameter(array: np.ndarray, mesh: Mesh, spec: tuple[Any, ...]) -> jax.Array:
    """An array that every process holds whole, as a global one split by `spec` (mesh axes by dimension)."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(*spec)), array.__getitem__)


def microbatches(batch: dict[str, jax.Array], n: int, mesh: Mesh) -> dict[str, jax.Array]:
    """[B, ...] arrays as [n, B/n, ...], every microbatch split over the mesh as the batch is; inside jit.

    Each microbatch takes rows from every device's share of the batch, so that none moves to another device.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH))

    def cut(x: jax.Array) -> jax.Array:
        by_shard = x.reshape(shards, n, x.shape[0] // (shards * n), *x.shape[1:])
        cut = by_shard.swapaxes(0, 1).reshape(n, x.shape[0] // n, *x.shape[1:])
        return jax.lax.with_sharding_constraint(cut, sharding)

    return {name: cut(array) for name, array in batch.items()}


def like(tree: Any) -> Any:
    """The shardings of a pytree of arrays, for jit's in_shardings and out_shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)

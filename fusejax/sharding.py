"""The only file that names mesh axes.

A mesh has three: `data` (replicas of the model), `fsdp` (parameters, optimizer state and batch split) and `tensor`
(heads, MLP and vocabulary split). Parameters declare *logical* axes; the rules below say which mesh axis each goes to.
Programs are jitted with these NamedShardings as input and output shardings, which is what `pjit` has become in JAX.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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

    Where the devices are several slices (of TPUs) or hosts (of GPUs), `data` goes over them as far as it can, then
    `fsdp`, so that the axes with more to exchange stay on the fast network. Raises UserError where the mesh asks for
    more devices than there are, or leaves some of several processes' out.
    """
    if devices is None:
        devices = jax.devices() if config else jax.local_devices()
    is_job, config = config is not None, resolve(config or MeshConfig(), devices)
    shape = (config.data, config.fsdp, config.tensor)
    needed = int(np.prod(shape))
    if needed > len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor = {_product(shape)} needs {needed} devices, "
            f"here {'is' if len(devices) == 1 else 'are'} {len(devices)} ({devices[0].platform})"
        )
    if is_job and needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh: data x fsdp x tensor = {_product(shape)} takes {needed} of the {len(devices)} "
            f"devices of {jax.process_count()} processes; it should take all"
        )
    return _laid_out(shape, devices[:needed])


def _laid_out(shape: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """The mesh of exactly these devices, neighbours along its last axes being near each other."""
    axis_types = (AxisType.Auto,) * len(AXES)
    slices, by_process = slices_of(devices)
    if slices == 1:
        # jax.make_mesh does not split a TPU's physical axes, so 32 x 2 chips of 4 x 4 x 4 would be none of its meshes.
        ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(ordered, AXES, axis_types=axis_types)
    outer, left = [], slices
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // n for size, n in zip(shape, outer, strict=True)]
    ordered = mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
    return Mesh(ordered, AXES, axis_types=axis_types)


def _product(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def slices_of(devices: Sequence[Any]) -> tuple[int, bool]:
    """(groups of equally many devices with a fast network of their own, whether a group is a process).

    TPUs say which slice they are of, GPUs which host; else a process with several devices is taken for a host.
    """
    by_slice = Counter(getattr(device, "slice_index", 0) for device in devices)
    by_process = Counter(device.process_index for device in devices)
    if len(by_slice) > 1:
        return (len(by_slice), False) if len(set(by_slice.values())) == 1 else (1, False)
    if devices[0].platform == "tpu" or len(set(by_process.values())) > 1 or min(by_process.values()) == 1:
        return 1, False
    return len(by_process), True


def resolve(config: MeshConfig, devices: Sequence[Any], rows: int | None = None, model: Any = None) -> MeshConfig:
    """`config` with a number for every axis that it leaves open, so that the mesh takes all devices.

    `fsdp` takes the devices of a slice or host and `data` goes over those; `tensor` stays 1 but where data x fsdp would
    not divide `rows` (sequences of a forward pass), or where `fsdp` would not divide the width of `model` (a
    DecoderConfig), whose parameters would then stay whole. Raises UserError where no numbers do.
    """
    if not config.is_open:
        return config
    sizes = config.model_dump()
    given = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % given:
        fixed = {axis: size for axis, size in sizes.items() if size != -1}
        said = " x ".join(fixed) + " = " + _product(list(fixed.values()))
        raise UserError(f"mesh: {said} does not divide the {len(devices)} devices")
    slices, _ = slices_of(devices)
    shapes = [
        shape
        for shape in mesh_shapes(len(devices))
        if all(size in (-1, n) for size, n in zip(sizes.values(), shape, strict=True))
        and (rows is None or rows % (shape[0] * shape[1]) == 0)
    ]
    if not shapes:
        raise UserError(
            f"mesh: no numbers for its open axes take all {len(devices)} devices and let data x fsdp divide the "
            f"{rows} sequences of a forward pass; change batch.sequences, batch.microbatch or mesh.tensor"
        )

    def cost(shape: tuple[int, int, int]) -> tuple[bool, int, float]:
        data, fsdp, tensor = shape
        whole = model is not None and bool(model.d_model % fsdp or model.n_heads % tensor)
        return whole, tensor, abs(math.log(data / slices))

    best = min(shapes, key=cost)
    return MeshConfig(**dict(zip(sizes, best, strict=True)))


def mesh_shapes(n: int) -> list[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) whose product is n."""
    divisors = [i for i in range(1, n + 1) if n % i == 0]
    return [(data, fsdp, n // (data * fsdp)) for data in divisors for fsdp in divisors if n // data % fsdp == 0]


def job_mesh(config: Config, model: Any = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh on which a job trains; `model`: the target's DecoderConfig, for axes that are open (see `resolve`)."""
    devices = jax.devices() if devices is None else devices
    rows = config.batch.microbatch or config.batch.sequences
    return make_mesh(resolve(config.mesh, devices, rows, model), devices)


def described(mesh: Mesh) -> str:
    """The mesh and its devices, for people."""
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)
    return f"{sizes}, of {mesh.size} {mesh.devices.flat[0].device_kind}"


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
    """How hidden states [tokens, D] and an unembedding [D, V] lie on the mesh; None on one device.

    One of a platform that is not here has a placement too, for that is what says which platform a program is for.
    """
    if mesh is None:
        return None
    if mesh.size == 1 and (isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform == jax.default_backend()):
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


def local_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of this process' own devices, for work that is split by document over the processes.

    In a job of one process it is that of the configuration. Else `tensor` stays as it is where this process has so many
    devices, and the rest of them is `fsdp`. devices: those of one of several processes of another machine.
    """
    if jax.process_count() == 1 and devices is None:
        return make_mesh(config)
    devices = jax.local_devices() if devices is None else devices
    tensor = config.tensor if config and config.tensor > 0 and len(devices) % config.tensor == 0 else 1
    return _laid_out((1, len(devices) // tensor, tensor), devices)


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


def by_axes(mesh: Mesh, spec: tuple[Any, ...]) -> NamedSharding:
    """The sharding that splits each dimension over the mesh axis (or axes) that `spec` has for it."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def put_parameter(array: np.ndarray, mesh: Mesh, spec: tuple[Any, ...]) -> jax.Array:
    """An array that every process holds whole, as a global one split by `spec` (mesh axes by dimension)."""
    return jax.make_array_from_callback(array.shape, by_axes(mesh, spec), array.__getitem__)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


def microbatches(batch: dict[str, jax.Array], n: int, mesh: Mesh) -> dict[str, jax.Array]:
    """[B, ...] arrays as [n, B/n, ...], every microbatch split over the mesh as the batch is; inside jit.

    Each microbatch takes rows from every device's share of the batch, so that none moves to another device.
    """
    shards = batch_shards(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH))

    def cut(x: jax.Array) -> jax.Array:
        by_shard = x.reshape(shards, n, x.shape[0] // (shards * n), *x.shape[1:])
        cut = by_shard.swapaxes(0, 1).reshape(n, x.shape[0] // n, *x.shape[1:])
        return jax.lax.with_sharding_constraint(cut, sharding)

    return {name: cut(array) for name, array in batch.items()}


def like(tree: Any) -> Any:
    """The shardings of a pytree of arrays, for jit's in_shardings and out_shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)

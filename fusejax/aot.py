"""Ahead-of-time compilation for accelerators that are not here: does a job fit, and what does it exchange?

`topology` names the machine ("v5p:2x2x2", "h100:8"), `train_call` and `source_call` are a job's jitted functions with
their arguments' shapes, and `Call.compile` says what each device holds and what goes over the wires. TPUs need `libtpu`
(pip install "jax[tpu]") of the version that belongs to jaxlib; H100s need jax >= 0.12 with jax-cuda13-plugin and
jax-cuda13-pjrt. Neither needs the hardware.
"""

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

from fusejax import fusion, models, scoring, sharding
from fusejax import optimizer as optimizers
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.hlo import Traffic, collectives
from fusejax.training import tuning
from fusejax.training.state import abstract_state
from fusejax.training.step import make_step

TPUS = ("v4", "v5e", "v5p", "v6e")

# Bytes of a chip's memory that a program can have, as the compiler says them when it refuses one.
_USABLE = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24}
_H100_BYTES = 84942979072
POOL = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the share of a GPU's memory that JAX takes, and 0.75 unless set
_H100_CORES = 132
# What XLA's CUDA compiler wants to know of a device; NVIDIA's data sheet of the H100 SXM5 80 GB.
_H100 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  core_count: {_H100_CORES} fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: {_H100_BYTES}
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class NotInstalledError(UserError):
    """What compiles for a machine is not installed."""


class DoesNotFitError(UserError):
    """A program needs more memory than a device has; bytes, None where the compiler does not say them."""

    def __init__(self, needed: int | None, available: int | None, said: str) -> None:
        super().__init__(f"does not fit: {said}")
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class Program:
    """A compiled program; all sizes are bytes on each device.

    arguments and temporaries; peak: the most that is held at once; outputs that share an argument's buffer count in
    arguments alone. collectives: by kind. flops: as the compiler counts them, each loop's body once. seconds: of the
    compilation.
    """

    arguments: int
    temporaries: int
    peak: int
    collectives: dict[str, Traffic]
    flops: float
    seconds: float


def topology(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of a machine by its name: TPU:SHAPE as in `v5p:2x2x2` and `v6e:2x4`, or `h100:N`, `h100:HOSTSxN`.

    slices: so many of these TPU slices, joined by the data centre's network.

    Raises UserError for a name that is not known, NotInstalledError where what compiles for it is missing.
    """
    kind, colon, shape = name.partition(":")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"topology {name!r}: should be a machine and its shape, as v5p:2x2x2, v6e:2x4 or h100:8")
    if kind in TPUS:
        return _tpu(name, slices)
    if kind == "h100":
        return _h100(shape)
    raise UserError(f"topology {name!r}: known machines are {', '.join(TPUS)} and h100")


def one_process(name: str, devices: Sequence[Any]) -> Sequence[Any]:
    """The devices of one of a machine's processes, as a machine of their own, since libtpu compiles for whole ones."""
    own = [device for device in devices if device.process_index == devices[0].process_index]
    if len(own) == len(devices):
        return devices
    kind = name.partition(":")[0]
    if kind == "h100":
        return topology(f"h100:{len(own)}")
    shape = [len({device.coords[axis] for device in own}) for axis in range(3)]
    return topology(f"{kind}:{'x'.join(map(str, shape if kind in ('v4', 'v5p') else shape[:2]))}")


def _tpu(name: str, slices: int) -> Sequence[Any]:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        wanted = f"pip install 'jax[tpu]=={jax.__version__}'"
        raise NotInstalledError(f"topology {name!r}: needs libtpu; {wanted}") from None
    # Without these libtpu asks the cloud's metadata server which TPU it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # It would let one process of a machine in alone, which matters where there is a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        # The two cores of a v4 chip are one device in JAX, as those of a v5p are.
        options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
        with _quiet():
            return topologies.get_topology_desc(name, "tpu", num_slices=slices, **options).devices
    except Exception as error:
        raise UserError(f"topology {name!r}: libtpu refuses it: {_first_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process' standard error: libtpu says there that it finds no TPU."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _h100(shape: str) -> Sequence[Any]:
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 12):
        wanted = "with Python >= 3.12: pip install -U 'jax>=0.12'"
        raise NotInstalledError(f"topology 'h100:{shape}': needs jax >= 0.12, here is {jax.__version__}; {wanted}")
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            version(package)
        except PackageNotFoundError:
            wanted = f"pip install --no-deps {package}=={jax.__version__}"
            raise NotInstalledError(f"topology 'h100:{shape}': needs {package}; {wanted}") from None
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    whole = "x".join(["1", "1", *shape.split("x")][-3:])
    try:
        found = topologies.get_topology_desc(platform="cuda", topology_name=shape, target_config=_H100, topology=whole)
        return found.devices
    except Exception as error:
        raise UserError(f"topology 'h100:{shape}': the CUDA compiler refuses it: {_first_line(error)}") from None


def without_cudnn(config: Config, devices: Sequence[Any]) -> Config:
    """`config` with XLA's attention where cuDNN's would be taken for GPUs and the library is not installed here.

    Raises NotInstalledError where the configuration asks for cuDNN's.
    """
    if devices[0].platform not in ("cuda", "gpu") or config.attention not in ("auto", "cudnn"):
        return config
    if util.find_spec("nvidia") and util.find_spec("nvidia.cudnn"):
        return config
    if config.attention == "cudnn":
        raise NotInstalledError("attention: compiling 'cudnn' needs cuDNN here; pip install nvidia-cudnn-cu13")
    return config.model_copy(update={"attention": "xla"})


def usable_memory(devices: Sequence[Any]) -> int:
    """Bytes that a program can have on each of a machine's devices; on GPUs by JAX's own pool (see POOL)."""
    kind = devices[0].device_kind
    if kind in _USABLE:
        return int(_USABLE[kind] * (1 << 30))
    return int(_H100_BYTES * float(os.environ.get(POOL, "0.75")))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shard_bytes(tree: Any) -> int:
    """What each device holds of arrays, or of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


class Call(NamedTuple):
    """A jitted function and the arguments to compile it for, ShapeDtypeStructs with shardings."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def argument_bytes(self) -> int:
        """What each device holds of the arguments."""
        return shard_bytes(self.arguments)

    def compile(self) -> Program:
        """See `compile_for`."""
        return compile_for(self.function, *self.arguments)


def train_call(
    config: Config,
    model_config: models.DecoderConfig,
    devices: Sequence[Any],
    *,
    source_vocabularies: Sequence[int] = (),
    table_columns: int = 16,
    steps_total: int = 1000,
) -> Call:
    """The training step of a job and its arguments.

    source_vocabularies: rows of each source's token table; none: the CLM-only step. table_columns: how many bytes of a
    source token a row may have consumed, plus one.
    """
    mesh = sharding.job_mesh(config, model_config, devices)
    model = models.Decoder(
        model_config, jnp.dtype(config.precision.compute), config.remat, attention=config.attention, mesh=mesh
    )
    graphdef, _ = nnx.split(model)
    params = nnx.to_pure_dict(_abstract_params(model_config, jnp.float32, mesh))
    trained, fixed = tuning.abstract_split(config, params, model, mesh)
    optimizer, schedule = optimizers.make(config.optimizer, steps_total)
    state = abstract_state(config, trained, optimizer, mesh)
    layouts = sharding.like(state), sharding.like(fixed)
    step = make_step(config, graphdef, optimizer, schedule, steps_total, *layouts, mesh)
    table: Any = partial(jax.ShapeDtypeStruct, sharding=sharding.replicated(mesh))
    shapes_of = [(rows, table_columns) for rows in source_vocabularies]
    tables = [fusion.TokenTable(table(shape, jnp.int32), table(shape, jnp.uint32)) for shape in shapes_of]
    return Call(step, (state, fixed, abstract_batch(config, len(tables), mesh), tables))


def source_call(
    config: Config,
    source: ModelConfig,
    model_config: models.DecoderConfig,
    devices: Sequence[Any],
    own: Sequence[Any] | None = None,
) -> Call:
    """The program that caches a source, of its longest batches.

    own: the devices of one of several processes, see `one_process`; default: there is one process. Without
    `cache.batch_tokens` the batch is the smallest one, which says whether a larger one may be chosen.
    """
    alone = own is None or len(own) == len(devices) or config.cache.mesh == "job"
    mesh = sharding.make_mesh(config.mesh, devices) if alone else sharding.local_mesh(config.mesh, own)
    compute = jnp.dtype(config.precision.compute)
    model = models.Decoder(model_config, compute, attention=config.attention, mesh=mesh)
    graphdef, _ = nnx.split(model)
    sampled = config.cache.kind == "sampled"
    forward = scoring.program(
        graphdef,
        k=0 if sampled else source.top_k or config.cache.top_k,
        vocab_size=model_config.vocab_size,
        mesh=mesh,
        draws=scoring.Draws(config.cache.rounds, config.seed) if sampled else None,
        implementation=config.kernels.topk_unembed,
    )
    multiple, longest = sharding.batch_shards(mesh), np.array([config.max_length])
    rows = scoring.plan(longest, config.max_length, config.cache.batch_tokens or 1, multiple)[0].rows
    split = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=sharding.batch_sharding(mesh))
    ids = split((rows, config.max_length))
    return Call(
        forward, (_abstract_params(model_config, compute, mesh), ids, ids, *([split((rows,))] if sampled else []))
    )


def _abstract_params(model_config: models.DecoderConfig, dtype: Any, mesh: jax.sharding.Mesh) -> nnx.State:
    """The parameters as shapes, laid out over the mesh."""
    shapes, placed = models.abstract_params(model_config, dtype), models.shardings(model_config, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placed)


def abstract_batch(config: Config, n_sources: int, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of `batches.Batches` as shapes, laid out over the mesh."""
    B, L, S, K = config.batch.sequences, config.max_length, n_sources, config.cache.top_k
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((B, L), jnp.int32) for name in ("ids", "segment_ids", "positions", "labels")
    }
    if n_sources:
        shapes |= {
            "source_ids": ((B, L, S, K), jnp.int32),
            "source_logprobs": ((B, L, S, K), jnp.float32),
            "source_valid": ((B, L, S), jnp.bool_),
            "source_consumed": ((B, L, S), jnp.int32),
            "source_labels": ((B, L, S), jnp.int32),
            "source_ce": ((B, L, S), jnp.float32),
        }
        if config.fusion.gate and config.fusion.ce_unit == "byte":
            shapes["label_bytes"] = ((B, L), jnp.int32)
        if config.alignment.gold_chain:
            shapes["gold_logprobs"] = ((B, L, S), jnp.float32)
    rows = sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.items()}


def compile_for(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compile a jitted function for the devices of its arguments' shardings, ShapeDtypeStructs all of them.

    Raises DoesNotFitError where the compiler says that memory does not suffice.
    """
    started = time.monotonic()
    static = function.args if isinstance(function, partial) else ()
    jitted: Any = function.func if isinstance(function, partial) else function
    try:
        with _on_abstract_device(arguments):
            compiled = jitted.lower(*static, *arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(*_shortage(str(error))) from None
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives(compiled.as_text()),
        flops=float(cost.get("flops", 0.0)),
        seconds=time.monotonic() - started,
    )


def _on_abstract_device(arguments: Any) -> contextlib.AbstractContextManager[Any]:
    """Pallas asks which GPU it compiles for; where there is none, the mesh of the arguments must say it."""
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    device = mesh.devices.flat[0]
    if device.platform not in ("cuda", "gpu"):
        return contextlib.nullcontext()
    kind = jax.sharding.AbstractDevice(device.device_kind, _H100_CORES, "gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=kind)
    )


_SHORTAGES = (
    r"Used (?P<needed>[\d.]+[KMGT]) of (?P<available>[\d.]+[KMGT]) hbm",
    r"total memory required for HLO temporaries \((?P<needed>[\d.]+[KMGT])\) exceeds available HBM "
    r"\((?P<available>[\d.]+[KMGT])\)",
)


def _shortage(text: str) -> tuple[int | None, int | None, str]:
    """(bytes needed, bytes available, the compiler's words) of its refusal."""
    for pattern in _SHORTAGES:
        found = re.search(pattern, text)
        if found:
            return _from_binary(found["needed"]), _from_binary(found["available"]), found.group(0)
    return None, None, text.splitlines()[0]


def _from_binary(size: str) -> int:
    return round(float(size[:-1]) * 1024 ** ("KMGT".index(size[-1]) + 1))

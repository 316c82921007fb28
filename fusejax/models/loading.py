"""Weights of a folder onto their devices: tensor by tensor, file by file.

Parameters of all layers are stacked, tensors on disk are not. A small parameter is put together on the host; a large
one is made on the devices, and each tensor is written to its place there. So beside what stays, the host holds one
tensor, and of the files' mappings what the tensor takes there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import sharding
from fusejax.models.convert import Shapes, View, Views, dotted, match, param_shapes
from fusejax.models.decoder import Decoder, fill
from fusejax.models.families import Family
from fusejax.progress import progress

_SHOW_PROGRESS_ABOVE = 1 << 29  # bytes of parameters
_SMALL = 16 << 20  # bytes; a smaller parameter is quicker to put together on the host

Placed = dict[str, jax.Array]


def load_params(model: Decoder, folder: Path, family: Family, mesh: Any, dtype: Any) -> Decoder:
    """`model` with the folder's weights as `dtype`, each tensor placed straight on its devices.

    Tensors are mapped, not read, so a device reads the part of each that it holds. Without a mesh the parameters go to
    the default device. Raises UserError where tensors and parameters do not match one to one.
    """
    views, shapes = match(folder, family, model.config), param_shapes(model.config)
    variables = {dotted(path): variable for path, variable in nnx.to_flat_state(nnx.split(model)[1])}
    dtype = jnp.dtype(dtype)
    bytes_of = {param: variable.size * dtype.itemsize for param, variable in variables.items()}
    at_once = [param for param in variables if bytes_of[param] < _SMALL or not views[param][0].at]
    pieces = _by_file(views, set(variables) - set(at_once))
    placed: Placed = {}

    def work(step: Callable[[str], None]) -> None:
        for param in at_once:
            placed[param] = _whole(views[param], shapes, variables[param], mesh, dtype)
            step(param)
        _release(view for parts in views.values() for view in parts)
        for param in {param for file in pieces for param, _ in file}:
            placed[param] = _zeros(variables[param], mesh, dtype)
        for file in pieces:
            for param, view in file:
                placed[param] = _write(placed[param], view, shapes, dtype)
                view.stored.release()
                step(param)

    if sum(bytes_of.values()) < _SHOW_PROGRESS_ABOVE:
        work(lambda param: None)
    else:
        with progress(f"load {folder.name}", total=len(at_once) + sum(map(len, pieces))) as bar:
            work(lambda param: bar.advance(1, param.split(".")[-2] if "." in param else param))
    return fill(model, lambda path, variable: placed[dotted(path)])


def _by_file(views: Views, params: set[str]) -> list[list[tuple[str, View]]]:
    """(parameter, part) of these parameters, in the order of the files."""
    found: dict[Path, list[tuple[str, View]]] = defaultdict(list)
    for param in sorted(params):
        for view in views[param]:
            found[view.stored.file].append((param, view))
    return [found[file] for file in sorted(found)]


def _release(views: Iterable[View]) -> None:
    """Give back the memory of the files' mappings."""
    for stored in {view.stored.file: view.stored for view in views}.values():
        stored.release()


def sharding_of(variable: nnx.Param, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Where a parameter lies on the mesh, by its declaration."""
    return sharding.named(mesh, variable.get_metadata()["axes"], tuple(variable.shape))


def _whole(parts: list[View], shapes: Shapes, variable: nnx.Param, mesh: Any, dtype: Any) -> jax.Array:
    """A parameter put together on the host, shard by shard."""
    shape = tuple(variable.shape)

    def shard(index: Any) -> np.ndarray:
        starts, stops, _ = zip(*(cut.indices(size) for cut, size in zip(index, shape, strict=True)), strict=True)
        result = np.empty(np.subtract(stops, starts), dtype)
        for view in parts:
            own = tuple(np.subtract(view.at, starts[: len(view.at)]).tolist())  # its place in the shard, if any
            if all(0 <= i < size for i, size in zip(own, result.shape, strict=False)):
                result[own] = view.read(shapes)[index[len(view.at) :]]
        return result

    if mesh is None:
        return jnp.asarray(shard(tuple(slice(0, size) for size in shape)))
    return jax.make_array_from_callback(shape, sharding_of(variable, mesh), shard)


def _zeros(variable: nnx.Param, mesh: Any, dtype: Any) -> jax.Array:
    if mesh is None:
        return jnp.zeros(variable.shape, dtype)
    return jax.jit(partial(jnp.zeros, variable.shape, dtype), out_shardings=sharding_of(variable, mesh))()


def _write(array: jax.Array, view: View, shapes: Shapes, dtype: Any) -> jax.Array:
    """`array`, whose memory is used again, with the view's part at its place."""
    part = view.read(shapes)
    layout = array.sharding if isinstance(array.sharding, jax.sharding.NamedSharding) else None
    if layout is None:
        piece = jnp.asarray(np.ascontiguousarray(part, dtype))
    else:
        spec = jax.sharding.PartitionSpec(*layout.spec[len(view.at) :])
        piece = jax.make_array_from_callback(
            part.shape,
            jax.sharding.NamedSharding(layout.mesh, spec),
            lambda index: np.ascontiguousarray(part[index], dtype),
        )
    written = _writer(layout)(array, piece, view.at)
    # Else dispatch would run ahead, and many tensors would wait on the host.
    return jax.block_until_ready(written)


@lru_cache
def _writer(layout: Any) -> Any:
    def write(array: jax.Array, piece: jax.Array, at: tuple[int, ...]) -> jax.Array:
        return array.at[at].set(piece)

    options = {} if layout is None else {"out_shardings": layout}
    return jax.jit(write, donate_argnums=0, **options)

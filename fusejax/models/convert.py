"""Strict conversion between Hugging Face tensors and a decoder's parameters."""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax.errors import UserError
from fusejax.models import files
from fusejax.models.decoder import Decoder, DecoderConfig, fill
from fusejax.models.families import Family, Tensor
from fusejax.progress import progress

_SHOW_PROGRESS_ABOVE = 1 << 29  # bytes of parameters

Shapes = dict[str, tuple[int, ...]]  # parameter path → shape of one layer
Views = dict[str, list[tuple[int, files.StoredTensor, Tensor, int]]]  # path → (layer, stored, table entry, part)


def dotted(path: tuple[Any, ...]) -> str:
    """A parameter's name: `blocks.mlp.up.kernel`."""
    return ".".join(path)


def param_shapes(config: DecoderConfig) -> Shapes:
    """The shape of every parameter by dotted path, without the axis over layers."""
    _, params = nnx.split(Decoder(config))
    return {
        dotted(path): tuple(variable.shape[1:] if path[0] == "blocks" else variable.shape)
        for path, variable in nnx.to_flat_state(params)
    }


def expected(family: Family, config: DecoderConfig) -> Iterator[tuple[str, Tensor, int]]:
    """(name on disk, table entry, layer) of every tensor that the family's checkpoints hold."""
    for tensor in family.tensors(config):
        for layer in range(config.n_layers if "{i}" in tensor.name else 1):
            yield tensor.name.format(i=layer), tensor, layer


def stored_shape(tensor: Tensor, shapes: Shapes) -> tuple[int, ...]:
    """The shape that a table entry's tensor has on disk."""
    first = shapes[tensor.params[0]]
    if tensor.embedding:
        return first
    rows = sum(math.prod(shapes[param][tensor.n_in :]) for param in tensor.params)
    return (rows, math.prod(first[: tensor.n_in])) if tensor.n_in else (rows,)


def to_param(tensor: Tensor, array: np.ndarray, part: int, shapes: Shapes) -> np.ndarray:
    """The parameter `tensor.params[part]` out of the tensor on disk, as a view."""
    shape = shapes[tensor.params[part]]
    if tensor.embedding:
        return array
    inputs, outputs = shape[: tensor.n_in], shape[tensor.n_in :]
    rows = [math.prod(shapes[param][tensor.n_in :]) for param in tensor.params]
    if tensor.interleaved:
        heads, features = outputs
        array = array.reshape(heads, len(rows), features, *array.shape[1:])[:, part]
    else:
        array = array[sum(rows[:part]) : sum(rows[: part + 1])]
    array = array.reshape(*outputs, *inputs)
    return array.transpose(*range(len(outputs), len(shape)), *range(len(outputs)))


def from_params(tensor: Tensor, arrays: list[np.ndarray]) -> np.ndarray:
    """The tensor on disk from its parameters, the inverse of `to_param`."""
    if tensor.embedding:
        return arrays[0]
    n_in = tensor.n_in
    rows = [array.transpose(*range(n_in, array.ndim), *range(n_in)) for array in arrays]
    inputs = (math.prod(arrays[0].shape[:n_in]),) if n_in else ()
    if tensor.interleaved:
        rows = [array.reshape(*array.shape[:2], *inputs) for array in rows]
        return np.stack(rows, axis=1).reshape(-1, *inputs)
    return np.concatenate([array.reshape(-1, *inputs) for array in rows])


def match(folder: Path, family: Family, config: DecoderConfig, headers_only: bool = False) -> Views:
    """Which stored tensor gives which parameter; UserError, naming tensor and file, unless they match one to one.

    headers_only: copies of tied tensors are compared by shape alone, so that no tensor is read.
    """
    stored, shapes = files.tensors(folder), param_shapes(config)
    views: Views = {path: [] for path in shapes}
    known: set[str] = set()
    for name, tensor, layer in expected(family, config):
        names = [candidate for candidate in (name, *tensor.aliases) if candidate in stored]
        if not names:
            file = files.weight_files(folder)[0]
            where = file if file.name in ("model.safetensors", "pytorch_model.bin") else folder
            raise UserError(f"{where}: tensor {name} is missing")
        if len(names) > 1:
            raise UserError(f"{stored[names[1]].file}: tensor {names[1]} is duplicate: it is {names[0]} too")
        found, wanted = stored[names[0]], stored_shape(tensor, shapes)
        if found.shape != wanted:
            raise UserError(
                f"{found.file}: tensor {names[0]} has shape {list(found.shape)}, config.json makes it {list(wanted)}"
            )
        if found.dtype is None:
            kinds = ", ".join(files.DTYPES)
            raise UserError(f"{found.file}: tensor {names[0]} is stored as {found.stored_as}; supported: {kinds}")
        known.add(names[0])
        for copy in tensor.copies:
            if copy in stored:
                known.add(copy)
                _check_copy(copy, stored[copy], names[0], found, headers_only)
        for part, param in enumerate(tensor.params):
            views[param].append((layer, found, tensor, part))
    for name in stored.keys() - known:
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise UserError(f"{stored[name].file}: tensor {name} is unknown: {family.architecture} has none such")
    return views


def _check_copy(name: str, copy: files.StoredTensor, of: str, original: files.StoredTensor, headers_only: bool) -> None:
    if copy.shape != original.shape or not (headers_only or np.array_equal(copy.read(), original.read())):
        raise UserError(
            f"{copy.file}: tensor {name} differs from {of}, though config.json ties them; "
            f"set tie_word_embeddings to false, or remove the tensor"
        )


def load_params(model: Decoder, folder: Path, family: Family, mesh: Any, dtype: Any) -> Decoder:
    """`model` with the folder's weights, each placed straight on its devices.

    Tensors are mapped, not read, so a device reads the part of each that it holds; beside the files' mapping, the host
    holds one parameter's shard at a time. Without a mesh the parameters go to the default device.
    """
    views, shapes = match(folder, family, model.config), param_shapes(model.config)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1])) * jnp.dtype(dtype).itemsize
    if size < _SHOW_PROGRESS_ABOVE:
        return fill(model, lambda path, variable: _place(views, shapes, path, variable, mesh, dtype))
    with progress(f"load {folder.name}", total=len(shapes)) as bar:

        def make(path: tuple[Any, ...], variable: nnx.Param) -> jax.Array:
            bar.advance(1, path[-2] if len(path) > 1 else path[0])
            return _place(views, shapes, path, variable, mesh, dtype)

        return fill(model, make)


def _place(
    views: Views, shapes: Shapes, path: tuple[Any, ...], variable: nnx.Param, mesh: Any, dtype: Any
) -> jax.Array:
    shape, param = tuple(variable.shape), dotted(path)
    by_layer = sorted(views[param], key=lambda view: view[0])
    stacked = path[0] == "blocks"

    def shard(index: Any) -> np.ndarray:
        dims = [len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True)]
        result = np.empty(dims, jnp.dtype(dtype))
        layers = by_layer[index[0]] if stacked else by_layer
        for row, (_, stored, tensor, part) in enumerate(layers):
            view = to_param(tensor, stored.read(), part, shapes)
            if stacked:
                result[row] = view[index[1:]]
            else:
                result[...] = view[index]
        return result

    if mesh is None:
        return jnp.asarray(shard(tuple(slice(0, size) for size in shape)))
    from fusejax import sharding

    return jax.make_array_from_callback(shape, sharding.named(mesh, variable.get_metadata()["axes"], shape), shard)


def stored_tensors(model: Decoder, family: Family, dtype: Any) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, shape, read) of every tensor that a checkpoint of `model` holds; read() makes the array, in `dtype`."""
    _, params = nnx.split(model)
    values = {dotted(path): variable[...] for path, variable in nnx.to_flat_state(params)}
    shapes = param_shapes(model.config)

    def read(tensor: Tensor, layer: int) -> np.ndarray:
        parts = [to_host(values[param], layer if param.startswith("blocks.") else None) for param in tensor.params]
        return np.ascontiguousarray(from_params(tensor, parts)).astype(jnp.dtype(dtype))

    for name, tensor, layer in expected(family, model.config):
        yield name, stored_shape(tensor, shapes), partial(read, tensor, layer)


def to_host(array: jax.Array, layer: int | None) -> np.ndarray:
    """The array, or one layer of it, on this host, gathered from the others where it spans them."""
    if array.is_fully_addressable:
        whole = np.asarray(array)  # kept by the array: the next layer costs nothing
        return whole if layer is None else whole[layer]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array if layer is None else array[layer], tiled=True))

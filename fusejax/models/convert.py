"""Strict conversion between Hugging Face tensors and a decoder's parameters."""

import math
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax.errors import UserError
from fusejax.models import files
from fusejax.models.config import DecoderConfig
from fusejax.models.decoder import Decoder
from fusejax.models.families import Family, Tensor

Shapes = dict[str, tuple[int, ...]]  # parameter path → shape of one layer


class View(NamedTuple):
    """A stored tensor and the parameter's part that it holds."""

    at: tuple[int, ...]  # as `Named.at`
    stored: files.StoredTensor
    tensor: Tensor
    part: int

    def read(self, shapes: Shapes) -> np.ndarray:
        """The part, mapped rather than copied."""
        return to_param(self.tensor, self.stored.read(), self.part, shapes)


Views = dict[str, list[View]]  # by the parameter's path


class Named(NamedTuple):
    """A tensor of a checkpoint by its name on disk."""

    name: str
    tensor: Tensor
    layer: int
    entry: int | None  # of the parameter's first dimension, None for all

    def at(self, param: str) -> tuple[int, ...]:
        """Its place in the parameter's first dimensions: of the layers, and of the experts."""
        layers = (self.layer,) if param.startswith("blocks.") else ()
        return layers if self.entry is None else (*layers, self.entry)


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


def expected(tensors: Iterable[Tensor], config: DecoderConfig, shapes: Shapes) -> Iterator[Named]:
    """Every tensor that checkpoints with these entries hold."""
    for tensor in tensors:
        entries = range(shapes[tensor.params[0]][0]) if "{j}" in tensor.name else (None,)
        for layer in range(config.n_layers if "{i}" in tensor.name else 1):
            for entry in entries:
                yield Named(tensor.name.format(i=layer, j=entry), tensor, layer, entry)


def _own_shapes(tensor: Tensor, shapes: Shapes) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Dimensions in front that the tensor has as its parameters do, and the parameters' shapes without them."""
    skipped = int(tensor.stacked or "{j}" in tensor.name)
    front = shapes[tensor.params[0]][:skipped] if tensor.stacked else ()
    return front, [shapes[param][skipped:] for param in tensor.params]


def stored_shape(tensor: Tensor, shapes: Shapes) -> tuple[int, ...]:
    """The shape that a table entry's tensor has on disk."""
    front, own = _own_shapes(tensor, shapes)
    if tensor.embedding:
        return own[0]
    rows = sum(math.prod(shape[tensor.n_in :]) for shape in own)
    matrix = (rows, math.prod(own[0][: tensor.n_in])) if tensor.n_in else (rows,)
    return front + (matrix[::-1] if tensor.transposed else matrix)


def to_param(tensor: Tensor, array: np.ndarray, part: int, shapes: Shapes) -> np.ndarray:
    """The parameter `tensor.params[part]` out of the tensor on disk, as a view.

    Of a tensor that is one entry of its parameters' first dimension: that entry.
    """
    front, own = _own_shapes(tensor, shapes)
    if tensor.embedding:
        return array
    if tensor.transposed:
        array = np.swapaxes(array, -1, -2)
    inputs, outputs = own[part][: tensor.n_in], own[part][tensor.n_in :]
    rows = [math.prod(shape[tensor.n_in :]) // tensor.groups for shape in own]
    array = array.reshape(*front, tensor.groups, sum(rows), *array.shape[len(front) + 1 :])
    array = array[(slice(None),) * (len(front) + 1) + (slice(sum(rows[:part]), sum(rows[: part + 1])),)]
    array = array.reshape(*front, *outputs, *inputs)
    return _swap(array, len(front), len(outputs))


def from_params(tensor: Tensor, arrays: list[np.ndarray]) -> np.ndarray:
    """The tensor on disk from its parameters (or their entries), the inverse of `to_param`."""
    if tensor.embedding:
        return arrays[0]
    n_front = int(tensor.stacked)
    front = arrays[0].shape[:n_front]
    inputs = (math.prod(arrays[0].shape[n_front : n_front + tensor.n_in]),) if tensor.n_in else ()
    rows = [_swap(array, n_front, tensor.n_in).reshape(*front, tensor.groups, -1, *inputs) for array in arrays]
    matrix = np.concatenate(rows, axis=n_front + 1).reshape(*front, -1, *inputs)
    return np.swapaxes(matrix, -1, -2) if tensor.transposed else matrix


def _swap(array: np.ndarray, front: int, first: int) -> np.ndarray:
    """The `first` dimensions after those in front go to the end."""
    return array.transpose(*range(front), *range(front + first, array.ndim), *range(front, front + first))


def _layout(family: Family, config: DecoderConfig, stored: dict[str, Any], shapes: Shapes) -> list[Named]:
    """The family's tensors, in whichever of its layouts has more of them stored."""
    layouts = [family.tensors] + ([family.other_tensors] if family.other_tensors else [])
    named = [list(expected(tensors(config), config, shapes)) for tensors in layouts]
    return max(named, key=lambda layout: sum(entry.name in stored for entry in layout) / len(layout))


def match(folder: Path, family: Family, config: DecoderConfig, headers_only: bool = False) -> Views:
    """Which stored tensor gives which parameter; UserError, naming tensor and file, unless they match one to one.

    headers_only: copies of tied tensors are compared by shape alone, so that no tensor is read.
    """
    stored, shapes = files.tensors(folder), param_shapes(config)
    views: Views = {path: [] for path in shapes}
    known: set[str] = set()
    for named in _layout(family, config, stored, shapes):
        name, tensor = named.name, named.tensor
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
            views[param].append(View(named.at(param), found, tensor, part))
    for name in stored.keys() - known:
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            raise UserError(f"{stored[name].file}: tensor {name} is unknown: {family.architecture} has none such")
    return views


def by_name(folder: Path, family: Family, config: DecoderConfig) -> dict[str, files.StoredTensor]:
    """The stored tensors by their names in the family's table, copies of tied ones left out; errors of `match`."""
    match(folder, family, config)
    stored = files.tensors(folder)
    return {
        name: next(stored[known] for known in (name, *tensor.aliases) if known in stored)
        for name, tensor, _, _ in _layout(family, config, stored, param_shapes(config))
    }


def _check_copy(name: str, copy: files.StoredTensor, of: str, original: files.StoredTensor, headers_only: bool) -> None:
    if copy.shape != original.shape or not (headers_only or np.array_equal(copy.read(), original.read())):
        raise UserError(
            f"{copy.file}: tensor {name} differs from {of}, though config.json ties them; "
            f"set tie_word_embeddings to false, or remove the tensor"
        )


def stored_tensors(model: Decoder, family: Family, dtype: Any) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, shape, read) of every tensor that a checkpoint of `model` holds; read() makes the array, in `dtype`."""
    _, params = nnx.split(model)
    values = {dotted(path): variable[...] for path, variable in nnx.to_flat_state(params)}
    shapes = param_shapes(model.config)

    def read(named: Named) -> np.ndarray:
        parts = [to_host(values[param], named.at(param)) for param in named.tensor.params]
        return np.ascontiguousarray(from_params(named.tensor, parts)).astype(jnp.dtype(dtype))

    for named in expected(family.tensors(model.config), model.config, shapes):
        yield named.name, stored_shape(named.tensor, shapes), partial(read, named)


def to_host(array: jax.Array, at: tuple[int, ...]) -> np.ndarray:
    """The array, or its entry `at` of the first dimensions, on this host, gathered from the others if need be."""
    if array.is_fully_addressable:
        return np.asarray(array)[at]  # the whole is kept by the array: the next layer costs nothing
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array[at], tiled=True))

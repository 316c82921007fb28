"""Checkpoints that fit each other: the same tensors by name and shape, the same configuration, the same vocabulary.

Tensors are mapped, not read, and written one after another: neither side holds more than one tensor of a model.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusejax import export, models, tokenizer_files, tokenizers
from fusejax.config import ModelConfig
from fusejax.errors import UserError
from fusejax.models import convert, families, files
from fusejax.progress import warn
from fusejax.tokenizers import Tokenizer

# What a configuration says without changing what the weights compute.
_FREE = ("max_length", "initializer_std")
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in files.DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder and its tensors by the names that its family gives them; tied copies are left out."""

    name: str  # how messages call it
    folder: Path
    family: families.Family
    config: models.DecoderConfig
    hf_config: dict[str, Any]
    tensors: dict[str, files.StoredTensor]


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """The tensors of a model, none read yet; UserError for what is missing, unknown, misshapen or not supported."""
    folder = files.local_folder(model.model, model.revision)
    hf_config, config = models.read_config(folder)
    family = families.find(hf_config, str(folder / "config.json"))
    tensors = convert.by_name(folder, family, config)
    return Checkpoint(model.model, folder, family, config, hf_config, tensors)


def require_mergeable(first: Checkpoint, other: Checkpoint) -> None:
    """UserError, naming the tensor or key, unless elements of the two stand for the same in both models."""
    for name, tensor in first.tensors.items():
        if name not in other.tensors:
            raise UserError(
                f"{other.folder}: has no tensor {name}, which {first.folder} has; only models of one architecture "
                f"can be merged ({_kind(other)}, {_kind(first)})"
            )
        if other.tensors[name].shape != tensor.shape:
            raise UserError(
                f"{other.folder}: tensor {name} has shape {list(other.tensors[name].shape)}, in {first.folder} "
                f"it has {list(tensor.shape)}; only models of one size and vocabulary can be merged"
            )
    for name in other.tensors:
        if name not in first.tensors:
            raise UserError(
                f"{first.folder}: has no tensor {name}, which {other.folder} has; only models of one architecture "
                f"can be merged ({_kind(first)}, {_kind(other)})"
            )
    for field in fields(first.config):
        ours, theirs = (getattr(checkpoint.config, field.name) for checkpoint in (first, other))
        if field.name not in _FREE and ours != theirs:
            raise UserError(
                f"{other.folder / 'config.json'}: {field.name} is {theirs!r}, in {first.folder} it is {ours!r}; "
                "the same weights would not compute the same"
            )


def _kind(checkpoint: Checkpoint) -> str:
    tied = ", tied" if checkpoint.config.tied else ""
    return f"{checkpoint.family.architecture} of {checkpoint.config.n_layers} layers{tied}"


def require_one_vocabulary(checkpoints: list[Checkpoint], given: list[ModelConfig]) -> None:
    """UserError, naming the embedding's row, where the same id is another text in two models.

    A folder without a tokenizer is taken to have the others'; what differs in how text is cut is a warning.
    """
    known: list[tuple[Checkpoint, Tokenizer]] = []
    for checkpoint, model in zip(checkpoints, given, strict=True):
        if tokenizer_files.has_files(checkpoint.folder):
            known.append((checkpoint, tokenizers.for_model(model)))
    for checkpoint, tokenizer in known[1:]:
        first, ours = known[0]
        embedding = next(t.name for t in first.family.tensors(first.config) if t.embedding)
        size = max(ours.vocab_size, tokenizer.vocab_size)
        for row, (a, b) in enumerate(zip(_padded(ours, size), _padded(tokenizer, size), strict=True)):
            if a != b:
                raise UserError(
                    f"{checkpoint.folder}: row {row} of {embedding} stands for {_text(b)}, in {first.folder} for "
                    f"{_text(a)}; only models of one vocabulary can be merged"
                )
        if tokenizer.text_fingerprint != ours.text_fingerprint:
            warn(f"{checkpoint.folder}: its tokenizer has the tokens of {first.folder}'s but does not work quite alike")


def _padded(tokenizer: Tokenizer, size: int) -> list[bytes | None]:
    return tokenizer.canonical_bytes + [None] * (size - tokenizer.vocab_size)


def _text(piece: bytes | None) -> str:
    return "no text" if piece is None else repr(piece.decode("utf-8", "backslashreplace"))


def write(
    folder: Path,
    like: Checkpoint,
    tokenizer_from: Path,
    dtypes: dict[str, Any],
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int = export.MAX_SHARD_BYTES,
) -> None:
    """A Hugging Face folder with the tensors of `like`: `tensor(name)` gives each, of dtype `dtypes[name]`.

    Tensors are asked for in the order of `like` and written at once. config.json is that of `like`.
    """
    tensors = []
    for name, stored in like.tensors.items():
        dtype = np.dtype(dtypes[name])
        tensors.append((name, math.prod(stored.shape) * dtype.itemsize, (stored.shape, dtype)))
    export.write_weights(folder, tensors, partial(_write_file, tensor=tensor), max_shard_bytes)
    kinds = {str(np.dtype(dtype)) for dtype in dtypes.values()}
    kind = {"dtype": kinds.pop()} if len(kinds) == 1 else {}
    export.write_rest(folder, like.hf_config | kind, like.family, tokenizer_from)


def _write_file(
    path: Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]], tensor: Callable[[str], np.ndarray]
) -> None:
    """A safetensors file, tensor by tensor; the library's own writer wants all of them in memory.

    The format (https://github.com/huggingface/safetensors): a little-endian u64 of the header's length, the header in
    JSON, padded with spaces so that the data begins at a multiple of 8, the tensors' bytes at the offsets it names.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        kind = _DTYPE_NAMES[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in tensors.items():
            array = np.ascontiguousarray(tensor(name))
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name}: {array.shape} {array.dtype} instead of {shape} {dtype}")
            file.write(array.reshape(-1).view(np.uint8).data)

"""Model folders: a local folder or a hub name, its configuration, and its weight files as lazy arrays."""

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fusejax import hub, outputs
from fusejax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SMALL_FILES = ["config.json", "generation_config.json", *TOKENIZER_FILES]
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_TORCH = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_HASHED_WHOLE = 256 << 20  # bytes; larger weight files are hashed by samples


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `read()` gives its numpy array, mapped rather than copied.

    `release()` gives the memory of the file's mapping back, until it is read again; PyTorch's files keep it.
    `dtype` is None where it is none that parameters have, and then it cannot be read; `stored_as` names it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: Any
    stored_as: str
    read: Callable[[], np.ndarray]
    release: Callable[[], None] = lambda: None


def local_folder(path_or_repo: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: a local one as it is, a hub name after downloading what is needed of it.

    The hub's cache, mirror and token are set by huggingface_hub's own environment variables. Raises UserError for
    a missing folder, for a revision of a local one, and for a hub that cannot be reached or does not have the model.
    """
    path = Path(path_or_repo).expanduser()
    if not str(path_or_repo):
        raise UserError("model: should be a folder or a hub name, not ''")
    if path.is_dir():
        hub.refuse_revision(path, revision)
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; a model is a folder with config.json and model.safetensors")
    name = str(path_or_repo)
    if isinstance(path_or_repo, Path) or hub.is_local(name):
        raise UserError(f"{name}: no such folder")
    folder = _download(name, revision, _SMALL_FILES + (_SAFETENSORS if weights else []))
    if weights and not any(folder.glob("*.safetensors")):
        folder = _download(name, revision, _SMALL_FILES + _TORCH)
    return folder


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub name in the hub's cache where its config.json is there; nothing is asked of the hub."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{name} (revision {revision})" if revision else name
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=10)
        )
    except errors.GatedRepoError:
        raise UserError(f"{where}: the hub asks for its licence to be accepted there, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: the hub has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: neither a folder here nor a model that the hub shows you") from None
    except errors.HFValidationError:
        raise UserError(f"{name}: no such folder, and not a hub name (OWNER/NAME)") from None
    except (OSError, errors.HfHubHTTPError) as error:
        if getattr(error, "errno", None) in (13, 28, 30, 122):
            raise outputs.writing_failed(getattr(error, "filename", None) or "the hub's cache", error) from None
        hub.require_reachable(name, "model")
        raise UserError(f"{where}: the hub does not give it ({str(error).splitlines()[0]})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError, naming the file, where it is not one."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder holds config.json and model.safetensors") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold a JSON object")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in transformers' order of preference; UserError where there are none."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _indexed_files(index)
    raise UserError(
        f"{folder}: holds no weights; expected model.safetensors, model.safetensors.index.json with its shards, "
        f"or pytorch_model.bin"
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files")
    names = set(map(str, weight_map.values()))
    files = [index.parent / name for name in sorted(names)]
    for file in files:
        if file.parent != index.parent:
            raise UserError(f"{index}: names {file}, which should be a file of its own folder")
        if not file.is_file():
            raise UserError(f"{index}: names {file.name}, which is not there")
    return files


def tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weight files by name; nothing is read yet.

    Raises UserError for a file that cannot be read, a tensor that two files hold, and one that the index has and its
    file has not.
    """
    files, found = weight_files(folder), dict[str, StoredTensor]()
    for file in files:
        for name, tensor in (_safetensors if file.suffix == ".safetensors" else _torch)(file).items():
            if name in found:
                raise UserError(f"{file}: tensor {name} is duplicate: {found[name].file.name} holds it too")
            found[name] = tensor
    index = folder / f"{'model.safetensors' if files[0].suffix == '.safetensors' else 'pytorch_model.bin'}.index.json"
    if files[0].name not in ("model.safetensors", "pytorch_model.bin"):
        for name, file_name in read_json(index)["weight_map"].items():
            if name not in found or found[name].file.name != file_name:
                raise UserError(f"{folder / file_name}: tensor {name} is missing, though {index.name} names it")
    return found


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    """Views into the mapped file: a shard on a device reads its own part of a tensor only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks the header against the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); copy or download it again") from None

    def stored(entry: dict[str, Any]) -> StoredTensor:
        shape, begin = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        dtype = DTYPES.get(entry["dtype"])
        read = lambda: np.frombuffer(mapped, dtype, math.prod(shape), begin).reshape(shape)  # noqa: E731
        return StoredTensor(path, shape, dtype, entry["dtype"], read, release)

    def release() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    return {name: stored(entry) for name, entry in header.items() if name != "__metadata__"}


def _torch(path: Path) -> dict[str, StoredTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading PyTorch's own format needs torch: `pip install torch`, or convert the model to "
            f"safetensors with transformers' save_pretrained"
        ) from None
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as PyTorch weights ({reason})") from None
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise UserError(f"{path}: should hold tensors by name, as save_pretrained writes them")

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def read(value: Any) -> np.ndarray:
        if value.dtype == torch.bfloat16:
            return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.detach().numpy()

    def stored(value: Any) -> StoredTensor:
        kind = names.get(value.dtype, str(value.dtype))
        return StoredTensor(path, tuple(value.shape), DTYPES.get(kind), kind, partial(read, value))

    return {name: stored(value) for name, value in values.items()}


def weights_fingerprint(folder: Path) -> str:
    """16 hex digits over the weight files: all bytes, or of a large file its size and 64 samples of 1 MiB.

    Training changes every tensor, so samples tell two models apart without reading all of them at each start.
    """
    return outputs.fingerprint([_file_fingerprint(file) for file in weight_files(folder)])


def _file_fingerprint(path: Path) -> str:
    size = path.stat().st_size
    if size <= _HASHED_WHOLE:
        return outputs.file_fingerprint(path)
    parts = []
    with path.open("rb") as file:
        for offset in np.linspace(0, size - (1 << 20), 64).astype(int).tolist():
            file.seek(offset)
            parts.append(outputs.fingerprint(file.read(1 << 20)))
    return outputs.fingerprint([size, *parts])

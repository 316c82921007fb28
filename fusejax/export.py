"""A decoder as a Hugging Face folder: safetensors, config.json, tokenizer."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fusejax import outputs, paths
from fusejax.errors import UserError
from fusejax.models import convert, families, files
from fusejax.models.decoder import Decoder
from fusejax.progress import warn

MAX_SHARD_BYTES = 5 * 10**9

# The dtype's older key, code of the hub's that the class in transformers replaces, and where the model came from.
_DROPPED = ("torch_dtype", "auto_map", "_name_or_path", "transformers_version")

MARKER = "fusejax.json"  # in an exported or merged folder: what it was made from
_REPLACED = ("config.json", "generation_config.json", MARKER, *files.TOKENIZER_FILES)
# What save_pretrained and `write_weights` call weights, and nothing else: model-backup.safetensors is the user's.
_PART = r"(-\d+-of-\d+)?"
_WEIGHTS = re.compile(
    rf"model{_PART}\.safetensors|pytorch_model{_PART}\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
T = TypeVar("T")


def save(
    model: Decoder,
    hf_config: dict[str, Any],
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `model` so that transformers' AutoModelForCausalLM and `fusejax.load` read it.

    hf_config: the config.json that the model came from (or `models.hf_config`). tokenizer_from: the model whose
    tokenizer and generation configuration go along. The folder appears whole or not at all, and takes the
    place of a model that is there. Above `max_shard_bytes` the weights are split, with an index. Returns the folder.
    """
    family = families.find(hf_config, "hf_config")
    if families.decoder_config(hf_config, "hf_config") != model.config:
        raise UserError(f"{folder}: hf_config describes another model than the one to export")
    missing = family.unknown_to_transformers(model.config)
    if missing:
        warn(f"{folder}: transformers' {family.architecture} leaves out {', '.join(missing)}; fusejax reads it right")
    folder = paths.at(folder)
    tokenizer = files.local_folder(tokenizer_from, weights=False) if tokenizer_from is not None else None
    if jax.process_index() > 0:
        for _, _, read in convert.stored_tensors(model, family, dtype):
            read()  # takes part in gathering what the first process writes
        return folder
    tensors = [
        (name, math.prod(shape) * jnp.dtype(dtype).itemsize, read)
        for name, shape, read in convert.stored_tensors(model, family, dtype)
    ]
    with written(folder) as temporary:
        write_weights(temporary, tensors, _save_file, max_shard_bytes)
        write_rest(temporary, hf_config | {"dtype": dtype}, family, tokenizer)
    return folder


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` at the end of the block, or is removed after an error.

    A model in a bucket is sent file by file, config.json last: without it there is none.
    """
    if paths.is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="fusejax-") as made:
            yield Path(made)
            _send(Path(made), folder)
        return
    require_place(folder)
    folder = folder.resolve()  # a link stays one, and `x/..` has a name
    temporary = outputs.make_folder(folder.parent) / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir()
        yield temporary
        _replace(folder, temporary)
    except OSError as error:
        raise outputs.writing_failed(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_place(folder: Path) -> None:
    """UserError where no folder of a model can come to lie."""
    outputs.require_writable(folder / "config.json", "choose another `output`, or make it writable")
    if os.path.ismount(folder):
        raise UserError(
            f"{folder}: is a mount point, which cannot be renamed; choose another `output`, such as one in it"
        )


def of_a_model(folder: Path) -> list[str]:
    """Names of weights (also a user's own), of a configuration or a tokenizer that a folder holds, sorted."""
    return sorted(
        name
        for name in paths.names(folder)
        if name in _REPLACED or name.endswith((".safetensors", ".bin", ".index.json"))
    )


def is_whole(folder: Path) -> bool:
    """Whether a folder holds the weights that its config.json describes, by the headers of the files alone."""
    try:
        hf_config, where = files.read_json(folder / "config.json"), str(folder / "config.json")
        if paths.is_remote(folder):  # where a file is there as a whole or not at all
            return bool(files.weight_files(folder))
        config = families.decoder_config(hf_config, where)
        convert.match(folder, families.find(hf_config, where), config, headers_only=True)
    except UserError:
        return False
    return True


def made_from(folder: Path) -> dict[str, Any]:
    """What an exported or merged folder says that it was made from; nothing where it cannot be read."""
    try:
        found = json.loads((folder / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, int, T]],
    write: Callable[[Path, dict[str, T]], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """model.safetensors, or shards of at most so many bytes (but at least a tensor) with an index.

    tensors: (name, bytes, what `write` needs to know of it). write: makes one file of the tensors of one shard.
    """
    shards: list[dict[str, T]] = [{}]
    total = room = 0
    for name, size, tensor in tensors:
        if shards[-1] and room < size:
            shards.append({})
        room = (room if shards[-1] else max_shard_bytes) - size
        total += size
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_rest(folder: Path, hf_config: dict[str, Any], family: families.Family, tokenizer: Path | None) -> None:
    """What goes with the weights: config.json, and the tokenizer's and generation's files of the folder `tokenizer`."""
    config = {key: value for key, value in hf_config.items() if key not in _DROPPED}
    config |= {"architectures": [family.architecture], "model_type": family.model_type}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name in (*files.TOKENIZER_FILES, "generation_config.json"):
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def _save_file(path: Path, tensors: dict[str, Callable[[], np.ndarray]]) -> None:
    """All tensors of the file are held in memory."""
    try:
        save_file({name: read() for name, read in tensors.items()}, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # the library makes files that only their owner may read
    except SafetensorError as error:  # holds the system's error as text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from None


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _send(made: Path, folder: Path) -> None:
    """Put the model in `made` into a bucket, in the place of one that is there; anything else stays."""
    try:
        for name in sorted(paths.names(folder), key=lambda name: name != "config.json"):
            if name in _REPLACED or _WEIGHTS.fullmatch(name):
                (folder / name).unlink()
        for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
            paths.send(file, folder / file.name)
    except OSError as error:
        raise outputs.writing_failed(folder, error) from None


def _replace(folder: Path, temporary: Path) -> None:
    """Rename `temporary` to `folder`; the model that was there is deleted after that, anything else stays."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():  # of a run that was killed in here: it may hold what should stay
        if folder.exists():
            _move_others(old, folder)
        else:
            os.rename(old, folder)
    if not folder.exists():
        os.rename(temporary, folder)
        return
    os.rename(folder, old)
    os.rename(temporary, folder)
    _move_others(old, folder)


def _move_others(old: Path, folder: Path) -> None:
    """Move all but a model from `old` to `folder` and remove `old`."""
    for entry in old.iterdir():
        if entry.name not in _REPLACED and not _WEIGHTS.fullmatch(entry.name):
            os.rename(entry, folder / entry.name)
    shutil.rmtree(old)

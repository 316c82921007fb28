"""Where a job's files lie: in folders of this machine, or in buckets, as far as etils.epath knows them (gs://, s3://).

A path of this machine is a pathlib.Path. An address with a scheme is an etils.epath.Path, which has pathlib's methods
and takes what the user has installed for it: gcsfs for gs://, s3fs for s3://, or TensorFlow. A bucket has no locks, no
links, no appending, and a renaming that copies; but an object of it is there when all of it has come, and not before.
So files are made on this machine and sent, and files that a library must open are fetched first.
"""

import contextlib
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from fusejax.errors import UserError

_BLOCK = 4 << 20
_PROTOCOLS = ("gs", "gcs", "s3", "s3a", "az", "abfs", "hf")  # fsspec's names


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a bucket."""
    return "://" in os.fspath(path)


def at(path: str | os.PathLike) -> Path:
    """The path, of this machine or in a bucket; UserError for what can be neither."""
    if "\0" in os.fspath(path):
        raise UserError(f"{os.fspath(path)!r}: a path cannot hold the character 0")
    if not is_remote(path):
        _refuse_one_slash(os.fspath(path))
        return Path(path)
    from etils import epath

    _distrust_listings()
    try:
        return cast(Path, epath.Path(os.fspath(path)))
    except KeyError:
        raise UserError(
            f"{path}: should be a folder, or an address that begins with gs://, s3://, az:// or hf://"
        ) from None


def _refuse_one_slash(path: str) -> None:
    """UserError for `gs:/bucket`, which a folder of that name would be made for."""
    kind, colon, rest = path.partition(":")
    if colon and kind in _PROTOCOLS:
        raise UserError(f"{path}: an address begins with {kind}://, as in {kind}://{rest.lstrip('/')}")


@functools.cache
def _distrust_listings() -> None:
    """Other processes write to a bucket too, so what fsspec saw there before says nothing."""
    import fsspec

    for protocol in _PROTOCOLS:
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def check(path: Path) -> None:
    """UserError where `path` is in a bucket that cannot be reached from here, or only with something not installed."""
    if is_remote(path):
        _check_bucket("/".join(os.fspath(path).split("/")[:3]))


@functools.cache
def _check_bucket(address: str) -> None:
    try:
        at(address).exists()
    except Exception as error:  # of what type depends on the library that knows this kind of bucket
        raise UserError(f"{address}: cannot be reached from here ({one_line(error)})") from None


def require_checkpoints(path: Path) -> None:
    """UserError where orbax cannot write checkpoints: in any bucket but Google's."""
    if is_remote(path) and not str(path).startswith("gs://"):
        raise UserError(
            f"{path}: checkpoints go to folders and to gs://; mount this bucket as a folder, or choose another `output`"
        )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A file of this machine that becomes `path` at the end of the block: whole, or after an error not at all.

    Raises OSError where it cannot, whatever the library that writes to a bucket raises. Makes the folder.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="fusejax-") as folder:
            file = Path(folder) / path.name
            yield file
            send(file, path)
        return
    file = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")  # containers on several hosts share process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield file
        os.replace(file, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it may not be there, nor its folder
            file.unlink(missing_ok=True)
        raise


def send(file: Path, to: Path) -> None:
    """Copy a file of this machine to a path in a bucket; OSError where that fails, and then there is nothing."""
    try:
        with file.open("rb") as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        if (sent := size(to)) != size(file):
            raise OSError(f"{sent} of {size(file)} bytes arrived")
    except Exception as error:  # see _check_bucket
        with contextlib.suppress(Exception):
            to.unlink(missing_ok=True)
        raise OSError(one_line(error)) from None


def fetch(path: Path, to: Path) -> None:
    """Copy a file in a bucket to a path of this machine, whole or not at all; OSError where that fails."""
    with staged(to) as file:
        try:
            with path.open("rb") as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, _BLOCK)
        except OSError:
            raise
        except Exception as error:  # see _check_bucket
            raise OSError(one_line(error)) from None


def local_folder(path: Path, name: str) -> contextlib.AbstractContextManager[Path]:
    """The folder itself, or of one in a bucket a copy called `name` of its files, as long as the block lasts."""
    return _fetched(path, name) if is_remote(path) else contextlib.nullcontext(path)


@contextlib.contextmanager
def _fetched(path: Path, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fusejax-") as folder:
        copy = Path(folder) / name
        for entry in names(path):
            fetch(path / entry, copy / entry)
        yield copy


def size(file: Path) -> int:
    """Bytes of a file."""
    found = file.stat()
    return found.length if is_remote(file) else found.st_size  # type: ignore[attr-defined]


def names(folder: Path) -> set[str]:
    """What a folder holds; nothing where there is none."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that it holds, if it is there."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)  # type: ignore[attr-defined]
    elif folder.exists():
        shutil.rmtree(folder)

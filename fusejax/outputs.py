"""What a job writes: files whole or not at all, folders held by one job, and what each was made from."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fusejax import paths
from fusejax.errors import UserError

Inputs = Mapping[str, str | int | float | bool | None]


def fingerprint(value: Any) -> str:
    """16 hex digits that tell two values apart: bytes, or anything that JSON can hold (keys in any order)."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
    return sha256(value).hexdigest()[:16]


ANOTHER_PATH = "choose another path, or make it writable"  # remedy for a file that the user names by an option


def file_fingerprint(path: str | os.PathLike) -> str:
    """16 hex digits over a file's bytes."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def write_atomically(path: str | os.PathLike, data: str | bytes, remedy: str = "") -> None:
    """Write a whole file or nothing; a full disk or a read-only folder is a UserError (remedy: `writing_failed`'s)."""
    path = paths.at(path)
    try:
        if not paths.is_remote(path):
            _require_regular(path)
        with paths.staged(path) as file:
            file.write_bytes(data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise writing_failed(path, error, remedy) from None


def require_writable(path: str | os.PathLike, remedy: str = "choose another path") -> None:
    """UserError where a file can be seen not to be writable, for whoever writes it after hours."""
    path = paths.at(path)
    if paths.is_remote(path):
        paths.check(path)
        return
    try:
        _require_regular(path)
        there = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "")
        longest = max([*(len(os.fsencode(part)) for part in path.parts), len(os.fsencode(path.name)) + _STAGED])
        if 0 < os.pathconf(there, "PC_NAME_MAX") < longest:
            raise OSError(errno.ENAMETOOLONG, "")
        with tempfile.TemporaryFile(dir=there):  # root is told that it may write anywhere, also in /proc
            pass
    except OSError as error:
        raise writing_failed(path, error, remedy) from None


_STAGED = len("..tmp-") + 12  # characters that `paths.staged` adds to a file's name


def _require_regular(path: Path) -> None:
    """OSError where something other than a file is at `path`: renaming a file to /dev/null would take its place."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "")
    # /dev/stdout leads to a file where output is redirected, but it is a link of the system's.
    folder = Path(os.path.realpath(path.parent))
    if not stat.S_ISREG(mode) or (path.is_symlink() and (folder == Path("/dev") or folder.is_relative_to("/proc"))):
        raise OSError("is no regular file")


def writing_failed(path: str | os.PathLike, error: Exception, remedy: str = "") -> UserError:
    """What went wrong with writing `path`, and what would be right.

    error: an OSError, or what a library made of one; of its text only the system's own words are kept. remedy: what
    would be right where that is neither space nor another `output`.
    """
    number = getattr(error, "errno", None)
    text = str(error)
    if number is None:
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS) if os.strerror(n) in text), 0)
    advice = {
        errno.ENOSPC: "free some space and run the same command again",
        errno.EDQUOT: "free some of your quota and run the same command again",
    }
    advised = advice.get(number, remedy or "choose another `output`, or make it writable")
    reason = os.strerror(number) if number else text.strip().partition("\n")[0][:200]
    return UserError(f"{path}: cannot be written ({reason}): {advised}")


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold an output folder: UserError where another job writes to it. A job's death lets go of it.

    A folder that was not there and in which nothing came to lie is gone again afterwards.

    One in a bucket, where nothing can be held, is only seen to be within reach.
    """
    if paths.is_remote(folder):
        paths.check(paths.at(folder))
        yield
        return
    made = not os.path.exists(folder)  # pathlib's raises for a name that is too long
    path = make_folder(folder) / ".lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise writing_failed(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip()
            raise UserError(
                f"{folder}: another job (process {who or 'unknown'}) is writing there; wait for it, or choose another "
                "`output`"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # somebody else removed it: no reason to hide why this ends
                if made and os.listdir(folder) == [path.name]:
                    path.unlink()
                    Path(folder).rmdir()


def require_space(folder: str | os.PathLike, size: int) -> None:
    """UserError unless `size` bytes fit on the folder's disk, for libraries that take a full disk badly."""
    if paths.is_remote(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < size:
        reason = f"needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise UserError(f"{folder}: the disk is full ({reason}): free some space and run the same command again")


def make_folder(path: str | os.PathLike) -> Path:
    """The folder, made where it is missing (a bucket needs none); UserError where it cannot be."""
    folder = paths.at(path)
    try:
        if not paths.is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(path, error) from None
    return folder


def check_inputs(
    folder: Path,
    made_from: Inputs,
    wanted: Inputs,
    remedy: str = "",
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """UserError, naming every input that differs, unless the folder was made from what is wanted.

    defaults: of dotted keys. One that is not recorded, though others of its section are, was not there yet when the
    folder was made, and did what its default does.
    """
    sections = {key.rpartition(".")[0] for key in made_from}
    younger = {k for k in wanted if k in defaults and k not in made_from and k.rpartition(".")[0] in sections}
    made_from = {**made_from, **{key: defaults[key] for key in younger}}
    differing = [key for key in {**made_from, **wanted} if made_from.get(key) != wanted.get(key)]
    if differing:
        details = ", ".join(f"{key} ({made_from.get(key)} there, {wanted.get(key)} now)" for key in differing)
        remedy = remedy or "remove that folder to make it anew, or choose another `output`"
        raise UserError(f"{folder}: was made with other settings: {details}; {remedy}")


_checker = functools.cache(TypeAdapter)  # a store can have thousands of notes of the same kinds


def read_object(
    path: Path, needed: Mapping[str, Any], remedy: str, optional: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any] | None:
    """The JSON object that a stage left in a file, None where there is no file.

    needed, optional: keys that it has or may have, with the types of their values, whatever pydantic can check:
    `dict[str, float]`. UserError with `remedy` where it is damaged.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    for key, kind in {**needed, **optional}.items():
        if key in optional and isinstance(found, dict) and key not in found:
            continue
        if not isinstance(found, dict) or key not in found:
            raise UserError(f"{path}: is damaged, it has no {key}; {remedy}")
        try:
            _checker(kind).validate_json(json.dumps(found[key]), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, (key, *first["loc"])))
            problem = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{path}: is damaged, {at}: {problem}; {remedy}") from None
    return found

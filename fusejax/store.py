"""The on-disk format of everything made per document: documents, tokens, source rows, row maps.

A *store* is a folder with `manifest.json` and ArrayRecord shards that hold a fixed number of documents each, in
corpus order, so that record i is found in O(1) and a half-done store goes on at its first missing shard. Shards and
manifest are written to temporary names and renamed, or sent to a bucket, where nothing is there before it is whole
(see `fusejax.paths`): what has its final name is whole. Every record carries a checksum.
"""

import functools
import json
import math
import os
import tempfile
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusejax import paths
from fusejax.errors import UserError
from fusejax.outputs import (
    Inputs,
    check_inputs,
    make_folder,
    read_object,
    require_space,
    write_atomically,
    writing_failed,
)

FORMAT = 2
Record = Mapping[str, "np.ndarray | str | bytes"]


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of a store, None where there is none."""
    path = paths.at(folder) / "manifest.json"
    paths.check(path)
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove {folder} to make it anew") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not _is_whole(manifest):
        raise UserError(f"{path}: is not a store of format {FORMAT}; remove {folder} to make it anew")
    return manifest


def _is_whole(manifest: dict[str, Any]) -> bool:
    kinds = {"inputs": dict, "summary": dict, "n_records": int, "shard_records": int, "complete": bool}
    return all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()) and manifest["shard_records"] > 0


class StoreWriter:
    """Writes a store shard by shard; goes on with what an interrupted run left.

    inputs: flat values (fingerprints, settings) that determine the contents. A folder made from other inputs is
    refused with a UserError that names what differs.
    """

    def __init__(self, folder: str | os.PathLike, inputs: Inputs, n_records: int, shard_records: int = 64) -> None:
        self.folder = paths.at(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            make_folder(self.folder)
            manifest = {
                "format": FORMAT,
                "inputs": dict(inputs),
                "n_records": n_records,
                "shard_records": shard_records,
                "complete": False,
                "summary": {},
            }
            write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=1))
        check_inputs(self.folder, manifest["inputs"], inputs)
        if manifest["n_records"] != n_records:
            raise UserError(
                f"{self.folder}: holds {manifest['n_records']} documents, now there are {n_records}; "
                "remove that folder to make it anew"
            )
        self._manifest = manifest
        # A damaged shard that its user removed is made again.
        self.done: bool = manifest["complete"] and not self.missing()

    @property
    def summary(self) -> dict[str, Any]:
        return self._manifest["summary"]

    def missing(self) -> list[tuple[int, range]]:
        """(shard, its record numbers) of every shard that is still to be written."""
        size, total = self._manifest["shard_records"], self._manifest["n_records"]
        spans = [(i, range(start, min(start + size, total))) for i, start in enumerate(range(0, total, size))]
        there = paths.names(self.folder)
        return [(i, span) for i, span in spans if _shard_path(self.folder, i).name not in there]

    def write(self, shard: int, records: Iterable[Record], note: Mapping[str, Any] | None = None) -> None:
        """Write one shard, whole or not at all; `note` (JSON) is kept beside it, see `notes`."""
        from array_record.python.array_record_module import ArrayRecordWriter

        path = _shard_path(self.folder, shard)
        start = shard * self._manifest["shard_records"]
        blobs = [_pack(record, number) for number, record in enumerate(records, start)]
        try:
            with paths.staged(path) as temporary:
                # The library may abort the process on a full disk, so ask first; the margin covers its framing.
                require_space(temporary.parent, sum(map(len, blobs)) + 65536 * (3 + len(blobs) // 64))
                with open(temporary, "wb"):  # a folder that cannot be written says so here
                    pass
                writer = ArrayRecordWriter(str(temporary), "group_size:1")
                for blob in blobs:
                    writer.write(blob)
                writer.close()
                if note is not None:  # first, so that no shard is without its note
                    write_atomically(path.with_suffix(".json"), json.dumps(note))
        except (OSError, RuntimeError) as error:
            raise writing_failed(path, error) from None

    def notes(self, needed: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The notes of all shards, in their order, whichever run wrote them; UserError for a damaged one.

        needed: see `outputs.read_object`.
        """
        found = sorted(name for name in paths.names(self.folder) if name[0].isdigit() and name.endswith(".json"))
        remedy = f"remove it and the shard beside it, which is made again, or all of {self.folder}"
        notes = [read_object(self.folder / name, needed, remedy) for name in found]
        return [note for note in notes if note is not None]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the store complete; `summary` (JSON) stays in its manifest."""
        missing = self.missing()
        if missing:
            raise ValueError(f"{self.folder}: {len(missing)} shards are still missing")
        for leftover in (name for name in paths.names(self.folder) if name.startswith(".") and ".tmp" in name):
            (self.folder / leftover).unlink(missing_ok=True)
        self._manifest.update(complete=True, summary=dict(summary))
        write_atomically(self.folder / "manifest.json", json.dumps(self._manifest, indent=1))
        self.done = True


class Store:
    """Random access to a complete store: `store[i]` is record i as {name: array, str or bytes}."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = paths.at(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UserError(f"{self.folder}: no store here; run {_maker(self.folder)} first")
        if not manifest["complete"]:
            raise UserError(f"{self.folder}: is not finished; run {_maker(self.folder)} again")
        self.inputs: dict[str, Any] = manifest["inputs"]
        self.summary: dict[str, Any] = manifest["summary"]
        self._n, self._shard_records = manifest["n_records"], manifest["shard_records"]
        self._starts = list(range(0, self._n, self._shard_records))
        self._copies = _Copies() if paths.is_remote(self.folder) else None

    def __len__(self) -> int:
        return self._n

    @property
    def n_shards(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._n:
            raise IndexError(i)
        shard = bisect_right(self._starts, i) - 1
        try:
            (blob,) = _open_shard(self, shard).read([i - self._starts[shard]])
            return _unpack(blob, i)
        except (ValueError, IndexError, RuntimeError, KeyError) as error:
            raise UserError(
                f"{_shard_path(self.folder, shard)}: record {i} is damaged ({error}); "
                f"remove this file and run {_maker(self.folder)} again"
            ) from None

    def __iter__(self) -> Any:
        return (self[i] for i in range(self._n))

    def shard_file(self, shard: int) -> Path:
        """A shard's file on this machine; one in a bucket is fetched when it is first asked for."""
        path = _shard_path(self.folder, shard)
        if self._copies is None:
            if not path.exists():
                raise UserError(f"{path}: is missing; remove {self.folder} and run {_maker(self.folder)} again")
            return path
        try:
            return self._copies.of(path)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; run {_maker(self.folder)} again") from None
        except OSError as error:
            reason = paths.one_line(error)
            raise UserError(f"{path}: cannot be fetched to {tempfile.gettempdir()} ({reason})") from None


class _Copies:
    """The files of a bucket that were asked for, on this machine's disk as long as this object lives."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fusejax-")
        self._lock = threading.Lock()

    def of(self, path: Path) -> Path:
        copy = Path(self._folder.name) / path.name
        with self._lock:
            if not copy.exists():
                paths.fetch(path, copy)
        return copy


@functools.lru_cache(maxsize=256)
def _open_shard(store: Store, shard: int) -> Any:
    """The reader of a shard. So many stay open in all: a process may open about a thousand files."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(store.shard_file(shard)), "readahead_buffer_size:0")


def _maker(folder: Path) -> str:
    """The command that makes the store in a folder of a job's output, by where the folder lies."""
    stages = {"data": "prepare", "sources": "sources", "alignment": "align"}
    stage = next((stages[part] for part in reversed(folder.parts[:-1]) if part in stages), None)
    return f"the stage that makes it (`fusejax {stage} CONFIG.yaml`)" if stage else "the stage that makes it"


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.array_record"


# A record: crc32 (started from the record's number, so that one in another's place is found out), header length, JSON
# header [[name, kind, shape]...], then the fields' bytes.


def _pack(record: Record, number: int) -> bytes:
    header, parts = [], []
    for name, value in record.items():
        if isinstance(value, str | bytes):
            data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            header.append([name, "str" if isinstance(value, str) else "bytes", [len(data)]])
        else:
            array = np.ascontiguousarray(value)
            data = array.tobytes()
            header.append([name, array.dtype.newbyteorder("<").str, list(array.shape)])
        parts.append(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    body = len(head).to_bytes(4, "little") + head + b"".join(parts)
    return zlib.crc32(body, number).to_bytes(4, "little") + body


def _unpack(blob: bytes, number: int) -> dict[str, Any]:
    if len(blob) < 8 or zlib.crc32(memoryview(blob)[4:], number) != int.from_bytes(blob[:4], "little"):
        raise ValueError("its checksum does not match")
    at = 8 + int.from_bytes(blob[4:8], "little")
    record: dict[str, Any] = {}
    for name, kind, shape in json.loads(blob[8:at]):
        if kind in ("str", "bytes"):
            size = shape[0]
            data = blob[at : at + size]
            record[name] = data.decode("utf-8", "surrogatepass") if kind == "str" else data
        else:
            dtype = np.dtype(kind)
            count = math.prod(shape)
            size = count * dtype.itemsize
            record[name] = np.frombuffer(blob, dtype, count, at).reshape(shape)
        at += size
    return record

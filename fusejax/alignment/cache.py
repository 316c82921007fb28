"""Token tables kept between jobs: they depend on two tokenizers alone, and take up to a minute.

The folder is $XDG_CACHE_HOME/fusejax/token_tables (by default ~/.cache/fusejax/token_tables); it may be removed at any
time. An entry is named by both tokenizers, the method, and the code that made it.
"""

import io
import os
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fusejax import canonical, tokenizers
from fusejax.alignment import mined, rows, tokens
from fusejax.alignment.rows import Tokens
from fusejax.alignment.tokens import TokenTable
from fusejax.errors import UserError
from fusejax.outputs import file_fingerprint, fingerprint, write_atomically
from fusejax.progress import warn

Sample = Iterable[tuple[Tokens, Tokens]] | None

DAMAGED = (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error)
"""What `unpack` raises for bytes that are not those of a whole table."""

_warned_of: set[Path] = set()


def folder() -> Path:
    """Where token tables are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fusejax" / "token_tables"


def token_table(
    target: tokenizers.Tokenizer, source: tokenizers.Tokenizer, method: str, columns: int, sample: Sample = None
) -> TokenTable:
    """`fusejax.alignment.token_table`, from the cache where it is there and whole; else made and put there.

    A table that depends on texts besides (`stats`) is always made.
    """
    if sample is not None:
        return tokens.token_table(target, source, method, columns, sample)
    key = fingerprint([target.fingerprint, source.fingerprint, method, columns, _code()])
    return cached(folder() / f"{key}.npz", lambda: tokens.token_table(target, source, method, columns))


@lru_cache(maxsize=1)
def _code() -> list[str]:
    """What token tables are made by."""
    files = [str(module.__file__) for module in (canonical, tokenizers, rows, tokens, mined)]
    return [version("tokenizers"), *map(file_fingerprint, files)]


def cached(path: Path, make: Callable[[], TokenTable]) -> TokenTable:
    """The table in `path`; where there is none, or a damaged one, `make()`, which is then written there."""
    try:
        return unpack(path.read_bytes())
    except DAMAGED:
        table = make()
    try:
        write_atomically(path, pack(table), "let XDG_CACHE_HOME name a folder that can be written, or make this one so")
    except UserError as error:  # the job itself does not need the cache
        if path.parent not in _warned_of:
            _warned_of.add(path.parent)
            warn(f"token tables are not kept between jobs: {error}")
    return table


def pack(table: TokenTable) -> bytes:
    """A token table as the bytes of a file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=table.ids, prefix_hash=table.prefix_hash)
    return buffer.getvalue()


def unpack(data: bytes) -> TokenTable:
    """A token table from `pack`'s bytes. Raises one of DAMAGED where they are not whole."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        table = TokenTable(arrays["ids"], arrays["prefix_hash"])
    for name, dtype in (("ids", np.int32), ("prefix_hash", np.uint32)):
        array = getattr(table, name)
        if array.dtype != dtype or array.shape != table.ids.shape or array.ndim != 2:
            raise ValueError(f"{name} should be {np.dtype(dtype)}[V_source, C], is {array.dtype}{list(array.shape)}")
    return table

"""`fusejax inspect`: what a store holds, in words and numbers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fusejax import paths
from fusejax.errors import UserError
from fusejax.progress import console, say
from fusejax.source_cache import decode
from fusejax.store import Store, read_manifest
from fusejax.tokenizers import Tokenizer

_CONTEXT = 12  # tokens shown before a row


def show(path: str, record: int, row: int | None = None) -> None:
    """Print a store's inputs, size, summary and one record; of a source's cache also one row in words.

    Raises UserError where there is no store, or no such record or row.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path}: no store here; a store is a folder with manifest.json, as runs/NAME/sources/NAME")
    files = [paths.at(path) / name for name in paths.names(paths.at(path)) if "." in name]
    with ThreadPoolExecutor(32) as pool:  # in a bucket each size is a request
        size = sum(pool.map(paths.size, files))
    store = Store(path) if manifest["complete"] and manifest["n_records"] else None
    if store is not None and not 0 <= record < len(store):
        raise UserError(f"{path}: has no record {record}; the last one is {len(store) - 1}")
    state = "complete" if manifest["complete"] else "not finished"
    say(f"{path}: {manifest['n_records']} documents, {size / 1e6:.1f} MB, {state}")
    table = Table("key", "value", title="made from / summary")
    for key, value in {**manifest["inputs"], **manifest["summary"]}.items():
        table.add_row(key, str(value))
    console.print(table)
    if store is None:
        return
    fields = Table("field", "type", "value", title=f"record {record}")
    for name, value in store[record].items():
        if isinstance(value, np.ndarray):
            kind = f"{value.dtype}{list(value.shape)}"
            text = np.array2string(value[:3], precision=3, max_line_width=100, threshold=60)
        else:
            kind, text = type(value).__name__, repr(value[:300])
        fields.add_row(name, kind, text + (" ..." if len(value) > len(value[:3]) and kind != "str" else ""))
    console.print(fields)
    if "ce" in store[record] and "ids" in store[record]:
        _show_row(store, record, row)


def _show_row(store: Store, record: int, row: int | None) -> None:
    """The text before a row, and the tokens that the source expects after it."""
    rows: dict[str, Any] = decode(store[record])
    n = len(rows["ce"])
    if not n:
        say(f"record {record} has no rows: the source gave no numbers on this document, or it has no text")
        return
    row = n // 2 if row is None else row
    if not 0 <= row < n:
        raise UserError(f"{store.folder}: record {record} has no row {row}; the last one is {n - 1}")
    tokenizer = _tokenizer(store)
    tokens = None
    tokens_folder = store.folder.parent.parent / "data/train/tokens" / str(store.inputs["tokenizer"])
    if read_manifest(tokens_folder):
        tokens = Store(tokens_folder)[record]["ids"]
    label = None if tokens is None else int(tokens[row + 1]) if row + 1 < len(tokens) else -1
    if tokens is not None and tokenizer is not None:
        before = b"".join(tokenizer.canonical_bytes[i] or b"" for i in tokens[max(row + 1 - _CONTEXT, 0) : row + 1])
        say(f"row {row} follows: {before.decode('utf-8', 'replace')!r}")
    table = Table("token", "id", "probability", "", title=f"record {record}, row {row}: CE {rows['ce'][row]:.3f} nats")
    for i, logprob in zip(rows["ids"][row].tolist(), rows["logprobs"][row].tolist(), strict=True):
        table.add_row(_spelling(tokenizer, i), str(i), f"{np.exp(logprob):.4f}", "the true next" if i == label else "")
    kept = float(np.exp(rows["logprobs"][row]).sum())
    table.add_row("all others", "", f"{max(1 - kept, 0.0):.4f}")
    console.print(table)
    if tokenizer is None:
        model = store.summary.get("model", "this cache")
        say(f"tokens are not spelled: the tokenizer of {model} is not to be found from here")


def _tokenizer(store: Store) -> Tokenizer | None:
    """The source's, where it still is where the cache says, and is the same."""
    model = str(store.summary.get("model", ""))
    if not Path(model).is_dir():
        return None
    for bos in ("auto", "never"):
        tokenizer = Tokenizer.load(model, bos=bos)
        if tokenizer.fingerprint == store.inputs["tokenizer"]:
            return tokenizer
    return None


def _spelling(tokenizer: Tokenizer | None, i: int) -> str:
    if tokenizer is None or i < 0:
        return "?"
    spelled = tokenizer.canonical_bytes[i] if i < len(tokenizer.canonical_bytes) else None
    return "(special)" if spelled is None else repr(spelled.decode("utf-8", "backslashreplace"))

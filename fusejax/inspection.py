"""`fusejax inspect`: what a store holds, in words and numbers."""

from pathlib import Path

import numpy as np
from rich.table import Table

from fusejax.errors import UserError
from fusejax.progress import console, say
from fusejax.store import Store, read_manifest


def show(path: str, record: int) -> None:
    """Print a store's inputs, size, summary and one record. Raises UserError where there is no store."""
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path}: no store here; a store is a folder with manifest.json, as runs/NAME/sources/NAME")
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    state = "complete" if manifest["complete"] else "not finished"
    say(f"{path}: {manifest['n_records']} documents, {size / 1e6:.1f} MB, {state}")
    table = Table("key", "value", title="made from / summary")
    for key, value in {**manifest["inputs"], **manifest["summary"]}.items():
        table.add_row(key, str(value))
    console.print(table)
    if not manifest["complete"] or not manifest["n_records"]:
        return
    store = Store(path)
    if not 0 <= record < len(store):
        raise UserError(f"{path}: has no record {record}; the last one is {len(store) - 1}")
    fields = Table("field", "type", "value", title=f"record {record}")
    for name, value in store[record].items():
        if isinstance(value, np.ndarray):
            kind = f"{value.dtype}{list(value.shape)}"
            text = np.array2string(value[:3], precision=3, max_line_width=100, threshold=60)
        else:
            kind, text = type(value).__name__, repr(value[:300])
        fields.add_row(name, kind, text + (" ..." if len(value) > len(value[:3]) and kind != "str" else ""))
    console.print(fields)

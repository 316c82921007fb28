"""`fusejax inspect STORE --verify`: every checksum of a store, and what must hold of a source's rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fusejax import paths
from fusejax.errors import UserError
from fusejax.progress import progress, say
from fusejax.source_cache import decode
from fusejax.store import Store, read_manifest

_MOST_SHOWN = 20
_MASS = 1e-3 + 1  # k roundings to float16 can add up to this


def verify(path: str) -> None:
    """Read every record of a store. Prints what is wrong, then raises UserError if anything was."""
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path}: no store here; a store is a folder with manifest.json, as runs/NAME/sources/NAME")
    store = Store(path)
    found = 0
    totals = {"records": 0, "rows": 0}
    for problem in _problems(store, totals):
        found += 1
        if found <= _MOST_SHOWN:
            say(problem)
    if found:
        raise UserError(f"{path}: {found} problems; remove the shards named above and run the stage again")
    rows = f", {totals['rows']} rows" if totals["rows"] else ""
    say(f"{path}: {totals['records']} records{rows}, every checksum right")


def _problems(store: Store, totals: dict[str, int]) -> Iterator[str]:
    expected = {f"{i:06d}.array_record" for i in range(store.n_shards)}
    for name in sorted({name for name in paths.names(store.folder) if name.endswith(".array_record")} - expected):
        yield f"{store.folder / name}: belongs to no record of the store"
    with progress(f"verify {store.folder.name}", len(store)) as bar:
        for i in range(len(store)):
            try:
                record = store[i]
            except UserError as error:
                yield str(error)
                continue
            totals["records"] += 1
            if "ce" in record and "ids" in record:
                wrong = row_problem(decode(record))
                totals["rows"] += len(record["ce"])
                if wrong:
                    yield f"{store.folder}: record {i}: {wrong}"
            bar.advance()
    said = store.summary.get("rows")
    whole = totals["records"] == len(store)
    if whole and isinstance(said, int) and said != totals["rows"]:
        yield f"{store.folder}: has {totals['rows']} rows, its manifest says {said}"


def row_problem(rows: dict[str, Any]) -> str:
    """What is wrong with a document's source rows (see `fusejax.source_cache.decode`); nothing: the empty string."""
    ids, logprobs, ce = rows["ids"], rows["logprobs"], rows["ce"]
    if not len(ids) == len(logprobs) == len(ce):
        return f"has {len(ids)} rows of ids, {len(logprobs)} of log-probabilities and {len(ce)} cross-entropies"
    probs = np.exp(logprobs.astype(np.float64))
    ordered = np.sort(ids, axis=-1)
    rules = {
        "log-probabilities that are not numbers": np.isnan(logprobs).any(-1),
        "a cross-entropy that is not a number or negative": ~(ce >= -1e-6) | np.isinf(ce),
        "log-probabilities above 0": (logprobs > 0).any(-1),
        "log-probabilities that are not in descending order": (logprobs[:, 1:] > logprobs[:, :-1] + 1e-6).any(-1),
        "probabilities that add up to more than 1": probs.sum(-1) > _MASS,
        "a token twice": ((np.diff(ordered, axis=-1) == 0) & (ordered[:, 1:] >= 0)).any(-1),
    }
    for what, where in rules.items():
        if where.any():
            return f"row {int(np.argmax(where))} has {what} ({int(where.sum())} rows in all)"
    return ""

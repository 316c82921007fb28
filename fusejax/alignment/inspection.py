"""`fusejax inspect alignment`: one text in two tokenizations, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from fusejax import tokenizers
from fusejax.alignment import cache
from fusejax.alignment.quality import KINDS, row_kinds
from fusejax.alignment.rows import Tokens, row_mapper
from fusejax.alignment.stage import read_token_table
from fusejax.alignment.tokens import TokenTable, table_columns
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.progress import console, say
from fusejax.source_cache import SourceCache, folder_of
from fusejax.store import Store, read_manifest
from fusejax.tokenizers import Tokenizer

_TOP = 3
_STYLES = dict(zip(KINDS, ("green", "green", "cyan", "red"), strict=True))


@dataclass(frozen=True)
class Line:
    """One row of the target.

    token: the target's; source_tokens: the source's that end with it or inside it; row: the source's row or -1; kind:
    see `quality.KINDS`; consumed: bytes; follows: the target's next token, "" after the last; images: (source token,
    what it becomes or None, its probability or None), most likely first, or the true next token alone without a cache.
    """

    token: str
    source_tokens: str
    row: int
    kind: str
    consumed: int
    follows: str
    images: list[tuple[str, str | None, float | None]]


def show_text(text: str, target: str, source: str, rows: str = "inside", tokens: str = "prefix") -> None:
    """Print a text in the tokenizers of two folders (or hub names); `stats` counts in the text itself."""
    target_tok, source_tok = Tokenizer.load(target), Tokenizer.load(source)
    sample = [(Tokens.of(target_tok, text), Tokens.of(source_tok, text))] if tokens == "stats" else None
    table = cache.token_table(target_tok, source_tok, tokens, table_columns(source_tok, rows), sample)
    _print(lines(text, target_tok, source_tok, table, rows), target, source)


def show_document(config: Config, document: str, source: str | None) -> None:
    """Print a document of a job (its number or its id) in the target's and a source's tokens.

    source: its name; default: the first that is not the target itself, whose rows are its own.
    With the source's cache the most likely tokens of each row are shown, else the true next one.
    """
    model = _source(config, source)
    documents = Store(config.folder / "data/train/documents")
    i = _number(documents, document)
    target_tok, source_tok = tokenizers.for_model(config.target), tokenizers.for_model(model)
    folder = config.folder / "alignment" / model.label
    if (folder / "manifest.json").exists() or config.alignment.tokens == "stats":
        table = read_token_table(folder)
    else:
        columns = table_columns(source_tok, config.alignment.rows)
        table = cache.token_table(target_tok, source_tok, config.alignment.tokens, columns)
    manifest = read_manifest(folder_of(config, model))
    source_rows = SourceCache.of(config, model)[i] if (manifest or {}).get("complete") else None
    record = documents[i]
    say(f"document {i} ({record['id']}), {len(record['text'].encode())} bytes")
    if "conversation" in record:
        say("a conversation: what the assistant says, as one document, without templates and the source's own rows")
        source_rows = None
    found = lines(record["text"], target_tok, source_tok, table, config.alignment.rows, source_rows)
    _print(found, config.target.label, model.label)


def _source(config: Config, name: str | None) -> ModelConfig:
    labels = [source.label for source in config.sources]
    if not labels:
        raise UserError("sources: the configuration has none, so there is nothing to align")
    if name is not None and name not in labels:
        raise UserError(f"--source {name}: no such source; there is {', '.join(labels)}")
    if name is not None:
        return config.sources[labels.index(name)]
    return next((source for source in config.sources if source.model != config.target.model), config.sources[0])


def _number(documents: Store, wanted: str) -> int:
    if wanted.isdigit() and int(wanted) < len(documents):
        return int(wanted)
    for i, record in enumerate(documents):
        if record["id"] == wanted:
            return i
    raise UserError(
        f"--document {wanted}: no such document in {documents.folder}; give an id, or a number below {len(documents)}"
    )


def lines(
    text: str,
    target_tok: Tokenizer,
    source_tok: Tokenizer,
    table: TokenTable,
    method: str,
    source_rows: Mapping[str, np.ndarray] | None = None,
) -> list[Line]:
    """What is shown of each target row of a text. source_rows: the source's cache record of it, if there is one."""
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    row_map_T2 = row_mapper(target_tok, source_tok, method)(text.encode(), target, source)
    kinds_T = row_kinds(target, source, row_map_T2)
    if source_rows is not None and len(source_rows["ce"]) != len(source.ids):
        source_rows = None  # the source gave no numbers there
    stops = np.searchsorted(source.boundaries, target.boundaries, side="right").tolist()
    if len(stops):
        stops[-1] = len(source.ids)
    result = []
    for t, (token, kind) in enumerate(zip(target.ids.tolist(), kinds_T.tolist(), strict=True)):
        row, consumed = row_map_T2[t].tolist()
        here = source.ids[stops[t - 1] if t else 0 : stops[t]].tolist()
        result.append(
            Line(
                target_tok.shown(token),
                " ".join(map(source_tok.shown, here)),
                row,
                KINDS[kind],
                consumed,
                target_tok.shown(int(target.ids[t + 1])) if t + 1 < len(target.ids) else "",
                _images(row, consumed, source, table, target_tok, source_tok, source_rows),
            )
        )
    return result


def _images(
    row: int,
    consumed: int,
    source: Tokens,
    table: TokenTable,
    target_tok: Tokenizer,
    source_tok: Tokenizer,
    source_rows: Mapping[str, np.ndarray] | None,
) -> list[tuple[str, str | None, float | None]]:
    """The first few tokens of a source's row that go on as the text does, and what they become."""
    if row < 0:
        return []
    label = int(source.ids[row + 1]) if row + 1 < len(source.ids) else None
    ids, probs = [] if label is None else [label], np.ones(1)
    if source_rows is not None:
        ids, probs = source_rows["ids"][row].tolist(), np.exp(source_rows["logprobs"][row].astype(np.float64))
    found: list[tuple[str, str | None, float | None]] = []
    for v, p in zip(ids, probs.tolist(), strict=False):
        if not 0 <= v < len(table.ids) or (consumed and label is None):
            continue
        if consumed and table.prefix_hash[v, consumed] != table.prefix_hash[label, consumed]:
            continue
        image = int(table.ids[v, consumed])
        shown = target_tok.shown(image) if image >= 0 else None
        found.append((source_tok.shown(v), shown, None if source_rows is None else p))
        if len(found) == _TOP:
            break
    return found


def _print(found: list[Line], target: str, source: str) -> None:
    aligned = sum(line.row >= 0 for line in found)
    n = max(len(found), 1)
    table = Table()
    for header in ("", target, source, "row", "how", "next", "source expects → becomes"):
        table.add_column(Text(header.rstrip("/").rsplit("/", 1)[-1]))
    for t, line in enumerate(found):
        how = line.kind + (f" (+{line.consumed})" if line.consumed else "")
        style = _STYLES[line.kind]
        table.add_row(
            str(t),
            Text(line.token),
            Text(line.source_tokens),
            str(line.row) if line.row >= 0 else "",
            Text(how, style),
            Text(line.follows),
            _shown_images(line),
        )
    console.print(table)
    say(f"{aligned} of {len(found)} rows aligned ({aligned / n:.1%}); (+n): n bytes of the source's token are consumed")


def _shown_images(line: Line) -> Text:
    shown = Text()
    for k, (token, image, p) in enumerate(line.images):
        shown.append("   " if k else "")
        style = "green" if image is not None and image == line.follows else "red" if image is None else ""
        shown.append(f"{token} → {'nothing' if image is None else image}", style)
        shown.append("" if p is None else f" {p:.2f}", "dim")
    return shown

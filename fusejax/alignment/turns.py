"""Alignment of conversations: each turn of the assistant like a document, between two models' chat templates.

A row map's entries are rows of whole conversations. Rows outside the turns have no source. The row before a turn, in
which a model is about to speak, is the other model's where both begin with the turn's first byte (a template's space
may be part of a token); the row of a turn's last token, which predicts its end, where both templates end it there.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fusejax.alignment.rows import NO_ROW, Tokens
from fusejax.conversations import Turn, turns_of
from fusejax.tokenizers import Tokenizer

MapRows = Callable[[bytes, Tokens, Tokens], np.ndarray]


class View(NamedTuple):
    """A turn in two models' tokens, the token before it included, whose boundary is 0.

    data: the turn's text. target, source: the tokens; target_rows, source_rows: where they stand in the conversation.
    """

    data: bytes
    target: Tokens
    source: Tokens
    target_rows: slice
    source_rows: slice

    def local(self, row_map_T2: np.ndarray) -> np.ndarray:
        """A conversation's row map, of this turn's rows alone."""
        rows_T2 = row_map_T2[self.target_rows].copy()
        mapped = rows_T2[:, 0] >= 0
        rows_T2[mapped, 0] -= self.source_rows.start
        return rows_T2

    def said(self) -> tuple[Tokens, Tokens]:
        """The tokens without the one before the turn."""
        return tuple(Tokens(each.ids[1:], each.boundaries[1:]) for each in (self.target, self.source))  # type: ignore[return-value]


def views(text: str, target: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[View]:
    """Every turn of a conversation, its text and its records of tokens given."""
    data = text.encode("utf-8")
    for ours, theirs in zip(turns_of(target), turns_of(source), strict=True):
        (target_tokens, target_rows), (source_tokens, source_rows) = _tokens(target, ours), _tokens(source, theirs)
        yield View(data[ours.low : ours.high], target_tokens, source_tokens, target_rows, source_rows)


def _tokens(record: Mapping[str, Any], turn: Turn) -> tuple[Tokens, slice]:
    rows = slice(turn.first - 1, turn.end)
    return Tokens(record["ids"][rows], record["boundaries"][rows] - turn.low), rows


def map_turns(
    text: str,
    target: Mapping[str, Any],
    source: Mapping[str, Any],
    tokenizers: tuple[Tokenizer, Tokenizer],
    map_rows: MapRows,
) -> np.ndarray:
    """int32 [n_target, 2]: the row map of a conversation. tokenizers: the target's and the source's."""
    rows_T2 = np.full((len(target["ids"]), 2), NO_ROW, np.int32)
    rows_T2[:, 1] = 0
    turns = zip(turns_of(target), turns_of(source), strict=True)
    for view, (ours, theirs) in zip(views(text, target, source), turns, strict=True):
        said_T2 = map_rows(view.data, *view.said()).copy()
        said_T2[said_T2[:, 0] >= 0, 0] += theirs.first
        if ours.stop != ours.end + 1 or theirs.stop != theirs.end + 1:
            said_T2[-1] = (NO_ROW, 0)
        rows_T2[ours.first : ours.end] = said_T2
        begin = zip(tokenizers, (view.target.ids[1], view.source.ids[1]), strict=True)
        if all(view.data.startswith(tokenizer.canonical_bytes[i] or b"\0") for tokenizer, i in begin):
            rows_T2[ours.first - 1, 0] = theirs.first - 1
    return rows_T2

"""Row maps: which row of the source stands for each row of the target.

Row t of a model is its distribution of token t+1 given tokens 0..t. Two rows are comparable where they condition on
the same text, that is where their tokens end at the same byte of it. A row map needs only the text's bytes and the two
tokenizations, as ids and byte boundaries, never the models.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fusejax.tokenizers import Tokenizer

METHODS = ("exact", "mined", "boundary", "inside")
MAX_CONSUMED = 31
"""How deep inside a source token a target row may stand; deeper rows fall back (it bounds the token tables)."""

NO_ROW = -1


@dataclass(frozen=True)
class Tokens:
    """A text in one tokenizer: ids int32[n] and byte boundaries int32[n], as `Tokenizer.encode` gives them."""

    ids: np.ndarray
    boundaries: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> "Tokens":
        return cls(*tokenizer.encode(text))


def row_map(text: str, target_tok: Any, source_tok: Any, method: str = "inside") -> np.ndarray:
    """int32[n_target, 2]: for each target token of `text` the source row to use or -1, and the bytes already consumed.

    text: a document. target_tok, source_tok: `fusejax.tokenizers.Tokenizer`, tokenizers of transformers, model folders
    or hub names.
    method: `exact` (the tokens of both rows cover the same bytes), `mined` (the paper's dynamic programming over
    spellings, see `fusejax.alignment.mined`), `boundary` (both rows end at the same byte) or `inside` (`boundary`;
    besides, a target row that ends inside a source token takes the row before that token, with the bytes of it that
    are already consumed in the second column, which is 0 everywhere else). But for `mined`, no row has a token, in
    either tokenizer, that stands for another text than the one there (see `misread`).
    """
    target_tok, source_tok = Tokenizer.of(target_tok), Tokenizer.of(source_tok)
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    return row_mapper(target_tok, source_tok, method)(text.encode("utf-8"), target, source)


def row_mapper(
    target_tok: Tokenizer, source_tok: Tokenizer, method: str
) -> Callable[[bytes, Tokens, Tokens], np.ndarray]:
    """The function (a text's UTF-8, target's tokens, source's tokens) → row map, for all texts of the pair."""
    if method not in METHODS:
        raise ValueError(f"row map {method!r} is unknown; known: {', '.join(METHODS)}")
    same = target_tok.text_fingerprint == source_tok.text_fingerprint
    if method == "mined" and not same:
        from fusejax.alignment.mined import MinedRows  # which builds on this module

        mined = MinedRows(target_tok, source_tok)
        return lambda _data, target, source: mined(target, source)

    def by_text(data: bytes, target: Tokens, source: Tokens) -> np.ndarray:
        if same and np.array_equal(target.ids, source.ids):  # not so for turns that two chat templates surround
            return identity(len(target.ids))
        rows_T2 = map_rows(data, target, source, source_tok, method)
        if not len(source.ids):
            return rows_T2
        misread_T, misread_R = misread(data, target, target_tok), misread(data, source, source_tok)
        if misread_T.any() or misread_R.any():
            row_T = rows_T2[:, 0]
            rows_T2[misread_T | ((row_T >= 0) & misread_R[np.maximum(row_T, 0)])] = (NO_ROW, 0)
        return rows_T2

    return by_text


def misread(data: bytes, tokens: Tokens, tokenizer: Tokenizer) -> np.ndarray:
    """bool[n]: the tokens of a text (its UTF-8 `data`) that stand for another text than the one there.

    So do all tokens of a stretch that the tokenizer changed (a '▁' read as a space) or has no token for; not where only
    white space is lost or added (a dummy prefix), nor where the two are canonically equivalent (Unicode's NFC).
    """
    wrong_T = np.zeros(len(tokens.ids), bool)
    if not len(wrong_T) or tokenizer.spells(tokens.ids, data):
        return wrong_T
    edges = [0, *(np.flatnonzero(np.diff(tokens.boundaries)) + 1).tolist(), len(wrong_T)]
    at = 0
    for first, stop in pairwise(edges):
        end = int(tokens.boundaries[stop - 1])
        pieces = [tokenizer.canonical_bytes[i] for i in tokens.ids[first:stop].tolist()]
        known = b"".join(piece for piece in pieces if piece is not None)
        wrong_T[first:stop] = None in pieces or not _equivalent(known, data[at:end])
        at = end
    return wrong_T


def _equivalent(a: bytes, b: bytes) -> bool:
    if a == b:
        return True
    try:
        a_text, b_text = ("".join(unicodedata.normalize("NFC", one.decode()).split()) for one in (a, b))
    except UnicodeDecodeError:
        return False
    return a_text == b_text


def identity(n: int) -> np.ndarray:
    """int32[n, 2]: the row map of two equal tokenizers."""
    return np.stack([np.arange(n, dtype=np.int32), np.zeros(n, np.int32)], 1)


def map_rows(data: bytes, target: Tokens, source: Tokens, source_tok: Tokenizer, method: str = "inside") -> np.ndarray:
    """`exact`, `boundary` or `inside` of a text (its UTF-8) that is tokenized; O(n_target log n_source), vectorized."""
    n = len(target.ids)
    rows_T2 = np.full((n, 2), NO_ROW, np.int32)
    rows_T2[:, 1] = 0
    if not n or not len(source.ids):
        return rows_T2
    ends_T, ends_S = target.boundaries, source.boundaries
    # Of several tokens that end at the same byte only the last has seen all of the text up to there.
    complete_T = np.append(ends_T[1:] != ends_T[:-1], True)
    before_T = np.searchsorted(ends_S, ends_T, side="right") - 1  # last source row with boundary <= the target's
    known_T = complete_T & (before_T >= 0)
    same_T = known_T & (ends_S[np.maximum(before_T, 0)] == ends_T)
    if method == "exact":
        same_T &= _starts(ends_T) == _starts(ends_S)[np.maximum(before_T, 0)]
    rows_T2[same_T, 0] = before_T[same_T]
    if method == "inside":
        candidates = np.flatnonzero(known_T & ~same_T)
        rows, consumed = _inside(data, ends_T[candidates], before_T[candidates], source, source_tok)
        rows_T2[candidates, 0], rows_T2[candidates, 1] = rows, consumed
    return rows_T2


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], ends[:-1]])


def _inside(
    data: bytes, ends_C: np.ndarray, before_C: np.ndarray, source: Tokens, source_tok: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """(row or -1, bytes consumed) of target rows that end inside the source token after row `before`."""
    n_source = len(source.ids)
    following_C = np.minimum(before_C + 1, n_source - 1)
    consumed_C = ends_C - source.boundaries[before_C]
    # The token's own bytes must be what the text has there; where the tokenizer changed the text they are not.
    length_C = source.boundaries[following_C] - source.boundaries[before_C]
    good_C = (before_C + 1 < n_source) & (consumed_C > 0) & (consumed_C <= MAX_CONSUMED)
    good_C &= source_tok.lengths[source.ids[following_C]] == length_C
    if not source_tok.spells(source.ids, data):
        for k in np.flatnonzero(good_C).tolist():
            piece = source_tok.canonical_bytes[source.ids[following_C[k]]] or b""
            good_C[k] = data.startswith(piece, int(source.boundaries[before_C[k]]))
    return np.where(good_C, before_C, NO_ROW), np.where(good_C, consumed_C, 0)

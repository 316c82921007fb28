"""Why target rows have no source row: the causes that the alignment report counts."""

import numpy as np

from fusejax.alignment.rows import MAX_CONSUMED, Tokens, misread
from fusejax.tokenizers import Tokenizer

CAUSES = (
    "special",
    "normalization",
    "document start",
    "long token",
    "newline",
    "digits",
    "non-ASCII",
    "other",
    "nothing left",
    "several source tokens",
    "part of a source token",
    "other spelling",
)
"""In the order in which they are asked; a row counts under the first that holds:

special: the row's token, or the source's where the row ends, stands for no bytes (unknown, special).
normalization: one of the two tokenizers changed the text there, or the row's token has no text of its own.
document start: the source has no row yet; its first token ends later.
long token: the row stands deeper inside a source token than MAX_CONSUMED bytes.
newline, digits, non-ASCII: what the text of the source's token there contains.
several source tokens, part of a source token, other spelling: the row's token against the source's there, where rows
    are not `inside`. other: none of these.
nothing left: there is a source row, but its top k tokens all lack an image; that is known where the rows are.
"""


def fallback_causes(
    data: bytes,
    target: Tokens,
    source: Tokens,
    target_tok: Tokenizer,
    source_tok: Tokenizer,
    row_map_T2: np.ndarray,
    method: str,
) -> np.ndarray:
    """int32[len(CAUSES)]: how many fallback rows of a document (its UTF-8 `data`) have each cause.

    method: the row map's; only under `inside` rows could have stood inside a token.
    """
    counts = np.zeros(len(CAUSES), np.int32)
    t_N = np.flatnonzero(row_map_T2[:, 0] < 0)
    if not len(t_N) or not len(source.ids):
        counts[CAUSES.index("document start")] = len(t_N)
        return counts
    ends_T, ends_R = target.boundaries, source.boundaries
    j_N = np.searchsorted(ends_R, ends_T[t_N], side="left")  # the source token in which the row ends, or with which
    low_N = np.where(j_N > 0, ends_R[j_N - 1], 0)
    high_N = ends_R[np.minimum(j_N, len(ends_R) - 1)]
    start_N = np.where(t_N > 0, ends_T[t_N - 1], 0)
    first_N = np.searchsorted(ends_R, start_N, side="right")  # the source token in which the row's token begins
    misread_T, misread_R = misread(data, target, target_tok), misread(data, source, source_tok)
    before_N = np.where((ends_T[t_N] < high_N) & (j_N > 0), j_N - 1, j_N)  # the last source token up to there
    changed_N = misread_T[t_N] | misread_R[j_N] | misread_R[before_N]
    each = (t_N, j_N, first_N, start_N, low_N, high_N, changed_N)
    for t, j, first, start, low, high, changed in zip(*(a.tolist() for a in each), strict=True):
        end = int(ends_T[t])
        own, other = target_tok.canonical_bytes[target.ids[t]], source_tok.canonical_bytes[source.ids[j]]
        text = data[min(start, low) : high]
        if own is None or other is None:
            cause = "special"
        elif changed or not (_spells(own, data[start:end], t) and _spells(other, data[low:high], j)):
            cause = "normalization"
        elif end < ends_R[0]:
            cause = "document start"
        elif method == "inside" and end - low > MAX_CONSUMED:
            cause = "long token"
        elif b"\n" in text or b"\r" in text:
            cause = "newline"
        elif any(0x30 <= byte <= 0x39 for byte in text):
            cause = "digits"
        else:
            cause = _in_plain_text(first, j, (start, end) == (low, high), method) if text.isascii() else "non-ASCII"
        counts[CAUSES.index(cause)] += 1
    return counts


def _in_plain_text(first: int, last: int, same: bool, method: str) -> str:
    """The cause where nothing in the text is special. first, last: source tokens; same: whether they cover the same."""
    if method == "inside":
        return "other"
    if first < last:
        return "several source tokens"
    return "other spelling" if same else "part of a source token"


def _spells(piece: bytes, span: bytes, token: int) -> bool:
    """Whether a token's bytes are the text's; the first token may hold a dummy prefix besides."""
    return piece == span or (token == 0 and piece == b" " + span)

"""The cross-entropy by which sources are weighed against each other, on the host, from their cached rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class DocumentCe(NamedTuple):
    """A source's cross-entropy over a document: nats in all, and over how many units (bytes or rows)."""

    nats: float
    units: float

    @property
    def mean(self) -> float:
        return self.nats / self.units if self.units else float("inf")


def document_ce(
    ce_R: np.ndarray, boundaries_R: np.ndarray, *, has_eos: bool = True, unit: str = "byte", half: bool = False
) -> DocumentCe:
    """ce_R float32 [R], boundaries_R int32 [R] of the source.

    unit `byte`: the nats of the text that the source predicts, over its bytes; EOS is no text. That is comparable
      between tokenizers. (A document that is one token of the source leaves no byte to predict: then it is the CE of
      EOS.) unit `token`: over all rows, EOS included, as in FuseLLM, which favours fine tokenizers. `aligned` is
      measured on the device and gets the values of `token`.
    half: rows, their sum and their mean are rounded to float16, as in the paper's code.
    """
    if unit == "byte":
        n_bytes = int(boundaries_R[-1] - boundaries_R[0])
        if not n_bytes:
            return DocumentCe(float(ce_R[-1]), 1.0) if has_eos else DocumentCe(0.0, 0.0)
        return DocumentCe(float(ce_R[:-1].sum(dtype=np.float64)), float(n_bytes))
    rows = ce_R if has_eos else ce_R[:-1]
    if not half or not len(rows):
        return DocumentCe(float(rows.sum(dtype=np.float64)), float(len(rows)))
    with np.errstate(over="ignore"):
        total = np.float16(rows.astype(np.float16).sum(dtype=np.float32))
        return DocumentCe(float(np.float16(np.float32(total) / len(rows))) * len(rows), float(len(rows)))


def joint_ce(parts: Sequence[DocumentCe]) -> float:
    """The mean over several documents together; inf where there is nothing to go by."""
    return DocumentCe(sum(part.nats for part in parts), sum(part.units for part in parts)).mean


def deciding_ce(
    whole: DocumentCe,
    ce_R: np.ndarray,
    boundaries_R: np.ndarray,
    target_boundaries_T: np.ndarray,
    *,
    level: str = "document",
    unit: str = "byte",
    window: int = 16,
) -> np.ndarray:
    """The cross-entropy by which sources are weighed, beside each target row: float32 [T].

    whole: `document_ce` of ce_R float32 [R] and boundaries_R int32 [R]. target_boundaries_T int32 [T].

    level `document` (and `block`, whose documents are joined elsewhere): its mean. level `token`: the same over the
    bytes of the `window` target tokens around ((window − 1) // 2 before and window // 2 after the one that the row
    predicts). The source's nats are spread evenly over each of its tokens' bytes, so that all sources are weighed on
    the same text.
    """
    T = len(target_boundaries_T)
    if level != "token" or T < 2:
        return np.full(T, whole.mean, np.float32)
    # Rows 0 .. T − 2 predict text; the last one (EOS) takes the window at the end of the text.
    row_T = np.minimum(np.arange(T), T - 2)
    low_T = target_boundaries_T[np.maximum(row_T - (window - 1) // 2, 0)]
    high_T = target_boundaries_T[np.minimum(row_T + window // 2, T - 2) + 1]
    text_ce = ce_R[:-1].astype(np.float64)
    nats_T = _between(low_T, high_T, boundaries_R, np.concatenate([[0.0], np.cumsum(text_ce)]))
    steps_R = np.arange(len(boundaries_R)) if unit != "byte" else boundaries_R - boundaries_R[0]
    units_T = _between(low_T, high_T, boundaries_R, steps_R)
    return np.where(units_T > 0, nats_T / np.where(units_T > 0, units_T, 1.0), whole.mean).astype(np.float32)


def _between(low_T: np.ndarray, high_T: np.ndarray, at_R: np.ndarray, total_R: np.ndarray) -> np.ndarray:
    """How much a running total, known at `at_R` and linear in between, grows from low to high."""
    return np.interp(high_T, at_R, total_R) - np.interp(low_T, at_R, total_R)

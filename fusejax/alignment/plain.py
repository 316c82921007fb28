"""The reference's alignment of two tokenizations, restated plainly in our own words: what `mined` is measured against.

It is slow as the FuseLLM paper's code is, and for the same reasons: a Python loop over all pairs of tokens, each pair's
marks of spaces removed and its edit distance taken anew. Nothing but `fusejax bench align` and the tests runs it.
"""

import numpy as np
from rapidfuzz.distance import Levenshtein

from fusejax.canonical import SPACE_MARKER


def warp_spellings(source: list[str], target: list[str]) -> tuple[float, list[tuple[int, int]]]:
    """(cost, path of (source position, target position)) of the cheapest alignment of two lists of tokens."""
    cost_ST = np.full((len(source) + 1, len(target) + 1), np.inf)
    cost_ST[0, 0] = 0.0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            distance = Levenshtein.distance(a.replace(SPACE_MARKER, ""), b.replace(SPACE_MARKER, ""))
            cost_ST[i + 1, j + 1] = distance + min(cost_ST[i, j], cost_ST[i, j + 1], cost_ST[i + 1, j])
    i, j = len(source), len(target)
    path = [(i - 1, j - 1)]
    while (i, j) != (1, 1):
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = before[int(np.argmin([cost_ST[cell] for cell in before]))]
        path.append((i - 1, j - 1))
    return float(cost_ST[-1, -1]), path[::-1]

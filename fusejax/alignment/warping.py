"""Dynamic time warping of two sequences of symbols, compiled: cost and path of the classic recurrence

    D[i, j] = cost(a_i, b_j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1])

The path is read backwards from the last cell; of equal predecessors the diagonal one comes first, then the one before
in the first series, then the one before in the second. That makes it unique.
"""

import numpy as np
from numba import njit

_FAR = np.int32(1 << 30)
_BLOCK = 64  # rows that are filled again to read the path; of the others only every 64th is kept


def warp(cost_UV: np.ndarray, a_N: np.ndarray, b_M: np.ndarray) -> tuple[int, np.ndarray]:
    """(cost, path int32[P, 2]) of the cheapest warping; the path runs from (0, 0) to (N-1, M-1).

    cost_UV: uint16[U, V], the cost of each pair of symbols; a_N, b_M: int32, the series as symbols, neither empty.
    Time O(N M), memory O(N M / 64 + 64 M).
    """
    total, path_P2 = _trace(cost_UV, a_N, b_M, _fill(cost_UV, a_N, b_M))
    return int(total), path_P2


@njit(cache=True)
def _row(cost_V, b_M, above_M, row_M, corner):
    """One row of D from the one above it; corner: the value left of `above_M`."""
    left = _FAR
    for j in range(len(b_M)):
        up = above_M[j]
        left = min(corner, up, left) + np.int32(cost_V[b_M[j]])
        row_M[j] = left
        corner = up


@njit(cache=True)
def _fill(cost_UV, a_N, b_M):
    """int32[K, M], row k: the row of D above block k, that is row k * _BLOCK - 1."""
    n, m = len(a_N), len(b_M)
    kept_KM = np.full(((n + _BLOCK - 1) // _BLOCK, m), _FAR, np.int32)
    above_M, row_M = np.full(m, _FAR, np.int32), np.empty(m, np.int32)
    for i in range((len(kept_KM) - 1) * _BLOCK):
        _row(cost_UV[a_N[i]], b_M, above_M, row_M, np.int32(0) if i == 0 else _FAR)
        above_M, row_M = row_M, above_M
        if (i + 1) % _BLOCK == 0:
            kept_KM[(i + 1) // _BLOCK] = above_M
    return kept_KM


@njit(cache=True)
def _trace(cost_UV, a_N, b_M, kept_KM):
    """The cost and the path, read backwards block by block."""
    n, m = len(a_N), len(b_M)
    path_P2 = np.empty((n + m, 2), np.int32)
    block_RM = np.empty((_BLOCK + 1, m), np.int32)  # row 0: the row above the block
    i, j, at = n - 1, m - 1, n + m
    total = np.int32(0)
    for k in range(len(kept_KM) - 1, -1, -1):
        start = k * _BLOCK
        block_RM[0] = kept_KM[k]
        for r in range(start, i + 1):
            s = r - start
            _row(cost_UV[a_N[r]], b_M, block_RM[s], block_RM[s + 1], np.int32(0) if r == 0 else _FAR)
        if at == n + m:
            total = block_RM[i - start + 1, j]
        while i >= start:
            at -= 1
            path_P2[at, 0], path_P2[at, 1] = i, j
            here = i - start + 1
            up = block_RM[here - 1, j]
            left = block_RM[here, j - 1] if j > 0 else _FAR
            diagonal = block_RM[here - 1, j - 1] if j > 0 else _FAR
            if i == 0:
                if j == 0:
                    break
                j -= 1
            elif diagonal <= up and diagonal <= left:
                i, j = i - 1, j - 1
            elif up <= left:
                i -= 1
            else:
                j -= 1
    return total, path_P2[at:]

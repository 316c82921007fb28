"""Dynamic time warping of two sequences of symbols, compiled: cost and path of the classic recurrence

    D[i, j] = cost(a_i, b_j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1])

The path is read backwards from the last cell; of equal predecessors the diagonal one comes first, then the one before
in the first series, then the one before in the second. That makes it unique.

Where a guess of the path is at hand, only a band about it is filled, together with a lower bound of D in it: outside
the band a row's cells are taken by blocks of columns, each at the least cost that the row has in the block. Where D of
the band and the bound agree in every cell that reading the path looks at, no way outside the band is cheaper or as
cheap, and the path is that of the whole matrix. Where they do not, a wider band is tried, and then all of it.
"""

import numpy as np
from numba import njit

_FAR = np.int32(1 << 30)
_BLOCK = 64  # rows that are filled again to read the path; of the others only every 64th is kept
_COLUMNS = 16  # columns of one block outside the band
_HALF_WIDTHS = (32, 128)  # bands that are tried; each wider than a block to either side
_WORTH = 32  # a band is tried on series so many times its half width: else a failure costs too much of the whole matrix


def warp(
    cost_UV: np.ndarray, a_N: np.ndarray, b_M: np.ndarray, guess_N: np.ndarray | None = None
) -> tuple[int, np.ndarray]:
    """(cost, path int32[P, 2]) of the cheapest warping; the path runs from (0, 0) to (N-1, M-1).

    cost_UV: uint16[U, V], the cost of each pair of symbols; a_N, b_M: int32, the series as symbols, neither empty.
    guess_N: int32[N], never decreasing: about where in b each element of a belongs. It changes the time alone:
    O(N (128 + M / 16) + U M) where a band proves optimal, else O(N M). Memory O(256 N + U M / 16 + N M / 64).
    """
    if guess_N is not None:
        for half in _HALF_WIDTHS:
            if _WORTH * half > min(len(a_N), len(b_M)):
                break
            first_N, last_N = _band(guess_N, half, len(b_M))
            if (last_N - first_N).max() > 16 * half:  # the guess jumps: as much memory as all of D
                break
            proven, total, path_P2 = _within(cost_UV, a_N, b_M, first_N, last_N)
            if proven:
                return int(total), path_P2
    total, path_P2 = _trace(cost_UV, a_N, b_M, _fill(cost_UV, a_N, b_M))
    return int(total), path_P2


def _band(guess_N: np.ndarray, half: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) int32[N]: the columns first..last-1 of each row; the corners of the matrix are in."""
    first_N = np.clip(guess_N - half, 0, m - half - 1).astype(np.int32)
    last_N = np.clip(guess_N + half + 1, half + 1, m).astype(np.int32)
    first_N[0], last_N[-1] = 0, m
    return first_N, last_N


@njit(cache=True)
def _within(cost_UV, a_N, b_M, first_N, last_N):
    """(whether the path is proven, its cost, the path) of the cheapest way inside a band."""
    n, m = len(a_N), len(b_M)
    width = np.max(last_N - first_N)
    least_UJ = _least(cost_UV, b_M)
    nowhere_J = np.full(least_UJ.shape[1], _FAR, np.int32)
    above_J, row_J = nowhere_J.copy(), nowhere_J.copy()
    inside_NW, bound_NW = np.empty((n, width), np.int32), np.empty((n, width), np.int32)
    for i in range(n):
        cost_V, least_J = cost_UV[a_N[i]], least_UJ[a_N[i]]
        first, last, p = first_N[i], last_N[i], max(i - 1, 0)
        up, upper = (first_N[p], last_N[p]) if i > 0 else (0, 0)
        row_J[:] = _FAR
        _outside(least_J, 0, first, _FAR, bound_NW[p], up, upper, above_J, row_J)
        left = row_J[(first - 1) // _COLUMNS] if first > 0 else _FAR
        _band_row(cost_V, b_M, first, last, left, bound_NW[p], up, upper, above_J, bound_NW[i])
        _band_row(cost_V, b_M, first, last, _FAR, inside_NW[p], up, upper, nowhere_J, inside_NW[i])
        _outside(least_J, last, m, bound_NW[i, last - 1 - first], bound_NW[p], up, upper, above_J, row_J)
        above_J, row_J = row_J, above_J
    return _trace_band(inside_NW, bound_NW, first_N, last_N, m)


@njit(cache=True)
def _least(cost_UV, b_M):
    """int32[U, J]: the least cost of each symbol of a in each block of columns."""
    least_UJ = np.full((len(cost_UV), (len(b_M) + _COLUMNS - 1) // _COLUMNS), _FAR, np.int32)
    for u in range(len(cost_UV)):
        for j in range(len(b_M)):
            least_UJ[u, j // _COLUMNS] = min(least_UJ[u, j // _COLUMNS], np.int32(cost_UV[u, b_M[j]]))
    return least_UJ


@njit(cache=True)
def _outside(least_J, low, high, before, above_W, up, upper, above_J, row_J):
    """Lower bounds of D in a row's columns low..high-1, all outside the band, one for each block.

    before: that of the column before `low`. above_W: the row above within the band (columns up..upper-1), above_J
    outside it.
    """
    for J in range(low // _COLUMNS, (high + _COLUMNS - 1) // _COLUMNS if high > low else 0):
        start, stop = max(J * _COLUMNS, low), min((J + 1) * _COLUMNS, high)
        best = min(before, above_J[J])
        if J > 0:
            best = min(best, above_J[J - 1])
        for j in range(max(up, start - 1), min(upper, stop)):
            best = min(best, above_W[j - up])
        before = row_J[J] = min(_FAR, best + least_J[J])


@njit(cache=True)
def _band_row(cost_V, b_M, first, last, left, above_W, up, upper, above_J, row_W):
    """One row within the band; `left` is the value before it, above_J what stands for the row above outside it."""
    corner = _FAR
    if upper == 0 and first == 0:
        corner = np.int32(0)
    elif first > 0:
        corner = above_W[first - 1 - up] if up <= first - 1 < upper else above_J[(first - 1) // _COLUMNS]
    for j in range(first, last):
        above = above_W[j - up] if up <= j < upper else above_J[j // _COLUMNS]
        left = min(_FAR, min(corner, above, left) + np.int32(cost_V[b_M[j]]))
        row_W[j - first] = left
        corner = above


@njit(cache=True)
def _trace_band(inside_NW, bound_NW, first_N, last_N, m):
    """(proven, cost, path): the path within the band, as far as every value that decides it is proven."""
    i, j = len(first_N) - 1, m - 1
    path_P2 = np.empty((i + 1 + m, 2), np.int32)
    at, total = len(path_P2), inside_NW[i, j - first_N[i]]
    if total != bound_NW[i, j - first_N[i]]:
        return False, total, path_P2[at:]
    while True:
        at -= 1
        path_P2[at, 0], path_P2[at, 1] = i, j
        if i == 0 and j == 0:
            return True, total, path_P2[at:]
        best, step = _FAR, -1
        for k in range(3):  # the diagonal, the first series, the second
            p, q = i - (k < 2), j - (k != 1)
            if p < 0 or q < 0:
                continue
            if not first_N[p] <= q < last_N[p] or inside_NW[p, q - first_N[p]] != bound_NW[p, q - first_N[p]]:
                return False, total, path_P2[at:]
            if inside_NW[p, q - first_N[p]] < best:
                best, step = inside_NW[p, q - first_N[p]], k
        i, j = i - (step < 2), j - (step != 1)


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
        start, stop = k * _BLOCK, j + 1  # the path, read backwards, never comes to a later column again
        block_RM[0, :stop] = kept_KM[k, :stop]
        for r in range(start, i + 1):
            s = r - start
            _row(cost_UV[a_N[r]], b_M[:stop], block_RM[s], block_RM[s + 1], np.int32(0) if r == 0 else _FAR)
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

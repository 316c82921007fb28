"""The compiled warping against a plain restatement of its recurrence, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.alignment.warping import warp


def plain_warp(cost_UV, a, b):
    """Cost and path cell by cell: all of D, then back from its last cell."""
    far = float("inf")
    D = [[far] * len(b) for _ in a]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            before = [D[p][q] for p, q in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p >= 0 and q >= 0]
            D[i][j] = cost_UV[x][y] + (min(before) if before else 0)
    i, j = len(a) - 1, len(b) - 1
    path = [(i, j)]
    while i or j:
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        # min takes the first of equals: the diagonal, then the first series, then the second
        i, j = min((s for s in steps if s[0] >= 0 and s[1] >= 0), key=lambda s: D[s[0]][s[1]])
        path.append((i, j))
    return D[-1][-1], path[::-1]


def check(cost_UV, a, b):
    cost_UV = np.asarray(cost_UV, np.uint16)
    cost, path_P2 = warp(cost_UV, np.asarray(a, np.int32), np.asarray(b, np.int32))
    expected_cost, expected_path = plain_warp(cost_UV.tolist(), list(a), list(b))
    assert cost == expected_cost
    assert [tuple(cell) for cell in path_P2.tolist()] == expected_path


series = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(a=series, b=series, values=st.lists(st.integers(0, 3), min_size=16, max_size=16))
def test_short_series_with_many_ties(a, b, values):
    check(np.array(values).reshape(4, 4), a, b)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("m", [1, 64, 150])
def test_lengths_around_the_blocks_of_rows(n, m):
    rng = np.random.default_rng(n * 1000 + m)
    check(rng.integers(0, 4, (9, 7)), rng.integers(0, 9, n), rng.integers(0, 7, m))

"""The compiled warping against a plain restatement of its recurrence, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.alignment.warping import _band, _within, warp


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


def words(rng, n, kinds, junk=0):
    """A series of n words and the same with some of them in two parts, after `junk` others; costs, and the true place.

    Costs are 0 for equal symbols, else 1 or 2 for the parts of a word and anything from 1 to 5 for the rest.
    """
    cost = rng.integers(1, 6, (2 * kinds, 2 * kinds))
    half = np.arange(kinds)
    cost[half, half + kinds] = rng.integers(1, 3, kinds)
    np.fill_diagonal(cost, 0)
    a, b, place = rng.integers(0, kinds, n), list(rng.integers(0, kinds, junk)), []
    for word in a.tolist():
        b += [word] if rng.random() < 0.8 else [word + kinds, rng.integers(kinds, 2 * kinds)]
        place.append(len(b) - 1)
    return cost.astype(np.uint16), a.astype(np.int32), np.array(b, np.int32), np.array(place)


def same(one, two):
    assert one[0] == two[0]
    assert (one[1] == two[1]).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_band_that_proves_optimal_gives_the_path_of_the_whole(seed):
    cost_UV, a_N, b_M, place_N = words(np.random.default_rng(seed), 700, 300)
    same(warp(cost_UV, a_N, b_M, place_N), warp(cost_UV, a_N, b_M))
    assert _within(cost_UV, a_N, b_M, *_band(place_N, 32, len(b_M)))[0]


@pytest.mark.parametrize("junk", [0, 20, 31, 40, 90, 140])
@pytest.mark.parametrize("kinds", [3, 12, 200])
def test_a_wrong_guess_costs_time_alone(junk, kinds):
    rng = np.random.default_rng(junk * 1000 + kinds)
    cost_UV, a_N, b_M, _ = words(rng, 320, kinds, junk)
    whole = warp(cost_UV, a_N, b_M)
    guesses = [np.arange(len(a_N)), np.sort(rng.integers(0, len(b_M), len(a_N))), np.full(len(a_N), len(b_M) - 1)]
    for guess_N in guesses:
        guess_N = np.minimum(guess_N, len(b_M) - 1)
        same(warp(cost_UV, a_N, b_M, guess_N), whole)
        for half in (17, 24, 32):
            proven, *found = _within(cost_UV, a_N, b_M, *_band(guess_N, half, len(b_M)))
            if proven:
                same(found, whole)


def test_series_with_many_ties_in_a_band():
    rng = np.random.default_rng(1)
    for _ in range(30):
        cost_UV = rng.integers(0, 3, (4, 4)).astype(np.uint16)
        a_N, b_M = (rng.integers(0, 4, 300).astype(np.int32) for _ in range(2))
        same(warp(cost_UV, a_N, b_M, np.arange(300)), warp(cost_UV, a_N, b_M))

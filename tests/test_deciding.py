"""The cross-entropies that decide between sources, against their definitions by bytes, rows and halves."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.deciding import DocumentCe, deciding_ce, document_ce, joint_ce


def decide(ce, boundaries, target, *, has_eos=True, unit="byte", **options):
    whole = document_ce(ce, boundaries, has_eos=has_eos, unit=unit)
    return deciding_ce(whole, ce, boundaries, target, unit=unit, **options)


def by_bytes(ce, boundaries):
    """The source's nats spread over the bytes of the text, one number for each byte after the first token."""
    spread = np.zeros(boundaries[-1])
    for j in range(1, len(boundaries)):
        spread[boundaries[j - 1] : boundaries[j]] = ce[j - 1] / (boundaries[j] - boundaries[j - 1])
    return spread


cuts = st.lists(st.integers(1, 7), min_size=1, max_size=25).map(np.cumsum)


@settings(deadline=None, max_examples=80)
@given(cuts, st.data(), st.integers(1, 9))
def test_deciding_ce_of_windows_is_that_of_their_bytes(source, data, window):
    size = int(source[-1])
    inner = data.draw(st.sets(st.integers(1, size), max_size=20))
    target = np.array(sorted(inner | {size}))
    ce = np.array(data.draw(st.lists(st.floats(0, 9), min_size=len(source), max_size=len(source))), np.float32)
    got = decide(ce, source, target, level="token", unit="byte", window=window)
    whole = decide(ce, source, target, level="document", unit="byte")
    assert got.dtype == whole.dtype == np.float32
    n = size - source[0]
    np.testing.assert_allclose(whole, ce[:-1].sum() / n if n else ce[-1], rtol=1e-4, atol=1e-5)
    spread = by_bytes(ce, source)
    for t in range(len(target) - 1):
        low = target[max(t - (window - 1) // 2, 0)]
        high = target[min(t + window // 2, len(target) - 2) + 1]
        n_bytes = high - max(low, source[0])
        expected = spread[low:high].sum() / n_bytes if n_bytes > 0 else whole[0]
        np.testing.assert_allclose(got[t], expected, rtol=1e-4, atol=1e-5)
    if len(target) > 1:
        assert got[-1] == got[-2]


def test_deciding_ce_by_token_is_a_plain_mean():
    ce = np.array([1.0, 2.0, 6.0], np.float32)
    ends, target = np.array([2, 3, 9]), np.array([3, 9])
    assert decide(ce, ends, target, unit="token").tolist() == [3.0, 3.0]
    assert decide(ce, ends, target, unit="token", has_eos=False).tolist() == [1.5, 1.5]
    assert decide(ce[:1], ends[:1], target[:1], unit="token", has_eos=False).tolist() == [np.inf]
    same = decide(ce, ends, ends, level="token", unit="token", window=1)
    assert same.tolist() == [1.0, 2.0, 2.0]


def test_a_one_token_document_is_finite():
    for level, unit in itertools.product(("document", "token"), ("byte", "token", "aligned")):
        values = decide(np.array([0.5], np.float32), np.array([4]), np.array([4]), level=level, unit=unit)
        assert values.tolist() == [0.5]


def test_documents_together_are_weighed_by_their_units():
    a = document_ce(np.array([1.0, 2.0, 9.0], np.float32), np.array([2, 3, 9]))
    b = document_ce(np.array([4.0, 9.0], np.float32), np.array([1, 2]))
    assert (a, b) == (DocumentCe(3.0, 7.0), DocumentCe(4.0, 1.0))
    assert joint_ce([a, b, DocumentCe(0.0, 0.0)]) == pytest.approx(7 / 8)
    assert joint_ce([]) == np.inf


def test_halves_are_rounded_as_float16_rounds():
    rng = np.random.default_rng(0)
    ce = (rng.random(700) * 9).astype(np.float32)
    nats, units = document_ce(ce, np.arange(1, 701), unit="token", half=True)
    total = np.float16(np.sum(ce.astype(np.float16), dtype=np.float32))
    assert units == 700
    assert nats / units == np.float16(np.float32(total) / 700)
    assert nats / units != pytest.approx(ce.mean(), rel=1e-6)
    assert nats / units == pytest.approx(ce.mean(), rel=2e-3)

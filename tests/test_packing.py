import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.packing import pack

lengths_and_room = st.integers(1, 40).flatmap(
    lambda room: st.tuples(st.lists(st.integers(0, room), max_size=60), st.just(room))
)


@settings(deadline=None, max_examples=60)
@given(lengths_and_room, st.integers(0, 3), st.integers(0, 3))
def test_every_document_once_and_no_sequence_too_long(case, seed, epoch):
    lengths, room = np.array(case[0], int), case[1]
    packing = pack(lengths, room, seed, epoch)
    assert sorted(packing.documents.tolist()) == np.flatnonzero(lengths).tolist()
    for i in range(len(packing)):
        assert 0 < lengths[packing.sequence(i)].sum() <= room


@settings(deadline=None, max_examples=60)
@given(lengths_and_room)
def test_no_two_sequences_fit_into_one(case):
    """What best fit guarantees: a document opens a sequence only where it fits in no open one."""
    lengths, room = np.array(case[0], int), case[1]
    packing = pack(lengths, room, 0, 0)
    filled = sorted(lengths[packing.sequence(i)].sum() for i in range(len(packing)))
    if len(filled) > 1:
        assert filled[0] + filled[1] > room


def test_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    first = pack(lengths, 64, 1, 2)
    again = pack(lengths, 64, 1, 2)
    np.testing.assert_array_equal(first.documents, again.documents)
    np.testing.assert_array_equal(first.starts, again.starts)
    assert not np.array_equal(first.documents, pack(lengths, 64, 1, 3).documents)
    assert not np.array_equal(first.documents, pack(lengths, 64, 2, 2).documents)


def test_one_document_a_sequence():
    lengths = np.array([3, 0, 5, 1])
    packing = pack(lengths, 8, 0, 0, together=False)
    assert [packing.sequence(i).tolist() for i in range(len(packing))] == [[i] for i in packing.documents]
    assert sorted(packing.documents.tolist()) == [0, 2, 3]
    assert packing.documents.tolist() == pack(lengths, 5, 0, 0, together=False).documents.tolist()


def test_packs_tightly():
    lengths = np.random.default_rng(0).integers(1, 1024, 3000)
    assert lengths.sum() / (len(pack(lengths, 2048, 0, 0)) * 2048) > 0.98


def test_a_document_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, more than max_length 8"):
        pack(np.array([3, 9]), 8, 0, 0)

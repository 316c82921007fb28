"""Which documents share a training sequence: a pure function of their lengths, the seed and the epoch."""

from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Sequence i holds the documents documents[starts[i]:starts[i + 1]]; int64 each."""

    documents: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sequence(self, i: int) -> np.ndarray:
        return self.documents[self.starts[i] : self.starts[i + 1]]


def pack(lengths: np.ndarray, max_length: int, seed: int, epoch: int, together: bool = True) -> Packing:
    """Put documents, in an order shuffled by (seed, epoch), into sequences of `max_length` tokens.

    lengths: int [documents], tokens of each with all that is added to it; a document of length 0 is left out. Each
    document goes into the open sequence in which it leaves the least room (best fit), else it opens one. The sequences
    are shuffled too: the ones opened last are the emptiest. Takes about a microsecond per document. Not `together`:
    each document is a sequence of its own.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > max_length:
        longest = int(lengths.argmax())
        raise ValueError(f"document {longest} has {lengths[longest]} tokens, more than max_length {max_length}")
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(np.flatnonzero(lengths))
    if not together:
        return Packing(order, np.arange(len(order) + 1, dtype=np.int64))
    sequence_of = np.empty(len(order), np.int64)
    # with_room[r]: the sequences that have room for exactly r more tokens; bit r of `rooms`: whether there are any.
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = n_sequences = 0
    for at, length in enumerate(lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = max_length, n_sequences
            n_sequences += 1
        sequence_of[at] = sequence
        if room > length:
            with_room[room - length].append(sequence)
            rooms |= 1 << (room - length)
    renumbered = rng.permutation(n_sequences)[sequence_of]
    by_sequence = np.argsort(renumbered, kind="stable")
    starts = np.zeros(n_sequences + 1, np.int64)
    np.cumsum(np.bincount(renumbered, minlength=n_sequences), out=starts[1:])
    return Packing(order[by_sequence], starts)

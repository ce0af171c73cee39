"""Best-fit-decreasing packing of documents into sequences (Ding et al. 2024, Fewer Truncations Improve Language
Modeling), inside one block.

Documents longer than a sequence are cut into pieces of the full length and one remainder; no other document is cut.
Only lengths are looked at, so the number of sequences is known from the index alone and is the same for every order of
the documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.hashing import permutation


@dataclass(frozen=True)
class PackedBlock:
    """The sequences of one block in the order they are read. Pieces P lie sorted by sequence S, and within it by
    place.

    document_P: index of the document in the block. start_P: first token in the block. length_P: tokens. first_S: int64
    [S + 1], the pieces of sequence s are first_S[s]:first_S[s + 1].
    """

    document_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    first_S: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.first_S) - 1

    def labels(self, distance: int) -> np.ndarray:
        """How many positions of each sequence have a token `distance` later in the same piece, int64 [S]. 0 counts all
        tokens.
        """
        return np.add.reduceat(np.maximum(self.length_P - distance, 0), self.first_S[:-1])


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, no bin above `capacity`: longest first, each into the fullest bin it fits (of equals, the
    one filled last).

    O(n log n). Every length must lie in 1..capacity.
    """
    bins: list[list[int]] = []
    room_levels: list[int] = []
    bins_at: dict[int, list[int]] = {}
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room_levels, lengths[item])
        if place == len(room_levels):
            bins.append([])
            chosen, room = len(bins) - 1, capacity
        else:
            room = room_levels[place]
            chosen = bins_at[room].pop()
            if not bins_at[room]:
                del bins_at[room], room_levels[place]
        bins[chosen].append(item)
        left = room - lengths[item]
        if left:
            if left not in bins_at:
                insort(room_levels, left)
                bins_at[left] = []
            bins_at[left].append(chosen)
    return bins


def best_fit_reference(lengths: Sequence[int], capacity: int) -> list[int]:
    """Definition of `best_fit_decreasing` by levels alone: tokens in each bin, in order of opening, in O(n²)."""
    fill: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [level for level in fill if level + length <= capacity]
        if fitting:
            fill[fill.index(max(fitting))] += length
        else:
            fill.append(length)
    return fill


def pack(offset_D: np.ndarray, capacity: int, key: int) -> PackedBlock:
    """Pack the documents of a block, given by offsets int64 [D + 1], into sequences of at most `capacity` tokens.

    key: seeds the order of documents, of sequences, and of pieces within a sequence.
    """
    length_D = np.diff(offset_D)
    order_D = permutation(len(length_D), key)
    full_D = length_D // capacity
    rest_D = length_D - full_D * capacity
    pieces: list[list[tuple[int, int, int]]] = []
    for document in order_D.tolist():
        start = int(offset_D[document])
        pieces += [[(document, start + i * capacity, capacity)] for i in range(int(full_D[document]))]
    remainder = [document for document in order_D.tolist() if rest_D[document]]
    for members in best_fit_decreasing([int(rest_D[document]) for document in remainder], capacity):
        documents = [remainder[member] for member in sorted(members)]
        pieces.append([(d, int(offset_D[d] + full_D[d] * capacity), int(rest_D[d])) for d in documents])
    shuffled = [pieces[index] for index in permutation(len(pieces), key + 1 & (1 << 64) - 1).tolist()]
    flat = np.array([piece for sequence in shuffled for piece in sequence], dtype=np.int64).reshape(-1, 3)
    first_S = np.cumsum([0, *(len(sequence) for sequence in shuffled)])
    return PackedBlock(flat[:, 0], flat[:, 1], flat[:, 2], first_S)


def packed_count(offset_D: np.ndarray, capacity: int) -> int:
    """Number of sequences `pack` makes of a block, for any key."""
    length_D = np.diff(offset_D)
    rest = [int(length) for length in length_D % capacity if length]
    return int((length_D // capacity).sum()) + len(best_fit_decreasing(rest, capacity))

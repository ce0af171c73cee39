"""Best-fit-decreasing packing of documents into sequences (Ding et al. 2024, Fewer Truncations Improve Language
Modeling), inside one block.

Documents longer than a sequence are cut into pieces of the full length and one remainder; no other document is cut.
Only lengths are looked at, so the number of sequences is known from the index alone and is the same for every order of
the documents.

Shape letters: D documents, P pieces, S sequences, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.hashing import permutation

KEYS = 1 << 64


@dataclass(frozen=True)
class PackedBlock:
    """The sequences of one block in the order they are read. Pieces lie sorted by sequence, and within it by place.

    document_P: index among the documents that were packed. start_P: first token within the document. length_P: tokens.
    first_S: int64 [S + 1], the pieces of sequence s are first_S[s]:first_S[s + 1].
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
        if not self.sequences:
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(np.maximum(self.length_P - distance, 0), self.first_S[:-1])


def best_fit_decreasing(length_N: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, int64 [N], no bin above `capacity`: longest first, each into the fullest bin it fits (of
    equals, the one filled last). Bins are numbered as they are opened; every length must lie in 1..capacity.
    """
    order_N = np.argsort(-length_N, kind="stable")
    bins_at: dict[int, list[int]] = {}
    # One byte per level of room, 1 where a bin has it: `find` is then a memchr.
    has_room = bytearray(capacity + 1)
    bin_N = []
    opened = 0
    for length in length_N[order_N].tolist():
        room = has_room.find(1, length)
        if room < 0:
            chosen, room = opened, capacity
            opened += 1
        else:
            at = bins_at[room]
            chosen = at.pop()
            if not at:
                has_room[room] = 0
        bin_N.append(chosen)
        left = room - length
        if left:
            if has_room[left]:
                bins_at[left].append(chosen)
            else:
                bins_at[left] = [chosen]
                has_room[left] = 1
    found_N = np.empty(len(length_N), dtype=np.int64)
    found_N[order_N] = bin_N
    return found_N


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


def pack(length_D: np.ndarray, capacity: int, key: int) -> PackedBlock:
    """Pack documents of int64 [D] tokens each into sequences of at most `capacity` tokens.

    key: seeds the order of documents, of sequences, and of pieces within a sequence.
    """
    order_D = permutation(len(length_D), key)
    full_D, rest_D = np.divmod(length_D[order_D], capacity)
    # Full pieces come first, each a sequence of its own; then the remainders by bin, in the order of documents.
    whole_P = np.repeat(order_D, full_D)
    number_P = np.arange(len(whole_P)) - np.repeat(np.cumsum(full_D) - full_D, full_D)
    partial = np.flatnonzero(rest_D)
    bin_P = best_fit_decreasing(rest_D[partial], capacity)
    document_P = np.concatenate([whole_P, order_D[partial]])
    start_P = np.concatenate([number_P * capacity, full_D[partial] * capacity])
    length_P = np.concatenate([np.full(len(whole_P), capacity, dtype=np.int64), rest_D[partial]])
    sequence_P = np.concatenate([np.arange(len(whole_P)), bin_P + len(whole_P)])
    sequences = int(sequence_P.max(initial=-1)) + 1
    place_S = np.empty(sequences, dtype=np.int64)
    place_S[permutation(sequences, (key + 1) % KEYS)] = np.arange(sequences)
    place_P = place_S[sequence_P]
    sort_P = np.argsort(place_P, kind="stable")
    first_S = np.searchsorted(place_P[sort_P], np.arange(sequences + 1))
    return PackedBlock(document_P[sort_P], start_P[sort_P], length_P[sort_P], first_S)


def packed_count(length_D: np.ndarray, capacity: int) -> int:
    """Number of sequences `pack` makes of documents of int64 [D] tokens, for any key.

    Bins of equal room and items of equal length are counted, not told apart: an item goes on filling the bin it is in
    while it fits there, since every other bin that would take it has more room.
    """
    full_D, rest_D = np.divmod(length_D, capacity)
    sequences = int(full_D.sum())
    levels, counts = np.unique(rest_D[rest_D > 0], return_counts=True)
    bins_at: dict[int, int] = {}
    # One byte per level of room, 1 where a bin has it: `find` is then a memchr.
    has_room = bytearray(capacity + 1)
    for length, items in zip(levels[::-1].tolist(), counts[::-1].tolist()):
        while items:
            room = has_room.find(1, length)
            if room < 0:
                room, per_bin = capacity, capacity // length
                bins = -(-items // per_bin)
                sequences += bins
                kept = 0
            else:
                per_bin, bins = room // length, bins_at[room]
                if items < per_bin * bins:
                    kept = bins - -(-items // per_bin)
                    bins_at[room] = kept
                else:
                    kept = bins_at[room] = 0
                if not kept:
                    has_room[room] = 0
            filled, rest = divmod(items, per_bin)
            if filled >= bins - kept:
                filled, rest = bins - kept, 0
            else:
                left = room - rest * length
                bins_at[left] = bins_at.get(left, 0) + 1
                has_room[left] = 1
            left = room - per_bin * length
            if filled and left:
                bins_at[left] = bins_at.get(left, 0) + filled
                has_room[left] = 1
            items -= filled * per_bin + rest
    return sequences

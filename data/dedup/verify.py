"""Which of the documents that share a band are copies, by the exact Jaccard of their shingle sets.

In a bucket every document is compared with the leaders so far, not with all others: only a document unlike every
earlier leader becomes one, so a bucket of n copies costs n comparisons, not n². Two copies that only meet as
non-leaders of different leaders stay apart unless another band pairs them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from data.dedup.minhash import jaccard

# A bucket of so many unlike documents is a template, not a text; its further documents lead nothing.
MAX_LEADERS = 256
_CACHE_BYTES = 64 << 20
PAIR = np.dtype([("left", np.int64), ("right", np.int64), ("jaccard", np.float64)])


@dataclass(frozen=True)
class Verified:
    """pairs: PAIR [E], left < right, sorted, Jaccard >= threshold. compared: pairs looked at."""

    pairs: np.ndarray
    compared: int


def verified_pairs(
    buckets: Iterable[list[int]], shingle_set: Callable[[int], np.ndarray], threshold: float
) -> Verified:
    """Pairs of copies in `buckets`. shingle_set: sorted shingles of a document, uint64 [S]."""
    sets = _Cache(shingle_set)
    known: dict[tuple[int, int], float] = {}
    for bucket in buckets:
        leaders: list[int] = []
        for document in bucket:
            alike = False
            for leader in leaders:
                pair = (min(leader, document), max(leader, document))
                if pair not in known:
                    known[pair] = jaccard(sets(pair[0]), sets(pair[1]))
                alike = alike or known[pair] >= threshold
            if not alike and len(leaders) < MAX_LEADERS:
                leaders.append(document)
    found = [(*pair, value) for pair, value in sorted(known.items()) if value >= threshold]
    return Verified(np.array(found, dtype=PAIR), len(known))


class _Cache:
    """The shingle sets last used, up to _CACHE_BYTES."""

    def __init__(self, load: Callable[[int], np.ndarray]) -> None:
        self._load, self._held, self._bytes = load, OrderedDict[int, np.ndarray](), 0

    def __call__(self, document: int) -> np.ndarray:
        if document in self._held:
            self._held.move_to_end(document)
            return self._held[document]
        found = self._held[document] = self._load(document)
        self._bytes += found.nbytes
        while self._bytes > _CACHE_BYTES and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found

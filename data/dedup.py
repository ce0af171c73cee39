"""Exact and near duplicates: which documents go, and which copy of each stays.

Both are pure functions of the documents, whatever their order or how files are split: documents are first put in
canonical order (by id within source), and of a group of copies the longest stays, ties to the smallest (source, id).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.documents import Document
from data.minhash import MinHash, band_keys, jaccard, shingles, signatures


@dataclass(frozen=True)
class Duplicates:
    """Outcome over D documents. survivor: int64 [D], for each document the index of the copy that stays (itself if it
    stays).

    pairs: near-duplicate pairs (left < right) with their exact Jaccard, where they were verified.
    """

    survivor: np.ndarray
    pairs: tuple[tuple[int, int, float], ...] = ()

    @property
    def keep(self) -> np.ndarray:
        """bool [D], True for survivors."""
        return self.survivor == np.arange(len(self.survivor))


def survivors(label_D: np.ndarray, documents: Sequence[Document]) -> np.ndarray:
    """For each document the index of its group's survivor. label_D: int [D], equal for copies of each other."""
    best: dict[int, int] = {}
    for index, label in enumerate(label_D.tolist()):
        if label not in best or _rank(documents[index]) < _rank(documents[best[label]]):
            best[label] = index
    return np.array([best[label] for label in label_D.tolist()], dtype=np.int64)


def _rank(document: Document) -> tuple[int, str, str]:
    return (-len(document.text), document.source, document.id)


def exact_duplicates(documents: Sequence[Document]) -> Duplicates:
    """Documents whose texts are equal (by 128-bit xxh3 of their UTF-8 bytes)."""
    first: dict[bytes, int] = {}
    label_D = np.empty(len(documents), dtype=np.int64)
    for index, document in enumerate(documents):
        label_D[index] = first.setdefault(xxhash.xxh3_128_digest(document.text.encode()), index)
    return Duplicates(survivors(label_D, documents))


def near_duplicates(
    documents: Sequence[Document],
    parameters: MinHash,
    threshold: float,
    progress: Callable[[int], object] = lambda count: None,
    batch: int = 256,
) -> Duplicates:
    """Documents that share a band and whose shingle sets have Jaccard >= `threshold`, closed transitively.

    Closed over the pairs compared: in a bucket every document is compared with the leaders so far, not with all others.
    Two copies that only meet as non-leaders of different leaders stay apart unless another band pairs them.

    A pair of Jaccard J shares a band with probability 1 - (1 - J^rows)^bands. threshold 0 takes every shared band as a
    copy, unverified. progress: called with the number of documents just signed.
    """
    parts = []
    for first in range(0, len(documents), batch):
        texts = [document.text for document in documents[first : first + batch]]
        parts.append(signatures(texts, parameters))
        progress(len(texts))
    signature_DP = np.concatenate(parts) if parts else np.empty((0, parameters.permutations), dtype=np.uint64)
    empty_D = (signature_DP == np.iinfo(np.uint64).max).all(axis=1)
    order_D = sorted(range(len(documents)), key=lambda index: _rank(documents[index]))

    cache: dict[int, np.ndarray] = {}

    def similarity(left: int, right: int) -> float:
        for index in (left, right):
            if index not in cache:
                cache[index] = shingles(documents[index].text, parameters.shingle)
        return jaccard(cache[left], cache[right])

    known: dict[tuple[int, int], float] = {}
    for bucket in _buckets(band_keys(signature_DP, parameters), empty_D, np.array(order_D, dtype=np.int64)):
        leaders: list[int] = []
        # A bucket of n copies costs n comparisons, not n²: only documents unlike every earlier leader become leaders.
        for document in bucket:
            alike = False
            for leader in leaders:
                pair = (min(leader, document), max(leader, document))
                if pair not in known:
                    known[pair] = similarity(*pair) if threshold > 0 else 1.0
                alike = alike or known[pair] >= threshold
            if not alike:
                leaders.append(document)
    pairs = tuple((left, right, value) for (left, right), value in sorted(known.items()) if value >= threshold)
    return Duplicates(survivors(_components(len(documents), pairs), documents), pairs if threshold > 0 else ())


def _buckets(key_DB: np.ndarray, empty_D: np.ndarray, order_D: np.ndarray) -> Iterator[list[int]]:
    """Groups of at least two documents that share a band's key, each in the order of `order_D`; one band at a time
    bounds the memory.
    """
    order_D = order_D[~empty_D[order_D]]
    if not len(order_D):
        return
    for band in range(key_DB.shape[1]):
        key_D = key_DB[order_D, band]
        sorted_D = np.argsort(key_D, kind="stable")
        # No hash is special, so the first key starts a group by comparing it with a changed copy of itself.
        starts = np.flatnonzero(np.diff(key_D[sorted_D], prepend=key_D[sorted_D][:1] ^ np.uint64(1)))
        for group in np.split(order_D[sorted_D], starts)[1:]:
            if len(group) > 1:
                yield group.tolist()


def _components(count: int, pairs: Sequence[tuple[int, int, float]]) -> np.ndarray:
    left = [pair[0] for pair in pairs]
    right = [pair[1] for pair in pairs]
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1]

"""Exact and near duplicates among documents held in memory: the same steps as the tasks over files.

A pure function of the documents, whatever their order: of a group of copies the longest stays, ties to the smallest
(source, id).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data.dedup.bands import buckets, each_bucket, star_edges
from data.dedup.exact import equal_documents, text_keys
from data.dedup.groups import components, survivors
from data.dedup.minhash import EMPTY, MinHash, band_keys, shingles, signatures
from data.dedup.verify import PAIR, verified_pairs
from data.documents import Document
from data.hashing import key64


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


def exact_duplicates(documents: Sequence[Document]) -> Duplicates:
    """Documents whose texts are equal (by 128-bit xxh3 of their UTF-8 bytes)."""
    if not documents:
        return Duplicates(np.empty(0, dtype=np.int64))
    length_D, identity_D = _ranks(documents)
    same_D = equal_documents(text_keys([document.text for document in documents]), length_D, identity_D)
    return Duplicates(survivors(same_D, length_D, _identities(documents)))


def near_duplicates(
    documents: Sequence[Document],
    parameters: MinHash,
    threshold: float,
    progress: Callable[[int], object] = lambda count: None,
    batch: int = 256,
) -> Duplicates:
    """Documents that share a band and whose shingle sets have Jaccard >= `threshold`, closed transitively over the
    pairs compared (`data.dedup.verify`).

    A pair of Jaccard J shares a band with probability 1 - (1 - J^rows)^bands. threshold 0 takes every shared band as a
    copy, unverified. progress: called with the number of documents just signed.
    """
    if not documents:
        return Duplicates(np.empty(0, dtype=np.int64))
    parts = []
    for first in range(0, len(documents), batch):
        texts = [document.text for document in documents[first : first + batch]]
        parts.append(signatures(texts, parameters))
        progress(len(texts))
    signature_DP = np.concatenate(parts)
    signed_D = (signature_DP != EMPTY).any(axis=1)
    length_D, identity_D = _ranks(documents)
    key_DB = band_keys(signature_DP, parameters)
    bands = (buckets(key_DB[:, band], length_D, identity_D, signed_D) for band in range(parameters.bands))
    if threshold > 0:
        found = (bucket for band in bands for bucket in each_bucket(*band))
        pairs = verified_pairs(found, lambda i: shingles(documents[i].text, parameters.shingle), threshold).pairs
        left_E, right_E = pairs["left"], pairs["right"]
    else:
        stars = [star_edges(*band) for band in bands]
        left_E, right_E = (np.concatenate(side) for side in zip(*stars))
        pairs = np.empty(0, dtype=PAIR)
    label_D = components(len(documents), left_E, right_E)
    survivor_D = survivors(label_D, length_D, _identities(documents))
    return Duplicates(survivor_D, tuple((int(left), int(right), float(value)) for left, right, value in pairs.tolist()))


def _ranks(documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    length_D = np.array([len(document.text) for document in documents], dtype=np.int64)
    keys = [key64(document.source, document.id) for document in documents]
    return length_D, np.array(keys, dtype=np.uint64)


def _identities(documents: Sequence[Document]) -> pa.Table:
    return pa.table({"source": [document.source for document in documents], "id": [d.id for d in documents]})

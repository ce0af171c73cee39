"""Buckets of one band: documents with the same key, and the edges of a star from the first to the others.

A star ties n copies together with n - 1 edges. What is in a bucket and which document is its centre depend on keys,
lengths and identities alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.dedup.groups import by_rank
from data.hashing import UINT64, key64, mix

SCOPES = ("global", "language", "dump")


def scope_keys(names: list[str]) -> np.ndarray:
    """uint64 [D]: what is mixed into the keys of documents so that only those of one name meet."""
    distinct = {name: key64("scope", name) for name in set(names)}
    return np.array([distinct[name] for name in names], dtype=UINT64)


def scoped(key_DK: np.ndarray, scope_D: np.ndarray) -> np.ndarray:
    """Keys uint64 [D, K] that are equal only where the scopes are, too."""
    with np.errstate(over="ignore"):
        return mix(key_DK ^ mix(scope_D)[:, None])


def buckets(
    key_D: np.ndarray, length_D: np.ndarray, identity_D: np.ndarray, taking_part_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of at least two documents: members int64 [M], one bucket after the other, each by rank; edges int64
    [K + 1]: bucket k is members[edges[k]:edges[k + 1]]. taking_part: bool [D].
    """
    index_D = np.flatnonzero(taking_part_D)
    index_D = index_D[np.argsort(key_D[index_D], kind="stable")]
    sorted_D = key_D[index_D]
    same_D = sorted_D[1:] == sorted_D[:-1]
    shared_D = np.zeros(len(index_D), dtype=bool)
    shared_D[1:] |= same_D
    shared_D[:-1] |= same_D
    member_M, key_M = index_D[shared_D], sorted_D[shared_D]
    if not len(member_M):
        return member_M, np.zeros(1, dtype=np.int64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(key_M)) + 1, [len(key_M)]])
    group_M = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return member_M[by_rank(group_M, length_D[member_M], identity_D[member_M])], starts


def each_bucket(member_M: np.ndarray, edge_K: np.ndarray) -> Iterator[list[int]]:
    """The buckets as lists of documents."""
    for first, last in zip(edge_K[:-1].tolist(), edge_K[1:].tolist()):
        yield member_M[first:last].tolist()


def star_edges(member_M: np.ndarray, edge_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges from each bucket's first document to its others: left int64 [E], right int64 [E]."""
    centre_M = np.repeat(member_M[edge_K[:-1]], np.diff(edge_K))
    other_M = centre_M != member_M
    return centre_M[other_M], member_M[other_M]


def packed(member_M: np.ndarray, edge_K: np.ndarray) -> np.ndarray:
    """Buckets as one array int64 [M]: the members, the first of each bucket as ~document."""
    packed_M = member_M.copy()
    packed_M[edge_K[:-1]] = ~packed_M[edge_K[:-1]]
    return packed_M


def unpacked(packed_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members and edges of `packed`."""
    edge_K = np.append(np.flatnonzero(packed_M < 0), len(packed_M))
    return np.where(packed_M < 0, ~packed_M, packed_M), edge_K

"""Texts as keys: two documents whose texts are equal byte for byte have the same 128-bit key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from data.dedup.groups import by_rank


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """xxh3_128 of the UTF-8 bytes of each text, uint64 [D, 2]: the high and the low half."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(len(texts), 2)


def equal_documents(key_D2: np.ndarray, length_D: np.ndarray, identity_D: np.ndarray) -> np.ndarray:
    """For each document the index of the first, by rank, of those with the same key; int64 [D]."""
    order_D = np.lexsort((key_D2[:, 1], key_D2[:, 0]))
    changed_D = np.ones(len(order_D), dtype=bool)
    changed_D[1:] = (key_D2[order_D[1:]] != key_D2[order_D[:-1]]).any(axis=1)
    group_D = np.empty(len(order_D), dtype=np.int64)
    group_D[order_D] = np.cumsum(changed_D) - 1
    ranked_D = by_rank(group_D, length_D, identity_D)
    # The first of each group in rank order, written back to all of the group.
    sorted_D = group_D[ranked_D]
    first_G = ranked_D[np.flatnonzero(np.diff(sorted_D, prepend=-1))]
    return first_G[group_D] if len(group_D) else group_D

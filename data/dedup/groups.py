"""Groups of copies: connected components of edges, and the rank of documents inside a group.

The survivor of a group is its longest document, ties to the smallest (source, id). Where only some fixed order that no
file split can change is wanted, a 64-bit hash of the identity stands for (source, id).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def by_rank(group_M: np.ndarray, length_M: np.ndarray, identity_M: np.ndarray) -> np.ndarray:
    """Indices that sort by group, in a group by length (longest first), then by the identity's hash; int64 [M]."""
    return np.lexsort((identity_M, -length_M, group_M))


def components(count: int, left_E: np.ndarray, right_E: np.ndarray) -> np.ndarray:
    """A label for each of `count` documents, int32 [D], equal where edges left[e] - right[e] connect them."""
    graph = coo_array((np.ones(len(left_E), dtype=np.int8), (left_E, right_E)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1])


def survivors(group_M: np.ndarray, length_M: np.ndarray, identities: pa.Table) -> np.ndarray:
    """For each of M documents the index of its group's survivor, int64 [M]. identities: M rows of source and id."""
    table = pa.table(
        {
            "group": pa.array(group_M),
            "shorter": pa.array(-length_M),
            "source": identities["source"],
            "id": identities["id"],
        }
    )
    keys = [(name, "ascending") for name in table.column_names]
    order_M = pc.sort_indices(table, sort_keys=keys).to_numpy()
    starts = np.flatnonzero(np.diff(group_M[order_M], prepend=-1))
    survivor_M = np.empty(len(group_M), dtype=np.int64)
    survivor_M[order_M] = np.repeat(order_M[starts], np.diff(np.append(starts, len(order_M))))
    return survivor_M

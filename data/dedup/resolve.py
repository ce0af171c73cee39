"""From pairs of copies to what stays: survivors, how many documents each stands for, and the list of what goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.dedup.groups import components, survivors
from data.dedup.settings import EARLIER, select_rows, shard_edges
from data.stages.contract import Counts

# A document of this corpus that an earlier one holds: number there, and the Jaccard that their sketches estimate.
MATCH = np.dtype([("document", np.int64), ("old", np.int64), ("jaccard", np.float64)])
REMOVED = pa.schema(
    [
        ("source", pa.string()),
        ("id", pa.string()),
        ("kind", pa.string()),
        ("kept_source", pa.string()),
        ("kept_id", pa.string()),
        ("like_source", pa.string()),
        ("like_id", pa.string()),
        ("jaccard", pa.float64()),
    ]
)
EXACT, NEAR, OLD = "exact", "near", "earlier"
KINDS = ("kept", EXACT, NEAR, OLD)
_IDENTITY = ("source", "id")


@dataclass(frozen=True)
class Evidence:
    """first: int64 [D], the first of each document's equals. rank: RANK [D]. pairs: PAIR [E], Jaccard nan where not
    verified. earlier: MATCH, sorted by document, and the file of identities they point into.
    """

    first: np.ndarray
    rank: np.ndarray
    pairs: np.ndarray
    earlier: tuple[np.ndarray, str] | None = None


def resolved(evidence: Evidence, shards: Sequence[str], out: Path) -> Counts:
    """Write survivor.npy int64 [D], copies.npy int32 [D], kind.npy uint8 [D] (index in KINDS) and removed.parquet.

    survivor: the document that stays; itself for one that stays; EARLIER for the whole group of a document that an
    earlier corpus holds. copies: documents of the group, itself included; 0 for one that goes. removed: for every
    document that goes the one that `kept` it out, and the one it is most `like` among those it was compared with.
    """
    first_D, rank_D, pairs = evidence.first, evidence.rank, evidence.pairs
    count = len(first_D)
    copy_C = np.flatnonzero(first_D != np.arange(count))
    left_E, right_E = np.concatenate([pairs["left"], first_D[copy_C]]), np.concatenate([pairs["right"], copy_C])
    label_D = components(count, left_E, right_E)
    match = evidence.earlier[0] if evidence.earlier else np.empty(0, dtype=MATCH)
    old_G = np.zeros(count, dtype=bool)
    old_G[label_D[match["document"]]] = True
    copies_D = np.bincount(label_D, minlength=count)[label_D].astype(np.int32)

    index_M = np.flatnonzero((copies_D > 1) | old_G[label_D])
    identities = _identities(shards, index_M)
    best_M = survivors(label_D[index_M], rank_D["length"][index_M], identities)
    survivor_D = np.arange(count)
    survivor_D[index_M] = index_M[best_M]
    kept_D = survivor_D.copy()
    survivor_D[old_G[label_D]] = EARLIER
    copies_D[survivor_D != np.arange(count)] = 0
    np.save(out / "survivor.npy", survivor_D)
    np.save(out / "copies.npy", copies_D)

    gone_R = np.flatnonzero(survivor_D != np.arange(count))
    like_R, jaccard_R = _most_like(evidence, gone_R, kept_D)
    equal_R = (first_D[gone_R] != gone_R) | (first_D[gone_R] == first_D[kept_D[gone_R]])
    kind_R = np.where(equal_R, KINDS.index(EXACT), KINDS.index(NEAR)).astype(np.uint8)
    kind_R[old_G[label_D[gone_R]]] = KINDS.index(OLD)
    kind_D = np.zeros(count, dtype=np.uint8)
    kind_D[gone_R] = kind_R
    np.save(out / "kind.npy", kind_D)

    def named(number_R: np.ndarray) -> pa.Table:
        return identities.take(pa.array(np.searchsorted(index_M, number_R)))

    removed, kept, like = named(gone_R), named(kept_D[gone_R]), named(like_R)
    if evidence.earlier:
        kept, like, jaccard_R = _old_names(evidence, label_D, gone_R, kept, like, jaccard_R)
    columns = [
        *(removed[name] for name in _IDENTITY),
        pa.array([KINDS[kind] for kind in kind_R.tolist()], pa.string()),
        *(kept[name] for name in _IDENTITY),
        *(like[name] for name in _IDENTITY),
        pa.array(jaccard_R, pa.float64(), mask=np.isnan(jaccard_R)),
    ]
    table = pa.Table.from_arrays(columns, schema=REMOVED)
    table = table.sort_by([(name, "ascending") for name in _IDENTITY])
    pq.write_table(table, out / "removed.parquet", compression="zstd")
    return {kind: int((kind_D == number).sum()) for number, kind in enumerate(KINDS)}


def _identities(shards: Sequence[str], index_M: np.ndarray) -> pa.Table:
    edges = shard_edges(shards)
    cut = np.searchsorted(index_M, edges)
    parts = [
        select_rows(shard, _IDENTITY, index_M[cut[number] : cut[number + 1]] - edges[number])
        for number, shard in enumerate(shards)
    ]
    return pa.concat_tables([part.select(_IDENTITY).cast(_NAMES) for part in parts]).combine_chunks()


_NAMES = pa.schema([(name, pa.string()) for name in _IDENTITY])


def _most_like(evidence: Evidence, gone_R: np.ndarray, kept_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The document with the highest Jaccard among those compared with each that goes (equals: 1), ties to the first by
    rank; itself, nan, where there is none.
    """
    first_D, rank_D, pairs = evidence.first, evidence.rank, evidence.pairs
    like_D, jaccard_D = np.arange(len(first_D)), np.full(len(first_D), np.nan)
    from_E = np.concatenate([pairs["left"], pairs["right"]])
    to_E = np.concatenate([pairs["right"], pairs["left"]])
    value_E = np.concatenate([pairs["jaccard"]] * 2)
    order_E = np.lexsort((rank_D["identity"][to_E], -rank_D["length"][to_E], -np.nan_to_num(value_E), from_E))
    starts = np.flatnonzero(np.diff(from_E[order_E], prepend=-1))
    best_E = order_E[starts]
    like_D[from_E[best_E]], jaccard_D[from_E[best_E]] = to_E[best_E], value_E[best_E]
    # An equal that stays is nearer than anything else.
    equal_D = (first_D[kept_D] == first_D) & (kept_D != np.arange(len(first_D)))
    like_D[equal_D], jaccard_D[equal_D] = kept_D[equal_D], 1.0
    copy_C = np.flatnonzero((first_D != np.arange(len(first_D))) & ~equal_D)
    like_D[copy_C], jaccard_D[copy_C] = first_D[copy_C], 1.0
    return like_D[gone_R], jaccard_D[gone_R]


def _old_names(
    evidence: Evidence, label_D: np.ndarray, gone_R: np.ndarray, kept: pa.Table, like: pa.Table, jaccard_R: np.ndarray
) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """`kept`, `like` and their Jaccard, with the documents of the earlier corpus where those are what was met."""
    assert evidence.earlier is not None
    match, path = evidence.earlier
    old_U = np.unique(match["old"])
    names = select_rows(path, _IDENTITY, old_U).cast(_NAMES)
    rank = evidence.rank[match["document"]]
    order = np.lexsort((rank["identity"], -rank["length"], label_D[match["document"]]))
    group_G, start_G = np.unique(label_D[match["document"][order]], return_index=True)
    place_R = np.searchsorted(group_G, label_D[gone_R])
    place_R[place_R == len(group_G)] = 0
    in_group_R = group_G[place_R] == label_D[gone_R] if len(group_G) else np.zeros(len(gone_R), dtype=bool)
    kept_old_R = match["old"][order[start_G[place_R[in_group_R]]]]
    itself_R = np.isin(gone_R, match["document"])
    own = match[np.searchsorted(match["document"], gone_R[itself_R])]
    jaccard_R = jaccard_R.copy()
    jaccard_R[itself_R] = own["jaccard"]
    return (
        _replaced(kept, in_group_R, names.take(pa.array(np.searchsorted(old_U, kept_old_R)))),
        _replaced(like, itself_R, names.take(pa.array(np.searchsorted(old_U, own["old"])))),
        jaccard_R,
    )


def _replaced(table: pa.Table, where_R: np.ndarray, rows: pa.Table) -> pa.Table:
    """`table` with the rows at `where` replaced by `rows`, in order."""
    take_R = np.arange(len(table))
    take_R[where_R] = len(table) + np.arange(len(rows))
    return pa.concat_tables([table, rows]).take(pa.array(take_R))

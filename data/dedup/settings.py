"""What dedup over files is told, and the form of its arrays.

Documents are numbered through all shards: shard after shard, row after row. No outcome depends on those numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.dedup.bands import SCOPES
from data.dedup.minhash import MinHash
from data.errors import UsageError

# length: characters. identity: 64-bit hash of (source, id). empty: no tokens, so no band.
RANK = np.dtype([("length", np.int64), ("identity", np.uint64), ("empty", np.bool_)])
EARLIER = -1  # survivor of documents that an earlier corpus holds already
READ_DOCUMENTS = 1024


@dataclass(frozen=True)
class DedupSettings:
    """threshold: exact Jaccard from which two documents are copies; 0: every shared band counts, nothing is verified.

    scope: copies are looked for in everything ("global"), within a language, or within a dump. dumps: (source, dump)
    for sources whose dump has another name than theirs. parts: pieces in which pairs are verified.
    """

    minhash: MinHash = field(default_factory=MinHash)
    threshold: float = 0.7
    scope: str = "global"
    dumps: tuple[tuple[str, str], ...] = ()
    parts: int = 8

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise UsageError(f"dedup.scope: found '{self.scope}', allowed {', '.join(SCOPES)}")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"dedup.threshold: found {self.threshold}, allowed 0 to 1")

    def scopes(self, documents: pa.Table) -> list[str]:
        """The scope of each document."""
        if self.scope == "global":
            return [""] * len(documents)
        if self.scope == "language":
            return documents["language"].to_pylist()
        dumps = dict(self.dumps)
        return [dumps.get(source, source) for source in documents["source"].to_pylist()]


def joined_band(paths: Sequence[str | Path], band: int) -> np.ndarray:
    """The keys of one band of all shards, uint64 [D], from their arrays uint64 [B, D]."""
    return np.concatenate([np.load(path, mmap_mode="r")[band] for path in paths])


def read_documents(shard: str | Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A shard of documents, READ_DOCUMENTS rows at a time."""
    with pq.ParquetFile(shard) as file:
        for batch in file.iter_batches(READ_DOCUMENTS, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def select_rows(shard: str | Path, columns: Sequence[str], row_N: np.ndarray) -> pa.Table:
    """The given rows (sorted) of a shard, with little more than them in memory."""
    parts, first = [], 0
    for documents in read_documents(shard, columns):
        low, high = np.searchsorted(row_N, [first, first + len(documents)])
        if high > low:
            parts.append(documents.take(pa.array(row_N[low:high] - first)))
        first += len(documents)
    if parts:
        return pa.concat_tables(parts)
    return pa.table({name: pa.array([], pq.read_schema(shard).field(name).type) for name in columns})


def shard_edges(shards: Sequence[str | Path]) -> list[int]:
    """Number of the first document of each shard, and the count of all."""
    edges = [0]
    for shard in shards:
        edges.append(edges[-1] + pq.read_metadata(shard).num_rows)
    return edges


def joined(paths: Sequence[str | Path]) -> np.ndarray:
    """One array of the shards' arrays."""
    return np.concatenate([np.load(path) for path in paths])

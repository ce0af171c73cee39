"""Document shards: parquet files of `data.documents.DOCUMENTS`, read and written in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.documents import DOCUMENTS
from data.stages.contract import Counts

SHARD_FILE = "documents.parquet"
BATCH_DOCUMENTS = 1024
Totals = dict[str, list[int]]
"""language -> [documents, UTF-8 bytes of their texts]"""


class ShardWriter:
    """Writes one shard batch by batch; `totals` says what it holds."""

    def __init__(self, path: Path, schema: pa.Schema = DOCUMENTS) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
        self._schema = schema
        self.totals: Totals = {}
        self.bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._writer.close()

    def write(self, documents: pa.Table) -> None:
        """Append documents in the order given."""
        if not documents.num_rows:
            return
        self._writer.write_table(documents.select(self._schema.names).cast(self._schema))
        found = totals(documents)
        self.bytes += sum(size for _, size in found.values())
        add(self.totals, found)


def read_shard(path: str | Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A shard in batches of at most BATCH_DOCUMENTS documents."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(BATCH_DOCUMENTS, columns=columns):
            yield pa.Table.from_batches([batch])


def text_bytes(documents: pa.Table) -> pa.Array:
    """UTF-8 bytes of each text, int64."""
    return pc.cast(pc.binary_length(documents["text"]), pa.int64())


def totals(documents: pa.Table) -> Totals:
    """Documents and bytes by language."""
    sized = pa.table({"language": documents["language"], "bytes": text_bytes(documents)})
    grouped = sized.group_by("language").aggregate([("bytes", "count"), ("bytes", "sum")])
    return {row["language"]: [row["bytes_count"], row["bytes_sum"]] for row in grouped.to_pylist()}


def add(left: Totals, right: Totals) -> Totals:
    """Adds `right` to `left` in place and returns it."""
    for language, (documents, size) in right.items():
        held = left.setdefault(language, [0, 0])
        held[0] += documents
        held[1] += size
    return left


def total(counts: list[Counts], key: str = "documents") -> Totals:
    """Sum of a field of totals over the counts of many tasks."""
    summed: Totals = {}
    for count in counts:
        add(summed, count.get(key, {}))
    return summed


def shard_documents(counts: Counts) -> int:
    """Documents in a shard, from its counts."""
    return sum(documents for documents, _ in counts["documents"].values())

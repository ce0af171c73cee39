"""Shards of made-up documents, and dedup over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.plain_stages import PlainRun
from data.dedup.settings import DedupSettings
from data.dedup.stages import Deduplicated, deduplicate
from data.documents import DOCUMENTS, Document


def write_shards(directory: Path, documents: Sequence[Document], sizes: Sequence[int]) -> list[str]:
    """Shards of the given numbers of documents, the rest in a last one."""
    directory.mkdir(parents=True)
    paths, first = [], 0
    for number, size in enumerate([*sizes, len(documents) - sum(sizes)]):
        part = documents[first : first + size]
        rows = [{"source": d.source, "id": d.id, "language": d.language, "text": d.text} for d in part]
        pq.write_table(pa.Table.from_pylist(rows, DOCUMENTS), directory / f"{number:05d}.parquet")
        paths.append(str(directory / f"{number:05d}.parquet"))
        first += size
    return paths


def run_dedup(
    work: Path, shards: list[str], settings: DedupSettings, workers: int = 1, earlier: Path | None = None
) -> Deduplicated:
    return deduplicate(PlainRun(work, workers), shards, settings, earlier)


def kept(outcome: Deduplicated) -> dict[tuple[str, str], int]:
    """(source, id) of the survivors and how many documents each stands for."""
    rows = pa.concat_tables([pq.read_table(shard) for shard in outcome.shards])
    return {(row["source"], row["id"]): row["copies"] for row in rows.select(["source", "id", "copies"]).to_pylist()}

"""One side of the dedup benchmark in a process of its own, so that its CPU time and peak memory are its own.

    python -m benchmarks.dedup_sides SIDE WORK [SHARD ...]

SIDE: signatures (of the texts, nothing else), unverified or verified (the whole path over files), synthetic-N (makes N
short documents below WORK and takes the whole path). The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.plain_stages import PlainRun, peak_bytes
from data.dedup.minhash import MinHash, signatures
from data.dedup.settings import DedupSettings, read_documents
from data.dedup.stages import deduplicate
from data.documents import DOCUMENTS

SHARD_DOCUMENTS = 100_000
SYNTHETIC_TOKENS = 30
COPY_SHARE = 0.1


def main(arguments: Sequence[str]) -> int:
    side, work, *shards = arguments
    signatures(["warm 起来"], MinHash())  # the tables of Unicode
    if side.startswith("synthetic-"):
        shards = synthetic(Path(work) / "in", int(side.partition("-")[2]))
    started = time.process_time()
    counts = _signatures(shards) if side == "signatures" else _path(side, Path(work), shards)
    seconds = time.process_time() - started
    documents = sum(pq.read_metadata(shard).num_rows for shard in shards)
    print(json.dumps({"side": side, "documents": documents, "cpu_s": seconds, "peak_bytes": peak_bytes(), **counts}))
    return 0


def _signatures(shards: Sequence[str]) -> dict[str, Any]:
    for shard in shards:
        for documents in read_documents(shard, ("text",)):
            signatures(documents["text"].to_pylist(), MinHash())
    return {}


def _path(side: str, work: Path, shards: list[str]) -> dict[str, Any]:
    run = _Timed(PlainRun(work / "stages"))
    settings = DedupSettings(threshold=0.0 if side == "unverified" else 0.7)
    counts = deduplicate(run, shards, settings).counts
    return {"counts": counts, "stages": run.seconds}


class _Timed:
    """A run that notes the CPU-seconds of every stage."""

    def __init__(self, run: PlainRun) -> None:
        self._run, self.seconds = run, dict[str, float]()

    def __call__(self, stage: str, *arguments: Any) -> Any:
        started = time.process_time()
        done = self._run(stage, *arguments)
        self.seconds[stage] = round(time.process_time() - started, 3)
        return done


def synthetic(directory: Path, count: int) -> list[str]:
    """Shards of `count` documents of 30 words each, a tenth of them copies of earlier ones with one word changed."""
    directory.mkdir(parents=True)
    rng = np.random.Generator(np.random.PCG64(5))
    words = np.array([f"w{number:x}" for number in range(50_000)], dtype=object)
    paths = []
    before = np.empty((0, SYNTHETIC_TOKENS), dtype=np.int64)
    for number, first in enumerate(range(0, count, SHARD_DOCUMENTS)):
        size = min(SHARD_DOCUMENTS, count - first)
        token_DN = rng.integers(0, len(words), (size, SYNTHETIC_TOKENS))
        if len(before):
            copies = rng.choice(size, int(COPY_SHARE * size), replace=False)
            token_DN[copies] = before[rng.integers(0, len(before), len(copies))]
            token_DN[copies, 0] = rng.integers(0, len(words), len(copies))
        texts = [" ".join(row) for row in words[token_DN].tolist()]
        ids = [f"{first + row:09d}" for row in range(size)]
        table = pa.table([["made"] * size, ids, ["en"] * size, texts], schema=DOCUMENTS)
        paths.append(str(directory / f"{number:05d}.parquet"))
        pq.write_table(table, paths[-1], compression="zstd", row_group_size=8192)
        before = token_DN
    return paths


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

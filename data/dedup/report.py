"""What was removed, to be looked at: pairs of texts side by side, cut down to where they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.dedup.minhash import jaccard, shingles
from data.dedup.resolve import OLD
from data.dedup.settings import read_documents
from data.hashing import key64
from data.stages.contract import Counts, Task

EXAMPLES_FILE = "examples.json"
_CONTEXT = 40
_DIFFERENCE = 160
_COMPARED_CHARACTERS = 240


@dataclass(frozen=True)
class Shown:
    """Settings of `examples`. each: examples of every kind and language. shards: of documents."""

    each: int
    shards: int
    shingle: int = 5


@dataclass(frozen=True)
class Difference:
    """Two texts around their first difference: before and after are common to both."""

    before: str
    removed: str
    kept: str
    after: str


def difference(removed: str, kept: str) -> Difference:
    """The first stretch in which the texts differ, with the common text around it; empty where they are equal."""
    same = next((i for i, (a, b) in enumerate(zip(removed, kept)) if a != b), min(len(removed), len(kept)))
    left, right = removed[same : same + _COMPARED_CHARACTERS], kept[same : same + _COMPARED_CHARACTERS]
    block = SequenceMatcher(None, left, right, autojunk=False).find_longest_match()
    if block.size:
        # Of the stretch before the longest common part only the first difference is shown.
        codes = SequenceMatcher(None, left[: block.a + block.size], right[: block.b + block.size], autojunk=False)
        blocks = [each for each in codes.get_matching_blocks() if each.size >= min(8, block.size)]
        block = blocks[0] if blocks else block
    return Difference(
        removed[max(0, same - _CONTEXT) : same],
        left[: block.a if block.size else None][:_DIFFERENCE],
        right[: block.b if block.size else None][:_DIFFERENCE],
        left[block.a :][:_CONTEXT] if block.size else "",
    )


def examples(task: Task, out: Path) -> Counts:
    """inputs: removed.parquet, all shards. Settings: Shown. Output: examples.json, a list; each has kind, removed, kept
    (source and id), jaccard (exact; null where the kept document is of an earlier corpus) and the difference.
    """
    shown: Shown = task.settings
    removed = pq.read_table(task.inputs[0])
    rows = _chosen(removed, shown.each)
    wanted = {(row["source"], row["id"]) for row in rows} | {(row["kept_source"], row["kept_id"]) for row in rows}
    texts = _texts(task.inputs[1:], wanted)
    found: list[dict[str, Any]] = []
    for row in rows:
        text = texts[row["source"], row["id"]]
        example: dict[str, Any] = {
            "kind": row["kind"],
            "removed": [row["source"], row["id"]],
            "kept": [row["kept_source"], row["kept_id"]],
            "jaccard": None,
            "estimate": row["jaccard"] if row["kind"] == OLD else None,
        }
        if row["kind"] == OLD:
            example["difference"] = asdict(Difference(text[: _CONTEXT + _DIFFERENCE], "", "", ""))
        else:
            kept = texts[row["kept_source"], row["kept_id"]]
            example["jaccard"] = jaccard(shingles(text, shown.shingle), shingles(kept, shown.shingle))
            example["difference"] = asdict(difference(text, kept))
        found.append(example)
    (out / EXAMPLES_FILE).write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return {"examples": len(found)}


def _chosen(removed: pa.Table, each: int) -> list[dict[str, Any]]:
    """Up to `each` rows of every kind and source, by a hash of their identities."""
    rows: list[dict[str, Any]] = []
    for kind in pc.unique(removed["kind"]).to_pylist():
        for source in pc.unique(removed["source"]).to_pylist():
            group = removed.filter(pc.and_(pc.equal(removed["kind"], kind), pc.equal(removed["source"], source)))
            keys = np.array([key64("example", source, id_) for id_ in group["id"].to_pylist()], dtype=np.uint64)
            rows += group.take(pa.array(np.argsort(keys, kind="stable")[:each])).to_pylist()
    return sorted(rows, key=lambda row: (row["kind"], row["source"], row["id"]))


def _texts(shards: Sequence[str], wanted: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    ids = pa.array(sorted({id_ for _, id_ in wanted}), pa.string())
    texts = {}
    for shard in shards:
        for documents in read_documents(shard, ("source", "id", "text")):
            some = documents.filter(pc.is_in(documents["id"], ids))
            for row in some.to_pylist():
                if (row["source"], row["id"]) in wanted:
                    texts[row["source"], row["id"]] = row["text"]
    return texts

"""Clean: each shard to the documents worth keeping, in one form of text, with the count of every reason to drop one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data.clean.language import language
from data.clean.normalise import normalise
from data.config import AUTO
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import SHARD_FILE, ShardWriter, add, read_shard, totals


@dataclass(frozen=True)
class CleanSettings:
    """language: what the source declares, or "auto"."""

    source: str
    language: str


def clean_shards(
    runner: Runner, imported: Mapping[str, list[Done]], languages: Mapping[str, str]
) -> dict[str, list[Done]]:
    """Cleaned shards of every source, one for each imported. languages: as the sources declare them."""
    cleaned = {}
    tasks = {
        name: [
            Task("clean", part.name, (part.file(SHARD_FILE),), CleanSettings(name, languages[name])) for part in parts
        ]
        for name, parts in imported.items()
    }
    done = iter(runner.run("clean", [task for group in tasks.values() for task in group], clean_shard))
    for name, group in tasks.items():
        cleaned[name] = [next(done) for _ in group]
    return cleaned


def clean_shard(task: Task, directory: Path) -> Counts:
    """One shard. Counts: "read", by language as found where the source declares none, and "dropped" by reason."""
    settings = task.settings
    read: dict[str, list[int]] = {}
    left: dict[str, dict[str, list[int]]] = {"normalised": {}, "language": {}}
    with ShardWriter(directory / SHARD_FILE) as shard:
        for documents in read_shard(task.inputs[0]):
            texts = [normalise(text) for text in documents["text"].to_pylist()]
            found = [language(text) for text in texts]
            labels = found if settings.language == AUTO else [settings.language] * len(found)
            documents = documents.set_column(
                documents.schema.get_field_index("language"), "language", pa.array(labels, pa.string())
            )
            add(read, totals(documents))
            documents = documents.set_column(
                documents.schema.get_field_index("text"), "text", pa.array(texts, pa.large_string())
            )
            full = [bool(text) for text in texts]
            add(left["normalised"], totals(documents.filter(pa.array(full))))
            kept = [a and b == c for a, b, c in zip(full, found, labels, strict=True)]
            documents = documents.filter(pa.array(kept))
            add(left["language"], totals(documents))
            shard.write(documents)
    return {"read": read, "left": left, "documents": shard.totals, "source": settings.source}

"""Clean: each shard to the documents worth keeping, in one form of text, with the count of every reason to drop one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.clean.clean import C4_LINES, EMPTY, LANGUAGE, NORMALISED, CleanConfig, clean_batch
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import SHARD_FILE, ShardWriter, Totals, add, read_shard, total

Reasons = dict[str, Totals]
"""reason -> language -> [documents, bytes]"""


@dataclass(frozen=True)
class CleanSettings:
    """clean: of `data.clean.clean`."""

    clean: CleanConfig


def clean_shards(runner: Runner, imported: Mapping[str, list[Done]], settings: CleanConfig) -> dict[str, list[Done]]:
    """Cleaned shards of every source, one for each imported."""
    tasks = [
        Task("clean", part.name, (part.file(SHARD_FILE),), CleanSettings(settings))
        for parts in imported.values()
        for part in parts
    ]
    done = iter(runner.run("clean", tasks, clean_shard))
    return {name: [next(done) for _ in parts] for name, parts in imported.items()}


def clean_shard(task: Task, directory: Path) -> Counts:
    """One shard. Counts: "dropped" and "edited" as `data.clean.clean.Cleaned` has them."""
    dropped: Reasons = {}
    edited: Reasons = {}
    with ShardWriter(directory / SHARD_FILE) as shard:
        for documents in read_shard(task.inputs[0]):
            cleaned = clean_batch(documents, task.settings.clean)
            for summed, found in ((dropped, cleaned.dropped), (edited, cleaned.edited)):
                for reason, totals in found.items():
                    add(summed.setdefault(reason, {}), totals)
            shard.write(cleaned.kept)
    return {"documents": shard.totals, "dropped": dropped, "edited": edited}


def reasons(counts: Sequence[Counts], key: str) -> Reasons:
    """Sum of "dropped" or "edited" over many shards."""
    names = sorted({name for count in counts for name in count[key]})
    return {name: total([count[key] for count in counts], name) for name in names}


def left_by_step(counts: Sequence[Counts]) -> list[tuple[str, Totals]]:
    """What was left after reading, normalisation, the test of language and the quality filters, worked out backwards
    from what is kept. Bytes of a document that is dropped are those it was read with.
    """
    dropped, edited = reasons(counts, "dropped"), reasons(counts, "edited")
    quality = [totals for reason, totals in dropped.items() if reason not in (EMPTY, LANGUAGE)]
    left: Totals = total(list(counts))
    steps = [("quality", left)]
    for name, documents, only_bytes in (
        ("language", quality, edited.get(C4_LINES, {})),
        ("normalised", [dropped.get(LANGUAGE, {})], {}),
        ("read", [dropped.get(EMPTY, {})], edited.get(NORMALISED, {})),
    ):
        left = {language: list(found) for language, found in left.items()}
        for totals in documents:
            add(left, totals)
        add(left, {language: [0, size] for language, (_, size) in only_bytes.items()})
        steps.append((name, left))
    return steps[::-1]

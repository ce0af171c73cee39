"""The stages of dedup, wired: from shards of documents to shards of survivors.

deduplicated = deduplicate(runner.run, shards, DedupSettings())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.dedup import index as signature_index
from data.dedup import report, tasks
from data.dedup.settings import DedupSettings, shard_edges
from data.dedup.tasks import Counted, Row
from data.stages.contract import Task, TaskFunction

SIGNED = ("rank.npy", "text.npy", "sketch.npy", "band.npy")


class Finished(Protocol):
    """A finished task (`data.stages.marker.Done`)."""

    @property
    def counts(self) -> dict[str, Any]: ...

    def file(self, name: str) -> str: ...


Run = Callable[[str, Sequence[Task], TaskFunction], Sequence[Finished]]
"""Finishes the tasks of a stage: `data.stages.runner.Runner.run`."""


@dataclass(frozen=True)
class Deduplicated:
    """shards: survivors of each shard, with `copies`. removed: removed.parquet. examples: examples.json. index: the
    signature index's files. counts: documents kept, exact, near, earlier; pairs compared and found. parts: counts of
    `tasks.remove`, one shard each.
    """

    shards: list[str]
    removed: str
    examples: str
    index: list[str]
    counts: dict[str, int]
    parts: list[dict[str, Any]]


def deduplicate(
    run: Run, shards: Sequence[str], settings: DedupSettings, earlier: Path | None = None, each: int = 20
) -> Deduplicated:
    """Run all stages. earlier: directory of an earlier corpus's signature index, to which this one's documents yield.
    each: examples of every kind and source. Stages are named dedup/sign, dedup/exact, ...

    Errors: those of the tasks; DataError and UsageError for an index that is none or was made otherwise.
    """
    if earlier is not None:
        signature_index.check_index(earlier, settings)
    bands, count = settings.minhash.bands, len(shards)
    edges = shard_edges(shards)

    def stage(name: str, function: TaskFunction, named: Sequence[tuple[str, Sequence[str], Any]]) -> Sequence[Finished]:
        label = f"dedup/{name}"
        return run(label, [Task(label, task, tuple(inputs), own) for task, inputs, own in named], function)

    def each_shard(parts: Sequence[Finished], name: str) -> list[str]:
        return [part.file(name) for part in parts]

    signed = stage("sign", tasks.sign, [(_name(n), [shard], settings) for n, shard in enumerate(shards)])
    ranks = each_shard(signed, "rank.npy")
    (equal,) = stage("exact", tasks.exact, [("all", [*each_shard(signed, "text.npy"), *ranks], Counted(count))])
    first = equal.file("first.npy")
    keys = each_shard(signed, "band.npy")
    matched = stage(
        "match",
        tasks.match,
        [(_name(band), [*keys, *ranks, first], Counted(count, bands, part=band)) for band in range(bands)],
    )
    buckets = each_shard(matched, "bucket.npy")
    pairs, counts = buckets, {"compared": 0, "pairs": 0}
    if settings.threshold > 0:
        (groups,) = stage("join", tasks.join, [("all", [first, *buckets], Counted(count, bands))])
        wanted, rows = groups.file("wanted.npy"), [Row(edge, settings.minhash.shingle) for edge in edges]
        gathered = stage(
            "gather", tasks.gather, [(_name(n), [shard, wanted], rows[n]) for n, shard in enumerate(shards)]
        )
        sets = [part.file(name) for part in gathered for name in ("shingle.bin", "where.npy")]
        verified = stage(
            "verify",
            tasks.verify,
            [
                (
                    _name(part),
                    [groups.file("label.npy"), *buckets, *sets],
                    Counted(count, bands, part, settings.parts, settings.threshold),
                )
                for part in range(settings.parts)
            ],
        )
        pairs = each_shard(verified, "pair.npy")
        counts = {name: sum(part.counts[name] for part in verified) for name in counts}

    old: list[str] = []
    if earlier is not None:
        index = [str(earlier / name) for name in signature_index.index_files(bands)]
        own = [part.file(name) for part in signed for name in SIGNED]
        made = signature_index.Indexed(settings, count, earlier=True)
        (found,) = stage("earlier", signature_index.find_earlier, [("all", [first, *own, *index], made)])
        old = [found.file("earlier.npy"), str(earlier / signature_index.IDENTITY_FILE)]
    counted = Counted(count, bands, parts=settings.parts, threshold=settings.threshold)
    (outcome,) = stage("resolve", tasks.resolve, [("all", [first, *ranks, *shards, *pairs, *old], counted)])
    kind, copies, removed = (outcome.file(name) for name in ("kind.npy", "copies.npy", "removed.parquet"))
    kept = stage(
        "remove",
        tasks.remove,
        [(_name(n), [shard, kind, copies], Row(edges[n])) for n, shard in enumerate(shards)],
    )
    shown = report.Shown(each, count, settings.minhash.shingle)
    (example,) = stage("examples", report.examples, [("all", [removed, *shards], shown)])
    own = [
        path
        for shard, part in zip(shards, signed, strict=True)
        for path in (shard, *(part.file(name) for name in SIGNED))
    ]
    before = [str(earlier / name) for name in signature_index.index_files(bands)] if earlier is not None else []
    made = signature_index.Indexed(settings, count, earlier is not None)
    (indexed,) = stage(
        "index", signature_index.make_index, [("all", [outcome.file("survivor.npy"), *own, *before], made)]
    )
    return Deduplicated(
        each_shard(kept, "documents.parquet"),
        removed,
        example.file(report.EXAMPLES_FILE),
        [indexed.file(name) for name in signature_index.index_files(bands)],
        {**outcome.counts, **counts},
        [part.counts for part in kept],
    )


def _name(number: int) -> str:
    return f"{number:05d}"

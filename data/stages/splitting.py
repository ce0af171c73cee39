"""Split: whole documents held out by hash, after dedup, so that none of them has a copy in training.

Of a language those documents are held out whose 64-bit keys are smallest, whatever shards they lie in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.clean.clean import AUTO
from data.documents import SURVIVORS
from data.errors import DataError
from data.hashing import UINT64, canonical_json, key64
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import SHARD_FILE, ShardWriter, read_shard, total

HELDOUT_FILE = "heldout.parquet"


@dataclass(frozen=True)
class KeySettings:
    """seed: of the choice."""

    seed: int


@dataclass(frozen=True)
class LimitSettings:
    """How many documents of a language to hold out."""

    language: str
    count: int


@dataclass(frozen=True)
class DivideSettings:
    """limits: of each language, the largest key that is held out."""

    seed: int
    limits: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class GatherSettings:
    """language: whose held-out documents are put into one file."""

    language: str


def hold_out(
    runner: Runner, shards: Mapping[str, list[Done]], share: float, seed: int, declared: Mapping[str, str]
) -> tuple[dict[str, list[Done]], list[Done]]:
    """(training shards, one for each given; held-out documents by language, each in `LANGUAGE.jsonl`).

    Errors: DataError for a declared language with fewer than 2 documents and for a source with none left.
    """
    parts = [(name, part) for name, group in shards.items() for part in group]
    found = total([part.counts for _, part in parts])
    for language in sorted(set(declared.values()) - {AUTO}):
        if (left := found.get(language, [0, 0])[0]) < 2:
            raise DataError(f"language '{language}': {left} documents left after cleaning, need at least 2")
    limits = {}
    keys = [Task("split/keys", part.name, (part.file(SHARD_FILE),), KeySettings(seed)) for _, part in parts]
    keyed = runner.run("split/keys", keys, heldout_keys)
    tasks = []
    for language, (documents, _) in sorted(found.items()):
        count = min(documents - 1, max(1, round(documents * share)))
        inputs = tuple(done.file(f"{language}.npy") for done in keyed if f"{language}.npy" in done.outputs)
        if count:
            tasks.append(Task("split/limits", language, inputs, LimitSettings(language, count)))
    for done in runner.run("split/limits", tasks, heldout_limit):
        limits[done.name] = int(done.counts["limit"])
    settings = DivideSettings(seed, tuple(sorted(limits.items())))
    divide_tasks = [Task("split/documents", part.name, (part.file(SHARD_FILE),), settings) for _, part in parts]
    divided = runner.run("split/documents", divide_tasks, divide)
    gather = [
        Task("split/heldout", language, tuple(done.file(HELDOUT_FILE) for done in divided), GatherSettings(language))
        for language in sorted(limits)
    ]
    heldout = runner.run("split/heldout", gather, gather_heldout)
    training: dict[str, list[Done]] = {name: [] for name in shards}
    for (name, _), done in zip(parts, divided, strict=True):
        training[name].append(done)
    for name, group in training.items():
        if not total([done.counts for done in group]):
            raise DataError(f"source '{name}': no documents left to train on")
    return training, heldout


def _keys(documents: pa.Table, seed: int) -> np.ndarray:
    pairs = zip(documents["source"].to_pylist(), documents["id"].to_pylist(), strict=True)
    return np.array([key64("heldout", seed, source, identity) for source, identity in pairs], dtype=UINT64)


def heldout_keys(task: Task, directory: Path) -> Counts:
    """Keys of a shard's documents by language, uint64."""
    keys: dict[str, list[np.ndarray]] = {}
    for batch in read_shard(task.inputs[0], ["source", "id", "language"]):
        key_D = _keys(batch, task.settings.seed)
        languages = np.array(batch["language"].to_pylist())
        for language in np.unique(languages).tolist():
            keys.setdefault(language, []).append(key_D[languages == language])
    for language, found in keys.items():
        np.save(directory / f"{language}.npy", np.concatenate(found), allow_pickle=False)
    return {}


def heldout_limit(task: Task, directory: Path) -> Counts:
    """The largest of the `count` smallest keys; no more than twice as many are held at once, beside one shard's."""
    count = task.settings.count
    smallest_N = np.empty(0, dtype=UINT64)
    for path in task.inputs:
        smallest_N = np.concatenate([smallest_N, np.load(path, allow_pickle=False)])
        if len(smallest_N) > count:
            smallest_N = np.partition(smallest_N, count - 1)[:count]
    return {"limit": int(smallest_N.max())}


def divide(task: Task, directory: Path) -> Counts:
    """A shard's training documents and its held-out ones. Counts: documents left for training, and held out."""
    limits = dict(task.settings.limits)
    places = (directory / SHARD_FILE, directory / HELDOUT_FILE)
    with ShardWriter(places[0], SURVIVORS) as training, ShardWriter(places[1], SURVIVORS) as heldout:
        for batch in read_shard(task.inputs[0]):
            limit_D = np.array([limits.get(language, -1) for language in batch["language"].to_pylist()], dtype=object)
            out_D = np.array(_keys(batch, task.settings.seed).astype(object) <= limit_D, dtype=bool)
            training.write(batch.filter(pa.array(~out_D)))
            heldout.write(batch.filter(pa.array(out_D)))
    return {"documents": training.totals, "heldout": heldout.totals}


def gather_heldout(task: Task, directory: Path) -> Counts:
    """Held-out documents of a language as jsonl, in the order of (source, id)."""
    found = []
    for path in task.inputs:
        for batch in read_shard(path):
            found += [row for row in batch.to_pylist() if row["language"] == task.settings.language]
    found.sort(key=lambda row: (row["source"], row["id"]))
    lines = [canonical_json({key: row[key] for key in ("id", "text", "source", "copies")}) for row in found]
    (directory / f"{task.settings.language}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return {"heldout": {task.settings.language: [len(found), sum(len(row["text"].encode()) for row in found)]}}

"""Decontaminate: documents that share a run of tokens with a benchmark's texts are dropped, and named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.clean.decontaminate import BenchmarkIndex, Match, benchmark_index, matches
from data.config import DecontaminateConfig
from data.hashing import canonical_json
from data.sources.config import ReadConfig
from data.sources.files import SourceFile, list_files
from data.sources.read import read_batches
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import BATCH_DOCUMENTS, SHARD_FILE, ShardWriter, read_shard

INDEX_FILES = ("ngrams.npy", "owners.npy", "names.json")
MATCHES_FILE = "contaminated.jsonl"
FOLDER = "decontaminated"


@dataclass(frozen=True)
class BenchmarkSettings:
    """files: (name, bytes, form, compression) of each input."""

    files: tuple[tuple[str, int, str, str], ...]
    ngram: int
    read: ReadConfig


@dataclass(frozen=True)
class DropSettings:
    """ngram: tokens of a run."""

    ngram: int


@dataclass(frozen=True)
class JoinSettings:
    """None."""


@dataclass(frozen=True)
class Decontaminated:
    """shards: those left, one for each given. files: for the corpus, by name: path."""

    shards: dict[str, list[Done]]
    files: dict[str, str]


def drop_contaminated(runner: Runner, shards: Mapping[str, list[Done]], config: DecontaminateConfig) -> Decontaminated:
    """Shards without such documents; the corpus gets MATCHES_FILE, a line for every document dropped and benchmark text
    that it shares with.
    """
    files = [file for path in config.paths for file in list_files(path)]
    settings = BenchmarkSettings(
        tuple((file.name, file.bytes, file.form, file.compression) for file in files),
        config.ngram,
        config.read.config(),
    )
    inputs = tuple(file.path for file in files)
    task = Task("decontaminate/benchmarks", "benchmarks", inputs, settings)
    (index,) = runner.run("decontaminate/benchmarks", [task], index_benchmarks)
    own = tuple(index.file(name) for name in INDEX_FILES)
    tasks = [
        Task("decontaminate/documents", part.name, (part.file(SHARD_FILE), *own), DropSettings(config.ngram))
        for parts in shards.values()
        for part in parts
    ]
    dropped = runner.run("decontaminate/documents", tasks, drop)
    inputs = tuple(done.file(MATCHES_FILE) for done in dropped)
    (joined,) = runner.run(
        "decontaminate/matches", [Task("decontaminate/matches", "all", inputs, JoinSettings())], join_matches
    )
    each = iter(dropped)
    left = {name: [next(each) for _ in parts] for name, parts in shards.items()}
    return Decontaminated(left, {f"{FOLDER}/{MATCHES_FILE}": joined.file(MATCHES_FILE)})


def index_benchmarks(task: Task, directory: Path) -> Counts:
    """The n-grams of all benchmark texts. Counts: texts, and those too short to be looked for."""
    settings = task.settings
    texts: dict[str, str] = {}
    for path, (name, size, form, compression) in zip(task.inputs, settings.files, strict=True):
        file = SourceFile(path, name, size, form, compression)
        for batch, _ in read_batches(file, "decontaminate", "", None, BATCH_DOCUMENTS, settings.read):
            for identity, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True):
                texts[f"{name}:{identity}"] = text
    index = benchmark_index(texts, settings.ngram)
    np.save(directory / INDEX_FILES[0], index.ngram_G, allow_pickle=False)
    np.save(directory / INDEX_FILES[1], index.owner_K, allow_pickle=False)
    (directory / INDEX_FILES[2]).write_bytes(canonical_json(list(index.ids)))
    return {"texts": len(texts), "short": len(index.short)}


def drop(task: Task, directory: Path) -> Counts:
    """One shard without contaminated documents."""
    index = _load(task)
    with ShardWriter(directory / SHARD_FILE) as shard, (directory / MATCHES_FILE).open("wb") as file:
        for documents in read_shard(task.inputs[0]):
            found = matches(documents, index)
            for match in found:
                file.write(canonical_json(asdict(match)) + b"\n")
            hit = {(match.source, match.id) for match in found}
            identities = zip(documents["source"].to_pylist(), documents["id"].to_pylist(), strict=True)
            shard.write(documents.filter(pa.array([identity not in hit for identity in identities])))
    return {"documents": shard.totals}


def join_matches(task: Task, directory: Path) -> Counts:
    """Matches of all shards in the order of (source, id, benchmark), whatever shards their documents lay in. Counts:
    matches.
    """
    lines = [line for path in task.inputs for line in Path(path).read_bytes().splitlines()]
    found = [Match(**json.loads(line)) for line in lines]
    found.sort(key=lambda match: (match.source, match.id, match.benchmark))
    (directory / MATCHES_FILE).write_bytes(b"".join(canonical_json(asdict(match)) + b"\n" for match in found))
    return {"matches": len(found)}


def _load(task: Task) -> BenchmarkIndex:
    ngrams, owners, names = task.inputs[1:]
    ids = tuple(json.loads(Path(names).read_bytes()))
    return BenchmarkIndex(task.settings.ngram, np.load(ngrams), np.load(owners), ids, ())

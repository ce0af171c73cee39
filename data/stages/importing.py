"""Import: source files of any size to document shards of bounded size, with identities checked.

A large file is cut where it can be read from the middle; one that can only be read from its beginning is a chain of
shards, each of which knows where the next begins, so that a build killed inside the file goes on inside it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.config import SourceConfig
from data.errors import DataError
from data.hashing import UINT64, json_sha256, key64
from data.sources.config import ReadConfig
from data.sources.files import JSONL, SourceFile, list_files, open_file, read_some, without_secrets
from data.sources.read import Position, read_batches
from data.stages.contract import Counts, Task
from data.stages.marker import Done, remove
from data.stages.runner import Runner
from data.stages.shards import BATCH_DOCUMENTS, SHARD_FILE, ShardWriter, read_shard, shard_documents

IDS_FILE = "ids.npy"
IDS_AT_ONCE = 1 << 24
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class InventorySettings:
    """found: what the disk or the store says of a file without its being read."""

    found: str


@dataclass(frozen=True)
class ImportSettings:
    """A file or a range of it, as in `data.sources.files.SourceFile`, and how to read it."""

    source: str
    language: str
    name: str
    bytes: int
    form: str
    compression: str
    first: int
    last: int | None
    shard_bytes: int
    read: ReadConfig


@dataclass(frozen=True)
class IdentitySettings:
    """Identities whose 64-bit keys lie in [first, last] of a source. shards: of each, the name of its file and how many
    documents of the file come before.
    """

    source: str
    first: int
    last: int
    shards: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Inventory:
    """The files of every source in order, and the sha256 of each. found: of each path, what the disk or the store said
    of it before it was read.
    """

    files: dict[str, list[SourceFile]]
    sha256: dict[str, list[str]]
    found: dict[str, str]


def take_inventory(runner: Runner, sources: Mapping[str, SourceConfig]) -> Inventory:
    """Finds and digests the source files. Errors: DataError naming source and path; UnavailableError."""
    files = {name: _source_files(name, source) for name, source in sources.items()}
    found = {file.path: _found(file) for group in files.values() for file in group}
    tasks = []
    for name, group in files.items():
        for number, file in enumerate(group):
            # What the disk says of the file decides whether it is read again here; what it holds, all the rest.
            runner.digests[file.path] = ""
            tasks.append(Task("files", f"{name}.{number:05d}", (file.path,), InventorySettings(found[file.path])))
    runner_before, runner.before = runner.before, frozenset()
    done = iter(runner.run("files", tasks, digest_file))
    runner.before = runner_before
    sha256: dict[str, list[str]] = {}
    for name, group in files.items():
        sha256[name] = [next(done).counts["sha256"] for _ in group]
        runner.digests |= {file.path: digest for file, digest in zip(group, sha256[name], strict=True)}
    return Inventory(files, sha256, found)


def import_sources(
    runner: Runner, sources: Mapping[str, SourceConfig], inventory: Inventory, shard_bytes: int
) -> dict[str, list[Done]]:
    """Document shards of every source, in the order of their files. Errors: DataError for the sources' faults."""
    tasks: dict[str, list[Task]] = {}
    for name, source in sources.items():
        tasks[name] = []
        for number, whole in enumerate(inventory.files[name]):
            for place, file in enumerate(_ranges(whole, shard_bytes)):
                settings = ImportSettings(
                    source=name,
                    language=source.language,
                    name=file.name,
                    bytes=file.bytes,
                    form=file.form,
                    compression=file.compression,
                    first=file.first,
                    last=file.last,
                    shard_bytes=shard_bytes,
                    read=source.read.config(),
                )
                task = Task("import/documents", f"{name}.{number:05d}.{place:05d}", (file.path,), settings)
                tasks[name].append(task)
    every = [task for group in tasks.values() for task in group]
    parts = dict(zip([task.name for task in every], runner.chain("import/documents", every, import_file), strict=True))
    _check_unchanged(inventory, tasks, parts)
    shards = {}
    for name, group in tasks.items():
        _no_empty_file(name, group, parts)
        shards[name] = [part for task in group for part in parts[task.name] if shard_documents(part.counts)]
    _check_identities(runner, tasks, parts)
    return shards


def _source_files(name: str, source: SourceConfig) -> list[SourceFile]:
    files: dict[str, SourceFile] = {}
    for path in [source.path, *source.paths]:
        try:
            files |= {file.path: file for file in (list_files(path) if path else [])}
        except DataError as error:
            raise type(error)(f"source '{name}': {error}") from None
    return list(files.values())


def _found(file: SourceFile) -> str:
    if "://" not in file.path:
        try:
            found = Path(file.path).stat()
        except OSError as error:
            raise DataError(f"cannot read {file.shown}: {error.strerror}") from None
        return json_sha256([found.st_size, found.st_mtime_ns])
    from fsspec.core import url_to_fs

    filesystem, place = url_to_fs(file.path)
    # fsspec takes what is behind an HTTP address for unchanging: its key is the address alone.
    found = filesystem.info(place)
    return json_sha256([str(filesystem.ukey(place)), found.get("size"), str(found.get("ETag"))])


def _ranges(file: SourceFile, size: int) -> list[SourceFile]:
    """Ranges of about `size` bytes of a file that can be read from the middle."""
    if file.form != JSONL or file.compression or file.bytes <= size:
        return [file]
    edges = [*range(0, file.bytes, size)]
    return [
        replace(file, first=first, last=edges[i + 1] if i + 1 < len(edges) else None) for i, first in enumerate(edges)
    ]


def digest_file(task: Task, directory: Path) -> Counts:
    """sha256 of a source file."""
    digest = hashlib.sha256()
    with open_file(SourceFile(task.inputs[0], "", 0, JSONL)) as file:
        while content := read_some(file, without_secrets(task.inputs[0]), READ_BYTES):
            digest.update(content)
    return {"sha256": digest.hexdigest()}


def import_file(task: Task, last: Counts | None, fresh: Callable[[], Path]) -> Iterator[Counts]:
    """A file or range as shards of about `shard_bytes` of text, each with the keys of its identities.

    Counts: "position" after the shard, from which the next one is read; "skipped" documents by fault.
    """
    settings = task.settings
    file = SourceFile(
        path=task.inputs[0],
        name=settings.name,
        bytes=settings.bytes,
        form=settings.form,
        compression=settings.compression,
        first=settings.first,
        last=settings.last,
    )
    batches = _batches(file, settings, Position(**last["position"]) if last else None)
    batch = next(batches, None)
    before: Counter[str] = Counter()
    while True:
        directory = fresh()
        position, skipped = (last["position"] if last else asdict(Position())), before
        keys: list[int] = []
        with ShardWriter(directory / SHARD_FILE) as shard:
            while batch is not None and (not shard.bytes or shard.bytes < settings.shard_bytes):
                documents, place, skipped = batch
                position = asdict(place)
                shard.write(documents)
                keys += [key64(identity) for identity in documents["id"].to_pylist()]
                batch = next(batches, None)
        np.save(directory / IDS_FILE, np.array(keys, dtype=UINT64), allow_pickle=False)
        yield {
            "documents": shard.totals,
            "skipped": dict(skipped - before),
            "position": position,
            "last": batch is None,
        }
        before = skipped
        if batch is None:
            return


def _batches(
    file: SourceFile, settings: ImportSettings, start: Position | None
) -> Iterator[tuple[pa.Table, Position, Counter[str]]]:
    """Batches with what was skipped so far."""
    skipped: Counter[str] = Counter()
    found = read_batches(file, settings.source, settings.language, start, BATCH_DOCUMENTS, settings.read, skipped)
    for documents, position in found:
        yield documents, position, Counter(skipped)


def _check_unchanged(inventory: Inventory, tasks: Mapping[str, list[Task]], parts: Mapping[str, list[Done]]) -> None:
    """Shards of a file that was changed between its digest and now are of nobody knows what: they go."""
    for name, files in inventory.files.items():
        for file in files:
            if _found(file) == inventory.found[file.path]:
                continue
            for task in tasks[name]:
                if task.inputs[0] == file.path:
                    for part in parts[task.name]:
                        remove(part.directory)
            raise DataError(f"source '{name}': {file.shown} was changed while it was read; run again when it is whole")


def _no_empty_file(source: str, tasks: list[Task], parts: dict[str, list[Done]]) -> None:
    held: dict[str, int] = {}
    for task in tasks:
        count = sum(shard_documents(part.counts) for part in parts[task.name])
        held[task.inputs[0]] = held.get(task.inputs[0], 0) + count
    for path, count in held.items():
        if not count:
            raise DataError(f"source '{source}': {without_secrets(path)} holds no documents")


def _check_identities(runner: Runner, imported: Mapping[str, list[Task]], parts: Mapping[str, list[Done]]) -> None:
    tasks = []
    for name, group in imported.items():
        inputs: list[str] = []
        shards: list[tuple[str, int]] = []
        before: Counter[str] = Counter()
        for task in group:
            for part in parts[task.name]:
                if documents := shard_documents(part.counts):
                    inputs += [part.file(IDS_FILE), part.file(SHARD_FILE)]
                    shards.append((task.settings.name, before[task.inputs[0]]))
                before[task.inputs[0]] += documents
        count = max(1, -(-sum(before.values()) // IDS_AT_ONCE))
        edges = [(2**64 * i) // count for i in range(count + 1)]
        for number in range(count):
            settings = IdentitySettings(name, edges[number], edges[number + 1] - 1, tuple(shards))
            tasks.append(Task("import/identities", f"{name}.{number:05d}", tuple(inputs), settings))
    runner.run("import/identities", tasks, check_identities)


def check_identities(task: Task, directory: Path) -> Counts:
    """Refuses an identity given twice (DataError naming it). Only keys are held; texts of equal keys are compared."""
    settings = task.settings
    keys, places = [], []
    for number, path in enumerate(task.inputs[::2]):
        key_D = np.load(path, allow_pickle=False)
        row_D = np.flatnonzero((key_D >= UINT64(settings.first)) & (key_D <= UINT64(settings.last)))
        keys.append(key_D[row_D])
        places.append(np.stack([np.full(len(row_D), number), row_D], axis=1))
    key_N, place_N2 = np.concatenate(keys), np.concatenate(places)
    order_N = np.argsort(key_N, kind="stable")
    same_N = np.flatnonzero(key_N[order_N][1:] == key_N[order_N][:-1])
    for index in same_N.tolist():
        places_22 = place_N2[order_N[[index, index + 1]]].tolist()
        left, right = (_identity(task, *place) for place in places_22)
        if left == right:
            where = " and ".join(
                f"document {settings.shards[shard][1] + row} of {settings.shards[shard][0]}" for shard, row in places_22
            )
            raise DataError(f"source '{settings.source}': id '{left}' is given twice: {where}, counted from 0")
    return {"identities": len(key_N)}


def _identity(task: Task, shard: int, row: int) -> str:
    first = 0
    for batch in read_shard(task.inputs[2 * shard + 1], ["id"]):
        if row < first + batch.num_rows:
            return str(batch["id"][row - first].as_py())
        first += batch.num_rows
    raise AssertionError(f"{task.inputs[2 * shard + 1]}: no row {row}")

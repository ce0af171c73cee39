"""Packing plans: how many sequences each block of a source gives, for one sequence length and, where documents are
rearranged for fill-in-the-middle, one seed and epoch. Four bytes a block, built beforehand, read at every start.

A plan is two files beside the manifest: `plans/NAME.npy`, uint32 by block, and `plans/NAME.json`, which says of what
and holds the sha256 of the first.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.contract import Source
from data.errors import DataError, UsageError, WorkerLostError
from data.hashing import canonical_json
from data.publish import make_directory, write_file
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.stream.documents import NO_LIMIT, PlanKey, first_documents
from data.stream.fim import check_fim
from data.stream.packing import packed_count

VERSION = 1
COUNT_DTYPE = np.dtype("<u4")
BLOCKS_PER_TASK = 64
HEADER_BYTES = 1 << 16


def plan_name(key: PlanKey) -> str:
    """Path of a plan below the corpus, without `.npy` and `.json`."""
    name = f"plans/{key.source}-{key.length}"
    if key.shortest > 0 or key.longest < NO_LIMIT:
        name += f"-documents{key.shortest}to{key.longest}"
    if key.fim_rate:
        name += f"-fim{key.fim_rate:g}-seed{key.seed}-epoch{key.epoch}"
    return name


def count_sequences(
    store: BlockStore, source: Source, keys: Sequence[PlanKey], first: int, last: int, first_document: int
) -> np.ndarray:
    """Sequences that blocks [first, last) of a source give by each key, uint32 [keys, last - first]. first_document:
    number of the first one's first document in the source.
    """
    counts = np.empty((len(keys), last - first), dtype=COUNT_DTYPE)
    for place, block in enumerate(source.blocks[first:last]):
        offset_D = store.offsets(block)
        for row, key in enumerate(keys):
            counts[row, place] = packed_count(key.documents(offset_D, first_document).length_C, key.length)
        first_document += block.documents
    return counts


def plan_files(manifest_digest: str, key: PlanKey, count_B: np.ndarray) -> dict[str, bytes]:
    """Content of a plan's two files by name."""
    buffer = io.BytesIO()
    np.save(buffer, count_B.astype(COUNT_DTYPE), allow_pickle=False)
    header = {
        "version": VERSION,
        "manifest_digest": manifest_digest,
        **asdict(key),
        "blocks": len(count_B),
        "sequences": int(count_B.sum(dtype=np.int64)),
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }
    return {f"{plan_name(key)}.npy": buffer.getvalue(), f"{plan_name(key)}.json": canonical_json(header) + b"\n"}


def load_plan(store: BlockStore, source: Source, key: PlanKey) -> np.ndarray:
    """Sequences per block, uint32 [blocks]: from the plan beside the manifest, or counted now if there is none. Error:
    DataError for a plan of other data or a damaged one.
    """
    name, location = plan_name(key), store.location
    if not location.exists(f"{name}.json"):
        return count_sequences(store, source, [key], 0, len(source.blocks), 0)[0]
    where, blocks = location.shown(f"{name}.json"), len(source.blocks)
    try:
        header = json.loads(location.read(f"{name}.json", HEADER_BYTES))
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise DataError(f"{where}: not a plan of version {VERSION}")
        if header["manifest_digest"] != store.manifest.digest:
            raise DataError(
                f"{where}: made for manifest {header['manifest_digest']}, this one is {store.manifest.digest}"
            )
        found = {field: header[field] for field in asdict(key)}
        if found != asdict(key) or header["blocks"] != blocks:
            raise DataError(
                f"{where}: plan of {found} for {header['blocks']} blocks, needed {asdict(key)} for {blocks}"
            )
        content = location.read(f"{name}.npy", blocks * COUNT_DTYPE.itemsize + HEADER_BYTES)
        if (sha256 := hashlib.sha256(content).hexdigest()) != header["sha256"]:
            raise DataError(f"{location.shown(f'{name}.npy')}: sha256 is {sha256}, its header has {header['sha256']}")
        count_B: np.ndarray = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{where}: damaged plan: {error}") from None
    if count_B.shape != (blocks,) or count_B.dtype != COUNT_DTYPE:
        raise DataError(f"{where}: holds {count_B.dtype} {count_B.shape}, needs uint32 ({blocks},)")
    return count_B


@dataclass
class PlansConfig:
    """`python -m data plans`: the packing plans of a built corpus, made before training wants them. lengths, seeds,
    epochs, fim_rates: every combination of them; seeds and epochs matter only above a FIM rate of 0. shortest, longest:
    stored tokens of the documents read, for all sources. workers: processes.
    """

    data: str = "data_cache/demo"
    lengths: list[int] = field(default_factory=lambda: [4096])
    seeds: list[int] = field(default_factory=lambda: [0])
    epochs: list[int] = field(default_factory=lambda: [0])
    fim_rates: list[float] = field(default_factory=lambda: [0.0])
    shortest: int = 0
    longest: int = NO_LIMIT
    workers: int = 1


def plans(config: PlansConfig) -> dict[str, Any]:
    """Write what is asked for; returns what `build_plans` does. Errors: UsageError, DataError, CannotWriteError,
    WorkerLostError."""
    for rate in config.fim_rates:
        check_fim(rate, load_manifest(Path(config.data)).fim_ids, config.data)
    for key, least in (("workers", 1), *((key, 0) for key in ("seeds", "epochs"))):
        found = getattr(config, key)
        if min(found if isinstance(found, list) else [found], default=least) < least:
            raise UsageError(f"{key}: found {found}, allowed {least} or more")
    limits = None
    if (config.shortest, config.longest) != (0, NO_LIMIT):
        names = [source.name for source in load_manifest(Path(config.data)).sources]
        limits = dict.fromkeys(names, (config.shortest, config.longest))
    return build_plans(
        config.data,
        config.lengths,
        config.seeds,
        config.epochs,
        config.workers,
        fim_rates=config.fim_rates,
        document_lengths=limits,
    )


def build_plans(
    directory: str | Path,
    lengths: Sequence[int],
    seeds: Sequence[int] = (0,),
    epochs: Sequence[int] = (0,),
    workers: int = 1,
    *,
    fim_rates: Sequence[float] = (0.0,),
    document_lengths: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Write the plans of every source for all combinations, over those that are there, with `workers` processes.

    document_lengths: (shortest, longest) by source, as a stage gives them. Returns files, bytes, blocks, seconds and
    tokens_per_second (of documents counted, all keys together). Errors: DataError, CannotWriteError, WorkerLostError.
    """
    started = time.perf_counter()
    directory = Path(directory)
    manifest = load_manifest(directory)
    limits = document_lengths or {}
    keys = {
        source.name: list(
            dict.fromkeys(
                PlanKey(source.name, length, *limits.get(source.name, (0, NO_LIMIT)), rate, seed, epoch)
                for length in lengths
                for rate in fim_rates
                for seed in seeds
                for epoch in epochs
            )
        )
        for source in manifest.sources
    }
    tasks = [
        (number, keys[source.name], first, min(first + BLOCKS_PER_TASK, len(source.blocks)), int(first_B[first]))
        for number, (source, first_B) in enumerate(zip(manifest.sources, map(first_documents, manifest.sources)))
        for first in range(0, len(source.blocks), BLOCKS_PER_TASK)
    ]
    counts = {s.name: np.empty((len(keys[s.name]), len(s.blocks)), dtype=COUNT_DTYPE) for s in manifest.sources}
    for (number, _, first, last, _), found in zip(tasks, _run(directory, tasks, workers), strict=True):
        counts[manifest.sources[number].name][:, first:last] = found
    files = {
        name: content
        for source in manifest.sources
        for key, count_B in zip(keys[source.name], counts[source.name], strict=True)
        for name, content in plan_files(manifest.digest, key, count_B).items()
    }
    make_directory(directory / "plans")
    # The header goes last: a plan without one does not exist.
    for name in sorted(files, key=lambda name: name.endswith(".json")):
        write_file(directory / name, files[name])
    seconds = time.perf_counter() - started
    tokens = sum(source.tokens * len(keys[source.name]) for source in manifest.sources)
    return {
        "files": len(files),
        "bytes": sum(map(len, files.values())),
        "blocks": sum(len(source.blocks) for source in manifest.sources),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


_Task = tuple[int, list[PlanKey], int, int, int]


class _Counter:
    """Counts for one process, which opens the corpus once."""

    store: BlockStore

    @classmethod
    def open(cls, directory: Path) -> None:
        cls.store = BlockStore(directory, load_manifest(directory))

    @classmethod
    def count(cls, task: _Task) -> np.ndarray:
        number, keys, first, last, first_document = task
        source = cls.store.manifest.sources[number]
        return count_sequences(cls.store, source, keys, first, last, first_document)


def _run(directory: Path, tasks: Iterable[_Task], workers: int) -> Iterator[np.ndarray]:
    if workers == 1:
        _Counter.open(directory)
        yield from map(_Counter.count, tasks)
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _Counter.open, (directory,)) as pool:
            yield from pool.map(_Counter.count, tasks)
    except BrokenProcessPool:
        raise WorkerLostError(f"{directory}: a process that counted sequences died") from None

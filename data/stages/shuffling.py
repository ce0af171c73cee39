"""Shuffle: token shards to blocks, documents of each source in the order of 64-bit keys.

The order is made partition by partition, a partition being a range of keys whose index fits into memory; each block
then gathers its documents from the token shards by memory map. Neither partitions nor shards show in the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.hashing import UINT64
from data.stages.contract import Counts, Task
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import shard_documents
from data.stages.tokenising import IDS_FILE, INDEX_FILE, TOKENS_FILE, read_identities
from data.store.blocks import Identities, write_block
from data.store.files import TOKEN_DTYPE

ORDER_FILE = "order.npy"
ORDER = np.dtype([("key", "<u8"), ("shard", "<i8"), ("row", "<i8"), ("start", "<i8"), ("tokens", "<i8")])


@dataclass(frozen=True)
class OrderSettings:
    """Keys in [first, last]."""

    first: int
    last: int


@dataclass(frozen=True)
class BlockSettings:
    """Block `number`, unless earlier ones turn out empty: documents whose first token is the `start`-th of the source
    or later, but before the `stop`-th (None: all that are left). shards: how many of the inputs are shards. skipped:
    tokens of the source before the first order file.
    """

    source: str
    number: int
    shards: int
    skipped: int
    start: float
    stop: float | None


def shuffle_documents(
    runner: Runner, tokens: Mapping[str, list[Done]], block_tokens: int, partition_documents: int
) -> dict[str, list[Done]]:
    """Blocks of every source in order, each a task's outputs."""
    order_tasks: dict[str, list[Task]] = {}
    for name, parts in tokens.items():
        count = max(1, -(-sum(shard_documents(part.counts) for part in parts) // partition_documents))
        edges = [(2**64 * i) // count for i in range(count + 1)]
        inputs = tuple(part.file(file) for part in parts for file in (INDEX_FILE, IDS_FILE))
        order_tasks[name] = [
            Task("shuffle/order", f"{name}.{i:06d}", inputs, OrderSettings(edges[i], edges[i + 1] - 1))
            for i in range(count)
        ]
    ordered = iter(runner.run("shuffle/order", [task for group in order_tasks.values() for task in group], order))
    block_tasks: dict[str, list[Task]] = {}
    for name, group in order_tasks.items():
        shards = tuple(part.file(file) for part in tokens[name] for file in (TOKENS_FILE, IDS_FILE))
        block_tasks[name] = _block_tasks(name, [next(ordered) for _ in group], shards, block_tokens)
    done = iter(runner.run("shuffle/blocks", [task for group in block_tasks.values() for task in group], gather))
    return {
        name: [held for held in [next(done) for _ in group] if held.counts["block"]]
        for name, group in block_tasks.items()
    }


def _block_tasks(name: str, orders: list[Done], shards: tuple[str, ...], block_tokens: int) -> list[Task]:
    """One per block of as even a size as documents allow: a block ends with the document that reaches its target."""
    end_P = np.cumsum([done.counts["tokens"] for done in orders])
    total = int(end_P[-1])
    count = max(1, round(total / block_tokens))
    edges = [total * i / count for i in range(count)]
    tasks = []
    for number, start in enumerate(edges):
        stop = edges[number + 1] if number + 1 < count else None
        first = int(np.searchsorted(end_P, start, side="right"))
        last = len(orders) - 1 if stop is None else int(np.searchsorted(end_P, stop, side="left"))
        files = tuple(done.file(ORDER_FILE) for done in orders[first : last + 1])
        skipped = int(end_P[first - 1]) if first else 0
        settings = BlockSettings(name, number, len(shards) // 2, skipped, start, stop)
        tasks.append(Task("shuffle/blocks", f"{name}.{number:06d}", (*shards, *files), settings))
    return tasks


def order(task: Task, directory: Path) -> Counts:
    """Documents of a range of keys in order: by key, then (as good as never) by identity."""
    pieces = []
    for number, path in enumerate(task.inputs[::2]):
        index_D = np.load(path, mmap_mode="r", allow_pickle=False)
        first = int(np.searchsorted(index_D["key"], UINT64(task.settings.first), side="left"))
        last = int(np.searchsorted(index_D["key"], UINT64(task.settings.last), side="right"))
        piece_D = np.zeros(last - first, dtype=ORDER)
        piece_D["shard"] = number
        for field in ("key", "row", "start", "tokens"):
            piece_D[field] = index_D[field][first:last]
        pieces.append(piece_D)
    order_D = np.concatenate(pieces)
    order_D = order_D[np.argsort(order_D["key"], kind="stable")]
    for key in np.unique(order_D["key"][1:][order_D["key"][1:] == order_D["key"][:-1]]):
        place_K = np.flatnonzero(order_D["key"] == key)
        same = order_D[place_K]
        ids = [str(read_identities(task.inputs[2 * int(d["shard"]) + 1])["id"][int(d["row"])].as_py()) for d in same]
        order_D[place_K] = same[sorted(range(len(ids)), key=ids.__getitem__)]
    np.save(directory / ORDER_FILE, order_D, allow_pickle=False)
    return {"tokens": int(order_D["tokens"].sum()), "order": len(order_D)}


def gather(task: Task, directory: Path) -> Counts:
    """One block and the identities of its documents. Counts: "block" as the manifest has it, None for no documents."""
    settings = task.settings
    shards, files = task.inputs[: 2 * settings.shards], task.inputs[2 * settings.shards :]
    order_D = np.concatenate([np.load(path, mmap_mode="r", allow_pickle=False) for path in files])
    start_D = settings.skipped + np.cumsum(order_D["tokens"]) - order_D["tokens"]
    first = int(np.searchsorted(start_D, settings.start, side="left"))
    last = len(start_D) if settings.stop is None else int(np.searchsorted(start_D, settings.stop, side="left"))
    order_D = order_D[first:last]
    if not len(order_D):
        return {"block": None}
    documents: list[np.ndarray] = [np.empty(0, dtype=TOKEN_DTYPE)] * len(order_D)
    id_D, copies_D = [""] * len(order_D), [0] * len(order_D)
    for shard in np.unique(order_D["shard"]).tolist():
        tokens_N = np.memmap(shards[2 * shard], dtype=TOKEN_DTYPE, mode="r")
        place_K = np.flatnonzero(order_D["shard"] == shard)
        named = read_identities(shards[2 * shard + 1]).take(order_D["row"][place_K])
        columns = (named["id"].to_pylist(), named["copies"].to_pylist())
        for place, identity, copies in zip(place_K.tolist(), *columns, strict=True):
            start, tokens = int(order_D["start"][place]), int(order_D["tokens"][place])
            documents[place] = tokens_N[start : start + tokens]
            id_D[place], copies_D[place] = identity, copies
    identities = Identities(id_D, copies_D)
    return {"block": asdict(write_block(directory, settings.source, settings.number, documents, identities))}

"""Dedup as tasks from files to files, in the order in which they run:

    sign      shard            -> keys of its texts, of its bands, its ranks, its sketches
    exact     all keys         -> for every document the first of its equals
    match     one band of all  -> its buckets
    join      all buckets      -> groups of documents that may be copies
    gather    shard            -> shingle sets of its documents in such groups
    verify    part of groups   -> pairs of copies
    resolve   all pairs        -> survivor of every document, how many copies it stands for, list of removed documents
    remove    shard            -> shard of its survivors, with a column `copies`

A task holds either one batch of texts or a few numbers for each document. Inputs of a task come in the order in which
its docstring names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.dedup.bands import buckets, each_bucket, packed, scope_keys, scoped, star_edges, unpacked
from data.dedup.exact import equal_documents, text_keys
from data.dedup.groups import components
from data.dedup.minhash import EMPTY, MinHash, band_keys, shingle_sets, signatures
from data.dedup.resolve import KINDS, Evidence, resolved
from data.dedup.settings import RANK, DedupSettings, joined, joined_band, read_documents
from data.dedup.verify import PAIR, verified_pairs
from data.hashing import key64, mix
from data.stages.contract import Counts, Task

# Where the shingle set of a document stands in its shard's file, counted in shingles.
PLACE = np.dtype([("document", np.int64), ("first", np.int64), ("count", np.int64)])


@dataclass(frozen=True)
class Row:
    """Settings of a task that works on one shard. first: number of its first document."""

    first: int
    shingle: int = 0


@dataclass(frozen=True)
class Counted:
    """Settings of a task that reads several files of each kind. shards, bands: how many."""

    shards: int
    bands: int = 0
    part: int = 0
    parts: int = 1
    threshold: float = 0.0


def sign(task: Task, out: Path) -> Counts:
    """inputs: shard. Settings: DedupSettings. Outputs: text.npy uint64 [D, 2], rank.npy RANK [D], sketch.npy uint8
    [D, P] (the low byte of every minimum), band.npy uint64 [B, D].
    """
    settings: DedupSettings = task.settings
    parts: list[tuple[np.ndarray, ...]] = []
    for documents in read_documents(task.inputs[0], ("source", "id", "language", "text")):
        texts = documents["text"].to_pylist()
        scope_D = scope_keys(settings.scopes(documents))
        signature_DP = signatures(texts, settings.minhash)
        rank_D = np.empty(len(texts), dtype=RANK)
        rank_D["length"] = [len(text) for text in texts]
        identities = zip(documents["source"].to_pylist(), documents["id"].to_pylist(), strict=True)
        rank_D["identity"] = [key64(source, id_) for source, id_ in identities]
        rank_D["empty"] = (signature_DP == EMPTY).all(axis=1)
        key_DB = scoped(band_keys(signature_DP, settings.minhash), scope_D)
        parts.append((scoped(text_keys(texts), scope_D), rank_D, signature_DP.astype(np.uint8), key_DB))
    if not parts:
        parts.append(_nothing(settings.minhash))
    for name, place in (("text.npy", 0), ("rank.npy", 1), ("sketch.npy", 2)):
        np.save(out / name, np.concatenate([part[place] for part in parts]))
    np.save(out / "band.npy", np.ascontiguousarray(np.concatenate([part[3] for part in parts]).T))
    return {"signed": sum(len(part[0]) for part in parts)}


def _nothing(parameters: MinHash) -> tuple[np.ndarray, ...]:
    return (
        np.empty((0, 2), dtype=np.uint64),
        np.empty(0, dtype=RANK),
        np.empty((0, parameters.permutations), dtype=np.uint8),
        np.empty((0, parameters.bands), dtype=np.uint64),
    )


def exact(task: Task, out: Path) -> Counts:
    """inputs: text.npy of all shards, rank.npy of all shards. Settings: Counted. Output: first.npy int64 [D]."""
    shards = task.settings.shards
    rank_D = joined(task.inputs[shards:])
    first_D = equal_documents(joined(task.inputs[:shards]), rank_D["length"], rank_D["identity"])
    np.save(out / "first.npy", first_D)
    return {"exact_copies": int((first_D != np.arange(len(first_D))).sum())}


def match(task: Task, out: Path) -> Counts:
    """inputs: band.npy of all shards, rank.npy of all shards, first.npy. Settings: Counted, part: the band. Output:
    bucket.npy int64 [M] (`data.dedup.bands.packed`). Exact copies take no part.
    """
    shards = task.settings.shards
    rank_D = joined(task.inputs[shards : 2 * shards])
    first_D = np.load(task.inputs[2 * shards])
    taking_part_D = (first_D == np.arange(len(first_D))) & ~rank_D["empty"]
    key_D = joined_band(task.inputs[:shards], task.settings.part)
    member_M, edge_K = buckets(key_D, rank_D["length"], rank_D["identity"], taking_part_D)
    np.save(out / "bucket.npy", packed(member_M, edge_K))
    return {"buckets": len(edge_K) - 1, "members": len(member_M)}


def join(task: Task, out: Path) -> Counts:
    """inputs: first.npy, then bucket.npy of each band. Settings: Counted. Outputs: label.npy int32 [D],
    equal for documents that star edges connect; wanted.npy int64 [W], the documents in any bucket.
    """
    count = len(np.load(task.inputs[0], mmap_mode="r"))
    stars = [star_edges(*unpacked(np.load(bucket))) for bucket in task.inputs[1:]]
    left_E, right_E = (np.concatenate(side) for side in zip(*stars))
    wanted_D = np.zeros(count, dtype=bool)
    wanted_D[left_E] = wanted_D[right_E] = True
    np.save(out / "label.npy", components(count, left_E, right_E).astype(np.int32))
    np.save(out / "wanted.npy", np.flatnonzero(wanted_D))
    return {"candidates": int(wanted_D.sum()), "edges": len(left_E)}


def gather(task: Task, out: Path) -> Counts:
    """inputs: shard, wanted.npy. Settings: Row. Outputs: shingle.bin uint64 [S], the sorted sets one after the other;
    where.npy PLACE, sorted by document.
    """
    wanted_W = np.load(task.inputs[1])
    first = task.settings.first
    places: list[np.ndarray] = [np.empty(0, dtype=PLACE)]
    end = 0
    with (out / "shingle.bin").open("wb") as file:
        for documents in read_documents(task.inputs[0], ("text",)):
            low, high = np.searchsorted(wanted_W, [first, first + len(documents)])
            texts = documents["text"].take(pa.array(wanted_W[low:high] - first)).to_pylist()
            place_W = np.empty(len(texts), dtype=PLACE)
            place_W["document"] = wanted_W[low:high]
            for row, shingle_S in enumerate(shingle_sets(texts, task.settings.shingle)):
                file.write(shingle_S.astype("<u8").tobytes())
                place_W["first"][row], place_W["count"][row] = end, len(shingle_S)
                end += len(shingle_S)
            places.append(place_W)
            first += len(documents)
    np.save(out / "where.npy", np.concatenate(places))
    return {"gathered": sum(map(len, places)), "shingles": end}


def verify(task: Task, out: Path) -> Counts:
    """inputs: label.npy; bucket.npy of each band; shingle.bin and where.npy of each shard. Settings: Counted. Output:
    pair.npy PAIR [E], the copies among the groups of this part.
    """
    settings: Counted = task.settings
    label_D = np.load(task.inputs[0])
    bands = task.inputs[1 : 1 + settings.bands]
    sets = _ShingleFiles(task.inputs[1 + settings.bands :])

    def mine() -> Iterator[list[int]]:
        for path in bands:
            member_M, edge_K = unpacked(np.load(path))
            part_K = mix(label_D[member_M[edge_K[:-1]]].astype(np.uint64)) % np.uint64(settings.parts)
            for bucket, part in zip(each_bucket(member_M, edge_K), part_K.tolist()):
                if part == settings.part:
                    yield bucket

    found = verified_pairs(mine(), sets.load, settings.threshold)
    np.save(out / "pair.npy", found.pairs)
    return {"compared": found.compared, "pairs": len(found.pairs)}


def resolve(task: Task, out: Path) -> Counts:
    """inputs: first.npy, rank.npy of all shards, all shards, pair.npy of each part or (threshold 0) bucket.npy of
    each band, then earlier.npy and identity.parquet of an earlier corpus if there is one. Settings:
    Counted. Outputs: survivor.npy, copies.npy, kind.npy, removed.parquet (`data.dedup.resolve.resolved`).
    """
    settings: Counted = task.settings
    first_D = np.load(task.inputs[0])
    rank_D = joined(task.inputs[1 : 1 + settings.shards])
    shards = task.inputs[1 + settings.shards : 1 + 2 * settings.shards]
    rest = task.inputs[1 + 2 * settings.shards :]
    if settings.threshold > 0:
        pair_E, rest = joined(rest[: settings.parts]), rest[settings.parts :]
    else:
        stars = [star_edges(*unpacked(np.load(bucket))) for bucket in rest[: settings.bands]]
        left_E, right_E = (np.concatenate(side) for side in zip(*stars))
        pair_E, rest = np.empty(len(left_E), dtype=PAIR), rest[settings.bands :]
        pair_E["left"], pair_E["right"], pair_E["jaccard"] = left_E, right_E, np.nan
    earlier = (np.load(rest[0]), rest[1]) if rest else None
    return resolved(Evidence(first_D, rank_D, pair_E, earlier), shards, out)


def remove(task: Task, out: Path) -> Counts:
    """inputs: shard, kind.npy, copies.npy. Settings: Row. Output: documents.parquet, the survivors with `copies`.
    Counts: "documents" that stay, and those "removed" by kind, {language: [documents, UTF-8 bytes]}.
    """
    first = task.settings.first
    kind_D, copies_D = (np.load(path, mmap_mode="r") for path in task.inputs[1:])
    schema = pq.read_schema(task.inputs[0])
    counts: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    with pq.ParquetWriter(
        out / "documents.parquet", schema.append(pa.field("copies", pa.int32())), compression="zstd"
    ) as file:
        for documents in read_documents(task.inputs[0], schema.names):
            last = first + len(documents)
            copies = pa.array(copies_D[first:last], pa.int32())
            sizes = pa.table(
                [pa.array(kind_D[first:last]), documents["language"], pc.binary_length(documents["text"])],
                ["kind", "language", "bytes"],
            )
            grouped = sizes.group_by(["kind", "language"], use_threads=False).aggregate(
                [("bytes", "count"), ("bytes", "sum")]
            )
            for each in grouped.to_pylist():
                row = counts[KINDS[each["kind"]]].setdefault(each["language"], [0, 0])
                row[0] += each["bytes_count"]
                row[1] += each["bytes_sum"]
            file.write_table(documents.append_column("copies", copies).filter(pa.array(kind_D[first:last] == 0)))
            first = last
    return {"documents": counts.pop(KINDS[0]), "removed": counts}


class _ShingleFiles:
    """Shingle sets of wanted documents, read from disk one at a time. paths: outputs of `gather`, two a shard."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths[::2]
        parts = [np.load(path) for path in paths[1::2]]
        self._places = np.concatenate(parts)
        self._first = np.cumsum([0, *(len(part) for part in parts)])

    def load(self, document: int) -> np.ndarray:
        row = int(np.searchsorted(self._places["document"], document))
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        place = self._places[row]
        return np.fromfile(self._paths[shard], dtype="<u8", count=int(place["count"]), offset=8 * int(place["first"]))

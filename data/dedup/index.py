"""The signature index of a corpus: what a later corpus needs to find its documents there, without their texts.

    text.npy, band-000.npy ...  ENTRY, sorted: keys of the texts and of each band, and whose they are
    sketch.npy                  uint8 [N, P], the low byte of every minimum
    identity.parquet            source and id of document 0 .. N - 1
    index.json                  what the keys were made with

Only survivors are in it. An index made against an earlier one holds the documents of both. Texts are not kept, so the
Jaccard of a document with an earlier one is estimated from the sketches: the share of equal bytes, less the 1/256 that
agree by chance; its standard error is sqrt(J (1 - J) / P).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.dedup.resolve import MATCH
from data.dedup.settings import DedupSettings, joined, joined_band, read_documents
from data.errors import DataError, UsageError
from data.hashing import canonical_json
from data.stages.contract import Counts, Task

INDEX_FILE = "index.json"
TEXT_FILE, SKETCH_FILE, IDENTITY_FILE = "text.npy", "sketch.npy", "identity.parquet"
SHARD_FILES, SIGNED_FILES = 5, 4  # of one shard among the inputs: with the shard itself, and without
INDEX_VERSION = 2
ENTRY = np.dtype([("key", np.uint64), ("low", np.uint64), ("identity", np.uint64), ("document", np.int64)])
# Documents of one earlier bucket that a new one is compared with, in the order of their identities' hashes.
COMPARED = 8
_NAMES = pa.schema([("source", pa.string()), ("id", pa.string())])


@dataclass(frozen=True)
class Indexed:
    """Settings of the tasks here. shards: of this corpus. earlier: an earlier index is merged."""

    settings: DedupSettings
    shards: int
    earlier: bool = False


def band_file(band: int) -> str:
    """Name of the file with the entries of one band."""
    return f"band-{band:03d}.npy"


def index_files(bands: int) -> list[str]:
    """Names of an index's files, in the order in which tasks take them."""
    return [INDEX_FILE, TEXT_FILE, SKETCH_FILE, IDENTITY_FILE, *(band_file(band) for band in range(bands))]


def check_index(index: Path, settings: DedupSettings) -> dict[str, Any]:
    """What index.json says. Errors: DataError if there is none; UsageError if it was made with other settings."""
    try:
        found = dict(json.loads((index / INDEX_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{index}: no signature index: {error}".replace("\n", " ")) from None
    for key, value in _made_with(settings).items():
        if found.get(key) != value:
            raise UsageError(f"{index}: made with {key} {found.get(key)}, this corpus has {value}")
    return found


def make_index(task: Task, out: Path) -> Counts:
    """inputs: survivor.npy; of every shard the shard, rank.npy, text.npy, sketch.npy, band.npy; then `index_files` of
    an earlier index, if there is one. Settings: Indexed. Outputs: `index_files`.
    """
    indexed: Indexed = task.settings
    bands = indexed.settings.minhash.bands
    ours = _by_shard(task.inputs[1:], indexed.shards, SHARD_FILES)
    earlier = task.inputs[1 + indexed.shards * SHARD_FILES :]
    survivor_D = np.load(task.inputs[0])
    kept_D = survivor_D == np.arange(len(survivor_D))
    rank_N = joined([files[1] for files in ours])[kept_D]
    old = pq.read_metadata(earlier[3]).num_rows if earlier else 0
    number_N = old + np.arange(len(rank_N))

    def entries(
        key_N: np.ndarray, low_N: np.ndarray | None, taking_part_N: np.ndarray, before: str | None
    ) -> np.ndarray:
        entry_N = np.zeros(len(rank_N), dtype=ENTRY)
        entry_N["key"], entry_N["low"] = key_N, 0 if low_N is None else low_N
        entry_N["identity"], entry_N["document"] = rank_N["identity"], number_N
        entry_N = entry_N[taking_part_N]
        if before:
            entry_N = np.concatenate([np.load(before), entry_N])
        return entry_N[np.lexsort((entry_N["identity"], entry_N["low"], entry_N["key"]))]

    text_N2 = joined([files[2] for files in ours])[kept_D]
    everything = np.ones(len(rank_N), dtype=bool)
    before = earlier[1] if earlier else None
    np.save(out / TEXT_FILE, entries(text_N2[:, 0], text_N2[:, 1], everything, before))
    for band in range(bands):
        key_N = joined_band([files[4] for files in ours], band)[kept_D]
        before = earlier[4 + band] if earlier else None
        np.save(out / band_file(band), entries(key_N, None, ~rank_N["empty"], before))
    _write_sketches(out / SKETCH_FILE, [files[3] for files in ours], kept_D, earlier[2] if earlier else None)
    _write_identities(out / IDENTITY_FILE, [files[0] for files in ours], kept_D, earlier[3] if earlier else None)
    count = old + len(rank_N)
    (out / INDEX_FILE).write_bytes(canonical_json({**_made_with(indexed.settings), "documents": count}) + b"\n")
    return {"indexed": count}


def find_earlier(task: Task, out: Path) -> Counts:
    """inputs: first.npy; of every shard rank.npy, text.npy, sketch.npy, band.npy; `index_files` of the earlier index.
    Settings: Indexed. Output: earlier.npy, MATCH sorted by document, the likest earlier document of each that has one.
    """
    indexed: Indexed = task.settings
    bands, threshold = indexed.settings.minhash.bands, indexed.settings.threshold
    ours = _by_shard(task.inputs[1:], indexed.shards, SIGNED_FILES)
    index = task.inputs[1 + indexed.shards * SIGNED_FILES :]
    first_D = np.load(task.inputs[0])
    rank_D = joined([files[0] for files in ours])
    new_N = np.flatnonzero(first_D == np.arange(len(first_D)))

    text_N2 = joined([files[1] for files in ours])[new_N]
    found = [_equal(new_N, text_N2[:, 0], text_N2[:, 1], np.load(index[1], mmap_mode="r"), 1)]
    exact = len(found[0])
    found[0]["jaccard"] = 1.0
    new_N = np.setdiff1d(new_N[~rank_D["empty"][new_N]], found[0]["document"])
    old_sketch = np.load(index[2], mmap_mode="r")
    new_sketch = joined([files[2] for files in ours])
    for band in range(bands):
        key_N = joined_band([files[3] for files in ours], band)[new_N]
        match = _equal(new_N, key_N, None, np.load(index[4 + band], mmap_mode="r"), COMPARED)
        match["jaccard"] = estimate(new_sketch[match["document"]], old_sketch[match["old"]])
        found.append(match[match["jaccard"] >= threshold])
    match = np.concatenate(found)
    # Document numbers of the index follow its shards; the hash of the identity does not.
    identity = _identity_hashes(np.load(index[1], mmap_mode="r"), match["old"])
    match = match[np.lexsort((identity, -match["jaccard"], match["document"]))]
    match = match[np.flatnonzero(np.diff(match["document"], prepend=-1))]
    np.save(out / "earlier.npy", match)
    return {"exact": exact, "near": len(match) - exact}


def estimate(left_NP: np.ndarray, right_NP: np.ndarray) -> np.ndarray:
    """Jaccard float64 [N] estimated from two sketches of low bytes, uint8 [N, P]."""
    agree_N = (left_NP == right_NP).mean(axis=1) if len(left_NP) else np.empty(0)
    return np.clip((agree_N - 1 / 256) / (1 - 1 / 256), 0.0, 1.0)


def _equal(
    document_N: np.ndarray, key_N: np.ndarray, low_N: np.ndarray | None, entry: np.ndarray, most: int
) -> np.ndarray:
    """MATCH of documents whose key is in the index, with up to `most` entries each; Jaccard not yet set."""
    place_N = np.searchsorted(entry["key"], key_N)
    found = []
    for step in range(most):
        inside_N = place_N + step < len(entry)
        candidate = entry[np.where(inside_N, place_N + step, 0)] if len(entry) else np.zeros(len(key_N), dtype=ENTRY)
        same_N = inside_N & (candidate["key"] == key_N)
        if low_N is not None:
            same_N &= candidate["low"] == low_N
        match = np.zeros(int(same_N.sum()), dtype=MATCH)
        match["document"], match["old"] = document_N[same_N], candidate["document"][same_N]
        found.append(match)
    return np.concatenate(found)


def _identity_hashes(text: np.ndarray, old_M: np.ndarray) -> np.ndarray:
    """Every document of an index has one entry in text.npy, which knows its identity's hash."""
    hash_N = np.empty(len(text), dtype=np.uint64)
    hash_N[text["document"]] = text["identity"]
    return hash_N[old_M]


def _write_sketches(path: Path, sketches: Sequence[str], kept_D: np.ndarray, before: str | None) -> None:
    parts = [np.load(before, mmap_mode="r")] if before else []
    old = sum(len(part) for part in parts)
    width = np.load(sketches[0], mmap_mode="r").shape[1]
    shape = (old + int(kept_D.sum()), width)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        )
        for part in parts:
            file.write(np.ascontiguousarray(part).tobytes())
        first = 0
        for name in sketches:
            sketch_DP = np.load(name)
            file.write(sketch_DP[kept_D[first : first + len(sketch_DP)]].tobytes())
            first += len(sketch_DP)


def _write_identities(path: Path, shards: Sequence[str], kept_D: np.ndarray, before: str | None) -> None:
    first = 0
    with pq.ParquetWriter(path, _NAMES, compression="zstd") as file:
        if before:
            for names in read_documents(before, _NAMES.names):
                file.write_table(names.cast(_NAMES))
        for shard in shards:
            for names in read_documents(shard, _NAMES.names):
                kept = pa.array(kept_D[first : first + len(names)])
                file.write_table(names.filter(kept).select(_NAMES.names).cast(_NAMES))
                first += len(names)


def _by_shard(inputs: Sequence[str], shards: int, files: int) -> list[Sequence[str]]:
    return [inputs[n * files : (n + 1) * files] for n in range(shards)]


def _made_with(settings: DedupSettings) -> dict[str, Any]:
    return {"version": INDEX_VERSION, "minhash": asdict(settings.minhash), "scope": settings.scope}

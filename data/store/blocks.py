"""Token blocks: a `.bin` of uint32 little-endian tokens, a `.npy` of document offsets, an `.ids.json` of identities.

The block is the unit of shuffling, packing, reading, fetching and repair. Documents are in random order at build time,
so each block is a fair sample of its source. N: tokens, D: documents of a block.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.contract import Block, Manifest
from data.errors import DataError
from data.hashing import canonical_json
from data.publish import make_directory, write_file
from data.store.files import (
    INDEX_HEADER_BYTES,
    TOKEN_BYTES,
    TOKEN_DTYPE,
    check_digest,
    check_size,
    identities_bytes,
    index_bytes,
)
from data.store.location import LocalLocation, Location, open_location
from data.store.names import block_stem, checked_source_name

BLOCK_TOKENS = 1 << 24
OPEN_BLOCKS = 64
PREFETCH_THREADS = 2
CHECK_BYTES = 1 << 22


@dataclass(frozen=True)
class Identities:
    """Of a block's documents, in order. id: one that is stored several times has it each time. copies: documents that
    each stands for after dedup, itself included; None where that is not known.
    """

    id: list[str]
    copies: list[int] | None = None


def split_into_blocks(length_N: Sequence[int] | np.ndarray, block_tokens: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of documents, whole ones, for blocks of about `block_tokens`, as even as the documents
    allow.
    """
    end_N = np.cumsum(length_N)
    count = max(1, round(int(end_N[-1]) / block_tokens))
    targets = [int(end_N[-1]) * i / count for i in range(1, count)]
    cuts = sorted({0, len(length_N), *(int(cut) for cut in np.searchsorted(end_N, targets, side="left") + 1)})
    return [(first, last) for first, last in pairwise(cuts) if last > first]


def write_block(
    directory: Path, source: str, number: int, documents: Sequence[np.ndarray], identities: Identities | None = None
) -> Block:
    """Write block `number` of a source, whole documents (BOS and EOS included), below `directory`.

    Errors: DataError for unsafe names, empty documents, or identities that do not fit them; CannotWriteError.
    """
    where = block_stem(checked_source_name(source, str(directory)), number)
    if not len(documents) or not all(len(document) for document in documents):
        raise DataError(f"{where}: a block and its documents must not be empty")
    held = {} if identities is None else {key: value for key, value in asdict(identities).items() if value is not None}
    if held and _identities(held, len(documents)) is None:
        lengths = " and ".join(f"{len(value)} {key}" for key, value in held.items())
        raise DataError(f"{where}: {lengths} are not the identities of {len(documents)} documents")
    tokens_N = np.concatenate(documents).astype(TOKEN_DTYPE)
    offset_D = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype("<i8")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, offset_D, version=(1, 0), allow_pickle=False)
    files = {".bin": tokens_N.tobytes(), ".npy": buffer.getvalue()}
    if held:
        files[".ids.json"] = canonical_json(held)
        if len(files[".ids.json"]) > (limit := identities_bytes(len(documents))):
            found = len(files[".ids.json"])
            raise DataError(f"{where}: identities take {found} bytes, allowed {limit} for {len(documents)} documents")
    make_directory((directory / where).parent)
    for suffix, content in files.items():
        write_file(directory / f"{where}{suffix}", content)
    digests = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in files.items()}
    return Block(
        source, number, len(documents), len(tokens_N), digests[".bin"], digests[".npy"], digests.get(".ids.json", "")
    )


class BlockStore:
    """Reads blocks of a manifest: each file checked against its digest when it is first read, then mapped.

    corpus: directory, fsspec URL or location. verified: the digests were checked before (`verify_files`), so that only
    sizes and contents are. Safe for several threads.
    """

    def __init__(self, corpus: str | Path | Location, manifest: Manifest, *, verified: bool = False) -> None:
        self.location = corpus if isinstance(corpus, Location) else open_location(corpus)
        self.manifest = manifest
        self._check = not (verified or self.location.checks_digests)
        self._checked: set[str] = set()
        self._open: OrderedDict[str, np.ndarray] = OrderedDict()
        self._fetching: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def directory(self) -> Path:
        """The directory of a local corpus. Error: DataError for one at a URL."""
        if not isinstance(self.location, LocalLocation):
            raise DataError(f"{self.location.shown('')}: not a local directory")
        return self.location.root

    def offsets(self, block: Block) -> np.ndarray:
        """Document offsets, int64 [D + 1], first 0 and last block.tokens. Error: DataError if the index does not fit
        the block.
        """
        self._wait(block)
        return self._offsets(block)

    def tokens(self, block: Block) -> np.ndarray:
        """All tokens of a block, uint32 [N], mapped read-only. Error: DataError, also for ids beyond the vocabulary."""
        self._wait(block)
        return self._tokens(block)

    def identities(self, block: Block) -> Identities:
        """Identities of a block's documents. Error: DataError, also where the corpus has none."""
        where = self.location.shown(block.ids_file)
        if not block.ids_sha256:
            raise DataError(f"{where}: this corpus was made without identities of its documents")
        with self._file(block.ids_file, block.ids_sha256, identities_bytes(block.documents)) as file:
            try:
                found = _identities(json.load(file), block.documents)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from None
        if found is None:
            raise DataError(f"{where}: not the identities of {block.documents} documents")
        return found

    def prefetch(self, blocks: Iterable[Block]) -> None:
        """Fetch, check and map these blocks in background threads. What goes wrong is raised when a block is read."""
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="prefetch")
            for block in blocks:
                if block.file not in self._open and block.file not in self._fetching:
                    self._fetching[block.file] = self._threads.submit(self._load, block)

    def close(self) -> None:
        """Let go of all blocks and threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        self._fetching.clear()
        self._open.clear()

    def _wait(self, block: Block) -> None:
        if self._fetching and (future := self._fetching.pop(block.file, None)) is not None:
            future.result()

    def _load(self, block: Block) -> None:
        self._offsets(block)
        self._tokens(block)

    def _offsets(self, block: Block) -> np.ndarray:
        where = self.location.shown(block.index_file)
        with self._file(block.index_file, block.index_sha256, index_bytes(block)) as file:
            try:
                offset_D = np.lib.format.read_array(file, allow_pickle=False, max_header_size=INDEX_HEADER_BYTES)
            except (ValueError, EOFError) as error:
                raise DataError(f"{where}: cannot read the block index: {error}") from None
        if offset_D.shape != (block.documents + 1,) or offset_D.dtype != np.dtype("<i8"):
            raise DataError(f"{where}: holds {offset_D.dtype} {offset_D.shape}, needs int64 ({block.documents + 1},)")
        if offset_D[0] != 0 or offset_D[-1] != block.tokens:
            found = f"{offset_D[0]} to {offset_D[-1]}"
            raise DataError(f"{where}: offsets run from {found}, the block has {block.tokens} tokens")
        if len(backwards := np.flatnonzero(np.diff(offset_D) <= 0)):
            raise DataError(f"{where}: document {backwards[0]} at offset {offset_D[backwards[0]]} ends where it begins")
        return offset_D.astype(np.int64, copy=False)

    def _tokens(self, block: Block) -> np.ndarray:
        with self._lock:
            if (tokens_N := self._open.get(block.file)) is not None:
                self._open.move_to_end(block.file)
                return tokens_N
        where = self.location.shown(block.file)
        with self._file(block.file, block.sha256, block.tokens * TOKEN_BYTES) as file:
            tokens_N = np.memmap(file, dtype=TOKEN_DTYPE, mode="r").view(np.ndarray)
        self._check_vocabulary(where, tokens_N)
        with self._lock:
            self._open[block.file] = tokens_N
            limit = self.location.mapped_bytes
            while len(self._open) > OPEN_BLOCKS or (
                limit is not None and len(self._open) > 1 and sum(map(_bytes, self._open.values())) > limit
            ):
                self._open.popitem(last=False)
        return tokens_N

    def _check_vocabulary(self, where: str, tokens_N: np.ndarray) -> None:
        limit = self.manifest.vocab_size
        for first in range(0, len(tokens_N), CHECK_BYTES // TOKEN_BYTES):
            part_N = tokens_N[first : first + CHECK_BYTES // TOKEN_BYTES]
            if part_N.max() >= limit:
                place = int(np.flatnonzero(part_N >= limit)[0])
                token = int(part_N[place])
                raise DataError(f"{where}: token {token} at index {first + place}, but the vocabulary has {limit}")

    def _file(self, name: str, sha256: str, limit: int) -> BinaryIO:
        """An open file of the corpus, its digest checked once."""
        file = self.location.open(name, sha256, limit)
        try:
            if name.endswith(".bin"):
                check_size(file, self.location.shown(name), limit)
            if self._check and name not in self._checked:
                check_digest(file, self.location.shown(name), sha256)
                self._checked.add(name)
        except DataError:
            file.close()
            raise
        return file


def _identities(content: Any, documents: int) -> Identities | None:
    """Content of an `.ids.json`, None where it is not that of so many documents."""
    if not isinstance(content, dict) or not {"id"} <= set(content) <= {"id", "copies"}:
        return None
    columns = list(content.values())
    if not all(isinstance(column, list) and len(column) == documents for column in columns):
        return None
    good = all(type(name) is str for name in content["id"])
    good &= all(type(count) is int and count >= 1 for count in content.get("copies", []))
    return Identities(**content) if good else None


def _bytes(array: np.ndarray) -> int:
    return array.nbytes

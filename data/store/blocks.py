"""Token blocks on disk: a `.bin` of uint32 little-endian tokens beside a `.npy` of document offsets.

The block is the unit of shuffling, packing, reading and repair. Documents are in random order at build time, so each
block is a fair sample of its source.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.contract import Block, Manifest
from data.errors import DataError
from data.publish import make_directory, write_file
from data.store.manifest import TOKEN_DTYPE

OPEN_BLOCKS = 64


def split_into_blocks(length_N: Sequence[int], block_tokens: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of documents, whole ones, for blocks of about `block_tokens`, as even as the documents
    allow.
    """
    end_N = np.cumsum(length_N)
    count = max(1, round(int(end_N[-1]) / block_tokens))
    targets = [int(end_N[-1]) * i / count for i in range(1, count)]
    cuts = sorted({0, len(length_N), *(int(cut) for cut in np.searchsorted(end_N, targets, side="left") + 1)})
    return [(first, last) for first, last in pairwise(cuts) if last > first]


def write_block(directory: Path, name: str, documents: Sequence[np.ndarray]) -> Block:
    """Write one block of whole documents (BOS and EOS included) under `directory`/`name`.{bin,npy}."""
    tokens_N = np.concatenate(documents).astype(TOKEN_DTYPE)
    offset_D = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype("<i8")
    buffer = io.BytesIO()
    np.save(buffer, offset_D, allow_pickle=False)
    make_directory((directory / name).parent)
    files = {f"{name}.bin": tokens_N.tobytes(), f"{name}.npy": buffer.getvalue()}
    for file, content in files.items():
        write_file(directory / file, content)
    digest, index_digest = (hashlib.sha256(content).hexdigest() for content in files.values())
    return Block(f"{name}.bin", len(documents), len(tokens_N), digest, f"{name}.npy", index_digest)


class BlockStore:
    """Reads blocks of a manifest; holds at most OPEN_BLOCKS of them mapped."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._open: OrderedDict[str, np.ndarray] = OrderedDict()

    def offsets(self, block: Block) -> np.ndarray:
        """Document offsets, int64 [documents + 1], first 0 and last block.tokens. Error: DataError if the index does
        not fit the block.
        """
        path = self.directory / block.index_file
        try:
            offset_D = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot read the block index: {error}") from None
        right_shape = offset_D.shape == (block.documents + 1,) and offset_D.dtype.kind == "i"
        if not right_shape or offset_D[0] != 0 or offset_D[-1] != block.tokens or (np.diff(offset_D) <= 0).any():
            raise DataError(f"{path}: offsets do not describe {block.documents} documents of {block.tokens} tokens")
        return offset_D.astype(np.int64)

    def tokens(self, block: Block) -> np.ndarray:
        """All tokens of a block, uint32 [block.tokens], mapped read-only. Error: DataError, also for ids beyond the
        vocabulary.
        """
        if block.file in self._open:
            self._open.move_to_end(block.file)
            return self._open[block.file]
        path = self.directory / block.file
        try:
            tokens_N = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot read the block: {error}") from None
        if len(tokens_N) != block.tokens:
            raise DataError(f"{path}: {len(tokens_N)} tokens, the manifest has {block.tokens}")
        beyond = np.flatnonzero(tokens_N >= self.manifest.vocab_size)
        if len(beyond):
            place, limit = int(beyond[0]), self.manifest.vocab_size
            raise DataError(f"{path}: token {int(tokens_N[place])} at index {place}, but the vocabulary has {limit}")
        self._open[block.file] = tokens_N
        if len(self._open) > OPEN_BLOCKS:
            self._open.popitem(last=False)
        return tokens_N

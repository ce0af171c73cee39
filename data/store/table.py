"""The block table: one fixed-width record per block of a source, in a `.npy` file that is mapped, not read.

0.9 million blocks (14.8T tokens at 16M a block) are 106 MB on disk; a lookup touches one page. B: blocks.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from data.contract import Block
from data.errors import DataError
from data.store.names import checked_source_name

# first_document and first_token count what lies before the block in its source. Digests are raw bytes; a digest of
# zeros stands for a file that the corpus does not have.
BLOCK_DTYPE = np.dtype(
    [
        ("documents", "<u4"),
        ("tokens", "<u4"),
        ("first_document", "<u8"),
        ("first_token", "<u8"),
        ("sha256", "u1", 32),
        ("index_sha256", "u1", 32),
        ("ids_sha256", "u1", 32),
    ]
)
HEADER_BYTES = 512
CHUNK_RECORDS = 8192


class BlockTable(Sequence[Block]):
    """The blocks of a source as a lazy sequence over records [B] of BLOCK_DTYPE; columns are views, copied nowhere."""

    def __init__(self, source: str, record_B: np.ndarray) -> None:
        self.source, self.record_B = source, record_B

    def __len__(self) -> int:
        return len(self.record_B)

    @overload
    def __getitem__(self, place: int) -> Block: ...
    @overload
    def __getitem__(self, place: slice) -> list[Block]: ...
    def __getitem__(self, place: int | slice) -> Block | list[Block]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(f"source '{self.source}' has {len(self)} blocks, asked for {place}")
        record = self.record_B[number]
        sha256, index_sha256, ids_sha256 = (
            record[field].tobytes().hex() for field in ("sha256", "index_sha256", "ids_sha256")
        )
        if not int(ids_sha256, 16):
            ids_sha256 = ""
        documents, tokens = int(record["documents"]), int(record["tokens"])
        return Block(self.source, number, documents, tokens, sha256, index_sha256, ids_sha256)

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockTable):
            return NotImplemented
        return self.source == other.source and np.array_equal(self.record_B, other.record_B)

    __hash__ = None  # type: ignore[assignment]

    @property
    def documents_B(self) -> np.ndarray:
        """Documents of each block, uint32 [B]."""
        column: np.ndarray = self.record_B["documents"]
        return column

    @property
    def tokens_B(self) -> np.ndarray:
        """Tokens of each block, uint32 [B]."""
        column: np.ndarray = self.record_B["tokens"]
        return column

    @property
    def first_document_B(self) -> np.ndarray:
        """Documents of the source before each block, uint64 [B]."""
        column: np.ndarray = self.record_B["first_document"]
        return column

    @property
    def first_token_B(self) -> np.ndarray:
        """Tokens of the source before each block, uint64 [B]."""
        column: np.ndarray = self.record_B["first_token"]
        return column


def block_table(source: str, blocks: Sequence[Block]) -> BlockTable:
    """The table of a source's blocks. Error: DataError for blocks of another source, out of order, or too large."""
    if isinstance(blocks, BlockTable) and blocks.source == source:
        return blocks
    record_B = np.zeros(len(blocks), dtype=BLOCK_DTYPE)
    limit = np.iinfo(np.uint32).max
    for number, block in enumerate(blocks):
        if (block.source, block.number) != (source, number):
            raise DataError(f"block {number} of source '{source}': found {block.number} of source '{block.source}'")
        if not (0 < block.documents <= limit and 0 < block.tokens <= limit):
            raise DataError(f"{block.file}: {block.documents} documents, {block.tokens} tokens; allowed 1 to {limit}")
        record = record_B[number]
        record["documents"], record["tokens"] = block.documents, block.tokens
        for field in ("sha256", "index_sha256", "ids_sha256"):
            if digest := getattr(block, field):
                record[field] = np.frombuffer(bytes.fromhex(digest), dtype=np.uint8)
    for count, first in (("documents", "first_document"), ("tokens", "first_token")):
        record_B[first][1:] = np.cumsum(record_B[count].astype(np.uint64))[:-1]
    return BlockTable(checked_source_name(source, "block table"), record_B)


def table_bytes(table: BlockTable) -> bytes:
    """Content of the table's file: `.npy` version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(table.record_B), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def table_sha256(table: BlockTable) -> str:
    """sha256 of the table's file, hexadecimal, without making the file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(table.record_B))
    digest = hashlib.sha256(buffer.getvalue())
    for first in range(0, len(table), CHUNK_RECORDS):
        digest.update(np.ascontiguousarray(table.record_B[first : first + CHUNK_RECORDS]).tobytes())
    return digest.hexdigest()


def open_table(file: BinaryIO, where: Path | str, source: str, blocks: int, sha256: str) -> BlockTable:
    """Map the table in `file`, checked to the byte in one pass that keeps nothing in memory.

    blocks, sha256: what the manifest says. Errors (DataError): another digest, size or record; counts that do not add
    up.
    """
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=HEADER_BYTES)
    except ValueError as error:
        raise DataError(f"{where}: not a block table: {str(error).splitlines()[0]}") from None
    if version != (1, 0) or dtype != BLOCK_DTYPE or shape != (blocks,):
        raise DataError(f"{where}: holds {shape} records of {dtype}, the manifest has {blocks} blocks")
    start = file.tell()
    file.seek(0)
    digest = hashlib.sha256(file.read(start))
    before = {"documents": 0, "tokens": 0}
    done = 0
    while content := file.read(CHUNK_RECORDS * BLOCK_DTYPE.itemsize):
        digest.update(content)
        record_B = np.frombuffer(content, dtype=BLOCK_DTYPE, count=len(content) // BLOCK_DTYPE.itemsize)
        for count, total in before.items():
            end_B = total + np.cumsum(record_B[count], dtype=np.uint64)
            first_B = record_B[f"first_{count[:-1]}"]
            if not record_B[count].all() or (first_B != end_B - record_B[count]).any():
                raise DataError(f"{where}: {count} of blocks {done} to {done + len(record_B) - 1} do not add up")
            before[count] = int(end_B[-1]) if len(end_B) else total
        done += len(record_B)
    if (found := digest.hexdigest()) != sha256:
        raise DataError(f"{where}: sha256 is {found}, the manifest has {sha256}")
    record_B = np.memmap(file, dtype=BLOCK_DTYPE, mode="r", offset=start, shape=shape) if blocks else np.empty(0, dtype)
    return BlockTable(source, record_B)

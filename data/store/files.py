"""How long the files of a block may be, and their checks."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO

import numpy as np

from data.contract import Block
from data.errors import DataError

TOKEN_BYTES = 4
TOKEN_DTYPE = np.dtype("<u4")
INDEX_HEADER_BYTES = 128
IDENTITY_BYTES = 4096 + 11
IDENTITY_FRAME_BYTES = 32
CHECK_BYTES = 1 << 20


def index_bytes(block: Block) -> int:
    """Bytes of a block's `.npy`: numpy's header and one int64 per document, and one more."""
    return INDEX_HEADER_BYTES + 8 * (block.documents + 1)


def identities_bytes(documents: int) -> int:
    """Bytes that the `.ids.json` of a block of so many documents may have at most."""
    return IDENTITY_FRAME_BYTES + documents * IDENTITY_BYTES


def block_files(block: Block) -> list[tuple[str, str, int]]:
    """(name, sha256, most bytes) of a block's files."""
    files = [
        (block.file, block.sha256, block.tokens * TOKEN_BYTES),
        (block.index_file, block.index_sha256, index_bytes(block)),
    ]
    if block.ids_sha256:
        files.append((block.ids_file, block.ids_sha256, identities_bytes(block.documents)))
    return files


def check_size(file: BinaryIO, where: str, size: int) -> None:
    """Compare the size of a block with the manifest's. Error: DataError."""
    if (found := file.seek(0, io.SEEK_END)) != size:
        raise DataError(f"{where}: {found} bytes, the manifest has {size // TOKEN_BYTES} tokens of {TOKEN_BYTES} bytes")


def check_digest(file: BinaryIO, where: str, sha256: str) -> None:
    """Compare a file's content with its sha256 and go back to its start. Error: DataError."""
    file.seek(0)
    digest = hashlib.sha256()
    while content := file.read(CHECK_BYTES):
        digest.update(content)
    if (found := digest.hexdigest()) != sha256:
        raise DataError(f"{where}: sha256 is {found}, the manifest has {sha256}")
    file.seek(0)

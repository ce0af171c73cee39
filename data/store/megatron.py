"""Megatron-Core's indexed dataset, `.bin` and `.idx`, to the byte: reading, writing, and whole corpora to and from it.

`.idx` version 1, little-endian: `MMIDIDX\\0\\0`, uint64 version, uint8 code of the token type, uint64 sequences S,
uint64 document boundaries B, int32 lengths [S], int64 byte offsets into `.bin` [S], int64 first sequence of each
document and S itself [B]. `.bin`: the tokens and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.errors import CannotWriteError, DataError
from data.publish import make_directory

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes; it has no uint32.
TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
SMALL_VOCABULARY = 65500


@dataclass(frozen=True)
class Indexed:
    """A dataset of D documents. token_N: all tokens, mapped. offset_D: int64 [D + 1], document d is tokens
    offset_D[d]:offset_D[d + 1]. sequences: how many the documents were made of.
    """

    prefix: Path
    token_N: np.ndarray
    offset_D: np.ndarray
    sequences: int

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document."""
        return self.token_N[self.offset_D[number] : self.offset_D[number + 1]]


def token_type(vocab_size: int) -> tuple[int, np.dtype[Any]]:
    """(code, type) that Megatron chooses for a vocabulary."""
    code = 8 if vocab_size < SMALL_VOCABULARY else 4
    return code, TOKEN_TYPES[code]


def index_parts(code: int, length_D: np.ndarray) -> Iterator[bytes]:
    """Content of an `.idx` whose documents are one sequence each, in parts. Error: DataError for one above 2^31 - 1."""
    if len(length_D) and length_D.max() > np.iinfo(np.int32).max:
        raise DataError(f"document {int(length_D.argmax())}: {int(length_D.max())} tokens, .idx has 31 bits for them")
    count = len(length_D)
    yield HEADER.pack(MAGIC, VERSION, code, count, count + 1)
    yield length_D.astype("<i4").tobytes()
    end_D = np.cumsum(length_D, dtype="<i8") * TOKEN_TYPES[code].itemsize
    yield np.concatenate([[0], end_D[:-1]]).astype("<i8").tobytes() if count else b""
    yield np.arange(count + 1, dtype="<i8").tobytes()


def read_indexed(prefix: Path) -> Indexed:
    """The dataset `prefix`.bin, `prefix`.idx. Error: DataError for what is damaged, multimodal or of floats."""
    path = prefix.with_name(f"{prefix.name}.idx")
    try:
        index = np.memmap(path, dtype=np.uint8, mode="r")
        magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{path}: cannot read the index: {error}") from None
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{path}: not an index of version {VERSION}: begins with {magic!r}, version {version}")
    if code not in TOKEN_TYPES:
        raise DataError(f"{path}: token type {code}, allowed {', '.join(map(str, TOKEN_TYPES))}")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if len(index) != expected:
        raise DataError(
            f"{path}: {len(index)} bytes, {sequences} sequences and {boundaries} boundaries need {expected}; datasets "
            "with modes of sequences are not read"
        )
    at = HEADER.size
    length_S = np.frombuffer(index, "<i4", sequences, at).astype(np.int64)
    pointer_S = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
    first_B = np.frombuffer(index, "<i8", boundaries, at + 12 * sequences)
    dtype = TOKEN_TYPES[code]
    end_S = np.cumsum(length_S)
    begin_S = end_S - length_S
    if (length_S < 0).any() or (wrong := np.flatnonzero(pointer_S != begin_S * dtype.itemsize)).size:
        place = int(np.flatnonzero(length_S < 0)[0]) if (length_S < 0).any() else int(wrong[0])
        raise DataError(f"{path}: sequence {place} does not lie behind the one before it")
    if not boundaries or first_B[0] != 0 or first_B[-1] != sequences or (np.diff(first_B) < 0).any():
        raise DataError(f"{path}: document boundaries do not run from 0 to {sequences}")
    binary = prefix.with_name(f"{prefix.name}.bin")
    tokens = int(end_S[-1]) if sequences else 0
    try:
        size = binary.stat().st_size
        if size != tokens * dtype.itemsize:
            raise DataError(f"{binary}: {size} bytes, the index has {tokens} tokens of {dtype.itemsize} bytes")
        token_N = np.memmap(binary, dtype=dtype, mode="r") if tokens else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{binary}: cannot read: {error.strerror}") from None
    offset_D = np.concatenate([[0], end_S])[first_B]
    return Indexed(prefix, token_N, offset_D, sequences)


def write_indexed(prefix: Path, vocab_size: int, parts: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, object]:
    """Write `prefix`.bin and .idx from parts (tokens [N], lengths of their documents [D]).

    Returns tokens, documents, token_type and the sha256 of both. Errors: DataError, CannotWriteError; nothing is left
    under these names then.
    """
    code, dtype = token_type(vocab_size)
    lengths = []
    make_directory(prefix.parent)
    binary, index = (prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx"))
    with _appearing(binary, index) as (bin_file, idx_file):
        digests = [hashlib.sha256(), hashlib.sha256()]
        for token_N, length_D in parts:
            content = token_N.astype(dtype).tobytes()
            bin_file.write(content)
            digests[0].update(content)
            lengths.append(length_D)
        length_D = np.concatenate(lengths) if lengths else np.empty(0, np.int64)
        for content in index_parts(code, length_D):
            idx_file.write(content)
            digests[1].update(content)
    return {
        "documents": len(length_D),
        "tokens": int(length_D.sum()),
        "token_type": dtype.name,
        "bin_sha256": digests[0].hexdigest(),
        "idx_sha256": digests[1].hexdigest(),
    }


def checked_documents(
    data: Indexed, numbers: Sequence[int], vocab_size: int, ends: tuple[int, int] | None
) -> list[np.ndarray]:
    """Documents as blocks hold them. ends: (BOS, EOS) to put around each; None: they must be there, as BOS_EOS.

    Error: DataError naming document and token for one that is empty or beyond the vocabulary.
    """
    documents = []
    for number in numbers:
        token_N = data.document(number)
        if not len(token_N):
            raise DataError(f"{data.prefix}: document {number} is empty")
        if len(beyond := np.flatnonzero((token_N < 0) | (token_N >= vocab_size))):
            place = int(beyond[0])
            raise DataError(
                f"{data.prefix}: document {number} at offset {place}: token {int(token_N[place])}, but the vocabulary "
                f"has {vocab_size}"
            )
        stored_N = token_N.astype(np.uint32)
        documents.append(stored_N if ends is None else np.concatenate([[ends[0]], stored_N, [ends[1]]]))
    return documents


@contextmanager
def _appearing(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files to write that appear under their names, in order, when the block ends well."""
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        files: list[BinaryIO] = [partial.open("wb") for partial in partials]
        try:
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in files:
                file.close()
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    except OSError as error:
        raise CannotWriteError(f"cannot write {paths[0]}: {error.strerror}") from None
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)

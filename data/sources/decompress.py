"""Decompression in pieces: bounded memory, every fault with its place.

A zstd file of 65,553 bytes can hold 2 GiB. Input goes in by small pieces, so that no single call gives more than 64 MiB
(a byte gives at most 32,768 in zstd, 1,032 in gzip), and what came out is compared with what went in after each
(RFC 8878, RFC 1952).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import zstandard

from data.errors import DataError
from data.sources.config import ReadConfig
from data.sources.files import SourceFile, open_file, read_some

CHUNK = 1 << 20
PIECES = {"zst": 2 << 10, "gz": 64 << 10}
_MAGIC = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes) -> bytes: ...


def chunks(file: SourceFile, settings: ReadConfig, offset: int = 0) -> Iterator[bytes]:
    """The uncompressed bytes from `offset` on, in chunks of about 1 MiB. A compressed file is decompressed from its
    start to get there.

    Errors (DataError, with places as stored and uncompressed): truncated, bytes after the end, a bomb, a window above
    the bound, damage; `offset` beyond the end.
    """
    with open_file(file) as stream:
        if not file.compression:
            if offset > stream.seek(0, 2):
                raise DataError(f"{file.shown}: told to go on at byte {offset}, beyond its end")
            stream.seek(offset)
            while chunk := read_some(stream, file.shown, CHUNK):
                yield chunk
            return
        passed = 0
        for chunk in _decompressed(file, stream, settings):
            if passed + len(chunk) > offset:
                yield chunk[max(0, offset - passed) :]
            passed += len(chunk)
        if passed < offset:
            raise DataError(f"{file.shown}: told to go on at byte {offset}, beyond its {passed} bytes")


def _decompressed(file: SourceFile, stream: BinaryIO, settings: ReadConfig) -> Iterator[bytes]:
    taken = given = held = 0
    decoder: _Decoder | None = None
    parts: list[bytes] = []
    for piece in _pieces(file, stream, PIECES[file.compression]):
        start = taken
        taken += len(piece)
        while piece:
            if decoder is None:
                _check_magic(file, piece, start)
                decoder = _decoder(file.compression, settings)
            try:
                part = decoder.decompress(piece)
            except (zlib.error, zstandard.ZstdError) as error:
                raise DataError(
                    f"{file.shown}: damaged {file.compression} data between bytes {start} and {taken} of the file, "
                    f"after {given} bytes of content: {error}"
                ) from None
            given += len(part)
            if given > settings.max_ratio * taken + settings.slack_bytes:
                raise DataError(
                    f"{file.shown}: a decompression bomb? The first {taken} bytes give more than {given}, allowed "
                    f"{settings.max_ratio:g} times as much and {settings.slack_bytes} bytes"
                )
            parts.append(part)
            held += len(part)
            piece = decoder.unused_data if decoder.eof else b""
            start = taken - len(piece)
            if decoder.eof:
                decoder = None
        if held >= CHUNK:
            yield b"".join(parts)
            parts, held = [], 0
    if decoder is not None:
        raise DataError(
            f"{file.shown}: truncated: its {taken} bytes end inside a {file.compression} frame, after {given} bytes of "
            "content"
        )
    if held:
        yield b"".join(parts)


def _pieces(file: SourceFile, stream: BinaryIO, size: int) -> Iterator[bytes]:
    while chunk := read_some(stream, file.shown, CHUNK):
        for first in range(0, len(chunk), size):
            yield chunk[first : first + size]


def _check_magic(file: SourceFile, piece: bytes, offset: int) -> None:
    """A frame must begin here; zstd also has frames to be skipped (RFC 8878, 3.1.2). Pieces that end inside the magic
    are left to the decoder.
    """
    magic = _MAGIC[file.compression]
    skippable = (
        file.compression == "zst" and 0x50 <= piece[0] <= 0x5F and piece[1:4] == b"\x2a\x4d\x18"[: len(piece) - 1]
    )
    if piece.startswith(magic[: len(piece)]) or skippable:
        return
    what = "does not begin with" if not offset else f"bytes after the end: offset {offset} does not begin"
    raise DataError(f"{file.shown}: {what} a {file.compression} frame (found 0x{piece[:4].hex()})")


def _decoder(compression: str, settings: ReadConfig) -> _Decoder:
    if compression == "gz":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=settings.max_window_bytes).decompressobj()

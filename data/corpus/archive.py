"""Reading packages as archives: Debian packages, and wheels, without unpacking anything to disk.

A Debian package is an `ar` archive with a member data.tar.xz, .zst or .gz (deb(5)). Only regular files are read, in
memory and bounded, so that neither links nor hostile names nor a compression bomb do harm.
"""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from data.errors import DataError

MAX_MEMBER_BYTES = 64 << 20
MAX_ARCHIVE_BYTES = 2 << 30
_MAX_WINDOW = 128 << 20
_PIECE = 1 << 16
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


@dataclass(frozen=True)
class Member:
    """A file of an archive. name: its path there, without "./"; content: its bytes, gunzipped if it was `.gz`."""

    name: str
    content: bytes

    def text(self) -> str:
        """The content as UTF-8. Error: DataError."""
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name} is not UTF-8 at byte {error.start}") from None


@dataclass(frozen=True)
class Bounds:
    """How much an archive may unpack to, in bytes: one file of it, and all of it."""

    member: int = MAX_MEMBER_BYTES
    archive: int = MAX_ARCHIVE_BYTES


def read_members(path: Path, select: str, bounds: Bounds | None = None) -> list[Member]:
    """The files of a .deb or .whl whose whole name, without ".gz", matches the pattern `select`, sorted.

    Errors (DataError, naming the archive): truncated or damaged, a name that leads out of the archive, more than the
    bounds.
    """
    read = _zip_files if path.suffix in (".whl", ".zip") else _deb_files
    pattern, bounds = re.compile(select), bounds or Bounds()
    members = []
    try:
        for name, content in read(path, pattern, bounds):
            if name.endswith((".gz", ".dz")):
                name, content = name.removesuffix(".gz"), gunzip(content, bounds.member)
            members.append(Member(name, content))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, zstandard.ZstdError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from None
    return sorted(members, key=lambda member: member.name)


def gunzip(content: bytes, limit: int) -> bytes:
    """All gzip members of `content`, at most `limit` bytes in all (RFC 1952). Error: DataError."""
    parts, left = [], limit
    while content:
        decoder = zlib.decompressobj(wbits=31)
        try:
            part = decoder.decompress(content, left + 1)
        except zlib.error as error:
            raise DataError(f"damaged gzip data: {error}") from None
        if len(part) > left:
            raise DataError(f"a gzip file unpacks to more than the {limit} bytes allowed")
        if not decoder.eof:
            raise DataError("truncated gzip data")
        parts.append(part)
        left -= len(part)
        content = decoder.unused_data
    return b"".join(parts)


def _checked(name: str) -> str:
    """The name without "./". Error: DataError when it leads out of the archive."""
    plain = name.removeprefix("./")
    if plain.startswith("/") or "\\" in plain or "\0" in plain or ".." in plain.split("/"):
        raise DataError(f"a file named {name!r} leads out of the archive")
    return plain


def _zip_files(path: Path, pattern: re.Pattern[str], bounds: Bounds) -> Iterator[tuple[str, bytes]]:
    left = bounds.archive
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _checked(info.filename)
            if info.is_dir() or not pattern.fullmatch(name.removesuffix(".gz")):
                continue
            try:
                with archive.open(info) as file:
                    content = file.read(min(bounds.member, left) + 1)
            except (RuntimeError, NotImplementedError) as error:
                raise DataError(f"{name}: {error}") from None
            _check_size(name, len(content), left, bounds)
            left -= len(content)
            yield name, content


def _deb_files(path: Path, pattern: re.Pattern[str], bounds: Bounds) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        compression, size = _seek_data(file)
        stream = _Bounded(_decoded(file, size, compression), bounds.archive)
        with tarfile.open(fileobj=stream, mode="r|", errors="surrogateescape") as archive:
            for info in archive:
                name = _checked(info.name)
                if not info.isreg() or not pattern.fullmatch(name.removesuffix(".gz")):
                    continue
                _check_size(name, info.size, bounds.archive, bounds)
                content = archive.extractfile(info)
                assert content is not None
                yield name, content.read()
        # tarfile stops at the end mark: what follows tells whether the file is whole.
        while stream.read(_PIECE):
            pass


def _check_size(name: str, size: int, left: int, bounds: Bounds) -> None:
    if size > min(bounds.member, left):
        raise DataError(f"{name} unpacks to more than the {min(bounds.member, left)} bytes allowed")


def _seek_data(file: BinaryIO) -> tuple[str, int]:
    """Go to the data of an `ar` archive's data.tar; returns its compression and size."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise DataError("not a Debian package (no ar archive)")
    while header := file.read(_AR_HEADER):
        if len(header) < _AR_HEADER or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise DataError(f"damaged ar header at byte {file.tell() - len(header)}")
        name, size = header[:16].decode("latin-1").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return name.removeprefix("data.tar").removeprefix("."), size
        file.seek(size + size % 2, 1)
    raise DataError("truncated: it holds no data.tar")


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes) -> bytes: ...


def _decoded(file: BinaryIO, size: int, compression: str) -> Iterator[bytes]:
    """The tar archive in pieces. Input goes in by small pieces, so that one piece out is bounded too."""
    decoders: dict[str, Callable[[], _Decoder]] = {
        "xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=2 * _MAX_WINDOW),
        "zst": lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj(),
        "gz": lambda: zlib.decompressobj(wbits=31),
    }
    if compression and compression not in decoders:
        raise DataError(f"data.tar.{compression}: found compression '{compression}', can read {', '.join(decoders)}")
    decoder: _Decoder | None = decoders[compression]() if compression else None
    piece_bytes = 2048 if decoder else _PIECE
    while size and (piece := file.read(min(piece_bytes, size))):
        size -= len(piece)
        if decoder is None:
            yield piece
        elif not decoder.eof:
            yield decoder.decompress(piece)
    if size:
        raise DataError(f"truncated: {size} bytes of data.tar are missing")
    if decoder is not None and not decoder.eof:
        raise DataError("truncated: data.tar ends inside its compressed data")


class _Bounded(io.RawIOBase):
    """Pieces as a file to read from, at most `limit` bytes of them. Error of read: DataError beyond."""

    def __init__(self, pieces: Iterator[bytes], limit: int) -> None:
        super().__init__()
        self._pieces, self._left, self._limit = pieces, limit, limit
        self._buffer = bytearray()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._buffer) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._left -= len(piece)
            if self._left < 0:
                raise DataError(f"data.tar unpacks to more than the {self._limit} bytes allowed")
            self._buffer += piece
        count = len(self._buffer) if size < 0 else min(size, len(self._buffer))
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

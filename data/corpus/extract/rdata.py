"""Character vectors from an R package's lazy-load database (NAME.rdx and NAME.rdb).

The index is a gzipped serialised list (variables: name -> (offset, length)); each object is its length in four bytes,
then "Z" and xz, "2" and bzip2, or zlib data, of the XDR serialisation (R Internals, 1.8). Only what such data need is
read: vectors, lists, symbols, attributes.
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from data.corpus.archive import MAX_MEMBER_BYTES, Member, gunzip
from data.errors import DataError

_NULL, _SYMBOL, _PAIRS, _CHARACTERS, _LOGICAL, _INTEGER, _REAL = 254, 1, 2, 9, 10, 13, 14
_STRINGS, _LIST, _REFERENCE, _NAMESPACE, _ALTERNATIVE = 16, 19, 255, 249, 238
_CHAPTER = re.compile(r"\s*(?:chapter|letter)\s+(?:[ivxlc]+|\d+)\b.{0,3}", re.IGNORECASE)


class _Reader:
    """Walks one serialised object. value(): str, numbers, list of them, dict for a list with names, or None."""

    def __init__(self, content: bytes) -> None:
        if content[:2] != b"X\n":
            raise DataError("not R's XDR serialisation")
        self._content, self._place = content, 2
        self._references: list[Any] = []
        version = self._integers(3)[0]
        if version == 3:
            self._take(self._integers(1)[0])
        elif version != 2:
            raise DataError(f"R serialisation version {version}, can read 2 and 3")

    def _take(self, size: int) -> bytes:
        if size < 0 or self._place + size > len(self._content):
            raise DataError(f"R data end at byte {len(self._content)}, inside an object")
        self._place += size
        return self._content[self._place - size : self._place]

    def _integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self._take(4 * count))

    def value(self) -> Any:
        flags = self._integers(1)[0]
        kind = flags & 0xFF
        if kind in (_NULL, 242, 251, 253):
            return None
        if kind == _SYMBOL:
            self._references.append(self.value())
            return self._references[-1]
        if kind == _REFERENCE:
            return self._references[(flags >> 8 or self._integers(1)[0]) - 1]
        if kind == _NAMESPACE:
            self._integers(1)
            self._references.append([self.value() for _ in range(self._integers(1)[0])])
            return None
        if kind == _PAIRS:
            return self._pairs(flags)
        if kind == _ALTERNATIVE:
            # (class, state, attributes): a wrapper's state is (the vector, ...).
            _, state, _ = self.value(), self.value(), self.value()
            return next(iter(state.values())) if isinstance(state, dict) else state[0]
        found = self._vector(kind)
        if flags & 0x200 and kind != _CHARACTERS:
            names = (self.value() or {}).get("names")
            if kind == _LIST and names:
                return dict(zip(names, found))
        return found

    def _pairs(self, flags: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        while flags & 0xFF == _PAIRS:
            if flags & 0x200:
                self.value()
            key = self.value() if flags & 0x400 else len(found)
            found[key] = self.value()
            flags = self._integers(1)[0]
        return found

    def _vector(self, kind: int) -> Any:
        size = self._integers(1)[0]
        if kind == _CHARACTERS:
            return None if size == -1 else self._take(size).decode("utf-8", "replace")
        if kind in (_LOGICAL, _INTEGER):
            return list(self._integers(size))
        if kind == _REAL:
            return list(struct.unpack(f">{size}d", self._take(8 * size)))
        if kind in (_STRINGS, _LIST):
            if size < 0 or size > len(self._content):
                raise DataError(f"R data: a vector of {size} in {len(self._content)} bytes")
            return [self.value() for _ in range(size)]
        raise DataError(f"R data: object of kind {kind} at byte {self._place}")


def _unpacked(chunk: bytes) -> bytes:
    """An object of an .rdb file, uncompressed."""
    if len(chunk) < 5:
        raise DataError("R data: truncated object")
    (size,) = struct.unpack(">I", chunk[:4])
    if size > MAX_MEMBER_BYTES:
        raise DataError(f"R data: an object of {size} bytes, allowed {MAX_MEMBER_BYTES}")
    try:
        if chunk[4:5] == b"Z":
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
            return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(chunk[5:], size)
        if chunk[4:5] == b"2":
            return bz2.BZ2Decompressor().decompress(chunk[5:], size)
        return zlib.decompressobj().decompress(chunk[5:] if chunk[4:5] == b"1" else chunk[4:], size)
    except (zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(f"R data: damaged object: {error}") from None


def character_vectors(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """(name, strings) of every character vector of the database. Error: DataError."""
    files = {PurePosixPath(member.name).suffix: member.content for member in members}
    if not {".rdx", ".rdb"} <= files.keys():
        raise DataError(f"found {', '.join(member.name for member in members) or 'no file'}, need an .rdx and its .rdb")
    index = _Reader(gunzip(files[".rdx"], MAX_MEMBER_BYTES)).value()
    variables = index.get("variables") if isinstance(index, dict) else None
    if not isinstance(variables, dict):
        raise DataError("R data: the index holds no variables")
    for name, (offset, length) in sorted(variables.items()):
        strings = _Reader(_unpacked(files[".rdb"][offset : offset + length])).value()
        if isinstance(strings, list) and strings and isinstance(strings[0], str):
            yield name, [line or "" for line in strings]


def novels(members: Sequence[Member]) -> Iterator[tuple[str, list[str]]]:
    """Novels, one vector of wrapped lines each, by chapter: name/001. What stands before the first is left out."""
    for name, lines in character_vectors(members):
        starts = [place for place, line in enumerate(lines) if _CHAPTER.fullmatch(line)]
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(lines)]), start=1):
            blocks = re.split(r"\n\s*\n", "\n".join(lines[start:stop]))
            yield f"{name}/{number:03d}", [line for block in blocks if (line := " ".join(block.split()))]

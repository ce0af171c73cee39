"""Lines of a source with their places in the uncompressed stream, whole or by byte ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from data.errors import DataError, UsageError
from data.sources.config import ReadConfig
from data.sources.decompress import chunks
from data.sources.files import JSONL, SourceFile


def lines(file: SourceFile, settings: ReadConfig, offset: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(offset of the line, offset after it, its bytes without \\n) from `offset`, which must be the start of a line;
    None: from the beginning of the file's range.

    Errors (DataError): those of `chunks`; a line above `max_document_bytes`.
    """
    if offset is None and file.first:
        offset = _first_line(file, settings)
        if offset is None:
            return
    offset = offset or 0
    for start, end, line in split(chunks(file, settings, offset), offset, settings.max_document_bytes, file.shown):
        if file.last is not None and start > file.last:
            return
        yield start, end, line


def split(parts: Iterable[bytes], offset: int, limit: int, shown: str) -> Iterator[tuple[int, int, bytes]]:
    """Lines of a stream that comes in `parts` and begins at `offset`. Holds one line of at most `limit` bytes and one
    part.
    """
    carried: list[bytes] = []
    held = 0
    for part in parts:
        first, *rest = part.split(b"\n")
        held += len(first)
        carried.append(first)
        if held > limit:
            raise DataError(f"{shown}: the line at offset {offset} is longer than {limit} bytes")
        if not rest:
            continue
        whole = [b"".join(carried), *rest[:-1]]
        carried, held = [rest[-1]], len(rest[-1])
        for line in whole:
            if len(line) > limit:
                raise DataError(f"{shown}: the line at offset {offset} is longer than {limit} bytes")
            end = offset + len(line) + 1
            yield offset, end, line
            offset = end
    if held:
        yield offset, offset + held, b"".join(carried)


def split_ranges(file: SourceFile, size: int) -> list[SourceFile]:
    """A plain jsonl file as ranges of about `size` bytes that together give each line once; other files as they are.

    Lines are found when a range is read. A line belongs to the range whose `first` < its offset <= `last`.
    """
    if size < 1:
        raise UsageError(f"range of {size} bytes: need at least 1")
    if file.form != JSONL or file.compression or file.bytes <= size:
        return [file]
    count = -(-file.bytes // size)
    bounds = [file.bytes * number // count for number in range(count + 1)]
    ranges = [replace(file, first=bounds[i], last=bounds[i + 1]) for i in range(count)]
    return [*ranges[:-1], replace(ranges[-1], last=None)]


def _first_line(file: SourceFile, settings: ReadConfig) -> int | None:
    """Offset of the first line that starts after `file.first`; None when that is not in the range."""
    offset = file.first
    for chunk in chunks(file, settings, offset):
        found = chunk.find(b"\n")
        if found >= 0:
            offset += found + 1
            return offset if file.last is None or offset <= file.last else None
        offset += len(chunk)
        if file.last is not None and offset > file.last:
            return None
    return None

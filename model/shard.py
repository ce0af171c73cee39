"""One safetensors file, written and read a tensor at a time: the library's writer needs all tensors of a file at once,
and twice. Format: 8 bytes little-endian length of the header, the header in JSON (name -> dtype, shape, byte range
after the header), the bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from model.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """A tensor in a file: bytes [begin, end) of it. dtype: as the file spells it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _bytes(value: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return value.view(-1).view(torch.uint8).numpy().data


class ShardWriter:
    """A file of tensors known beforehand, which may come in any order, each once. The caller syncs and renames."""

    def __init__(self, path: Path, tensors: Sequence[Stored]) -> None:
        self._left: dict[str, tuple[Stored, int]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # Wider numbers first: every tensor then starts at a multiple of its own width.
        offset = 0
        for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
            offsets = [offset, offset + tensor.nbytes]
            header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            self._left[tensor.name] = (tensor, offset)
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._start + offset)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                if self._left:
                    raise ValueError(f"not written: {', '.join(self._left)}")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, value: torch.Tensor) -> None:
        """`value` of exactly the dtype and shape that were announced."""
        tensor, offset = self._left.pop(name)
        if (value.dtype, tuple(value.shape)) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)}, expected {tensor.dtype} {tensor.shape}")
        self._file.seek(self._start + offset)
        self._file.write(_bytes(value.contiguous()))


def read_header(path: Path) -> dict[str, Span]:
    """Every tensor of a file. CheckpointError, one line: unreadable, truncated, or not such a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if length <= LONGEST_HEADER else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(start) < 8 or (length <= LONGEST_HEADER and len(text) < length):
        raise CheckpointError(f"{path}: truncated: {size} bytes, its header alone needs {8 + length}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = {name: _span(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: not a safetensors file, its header cannot be understood") from None
    needed = max((span.end for span in spans.values()), default=8 + length)
    if size < needed:
        raise CheckpointError(f"{path}: truncated: {size} bytes, its header promises {needed}")
    if size > needed:
        raise CheckpointError(f"{path}: {size} bytes, its header promises only {needed}")
    position = 8 + length
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            raise CheckpointError(f"{path}: {name} begins at byte {span.begin}, expected {position}")
        position = span.end
    return spans


def _span(path: Path, entry: dict[str, Any], start: int) -> Span:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = str(entry["dtype"])
    if any(type(number) is not int for number in (begin, end, *shape)):
        raise ValueError
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError
    if dtype in DTYPES and end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError
    return Span(path, dtype, shape, start + begin, start + end)


def read_rows(span: Span, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) along the first dimension, as stored: only their bytes are read. CheckpointError when they
    cannot be.
    """
    if not 0 <= first <= last <= span.shape[0]:
        raise ValueError(f"rows {first}..{last} are not within 0..{span.shape[0]}")
    value = torch.empty((last - first, *span.shape[1:]), dtype=DTYPES[span.dtype])
    left = _bytes(value)
    row_bytes = (span.end - span.begin) // max(span.shape[0], 1)
    try:
        with span.path.open("rb", buffering=0) as file:
            file.seek(span.begin + first * row_bytes)
            while left:
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{span.path}: became shorter while it was read")
                left = left[count:]
    except OSError as error:
        raise CheckpointError(f"{span.path}: cannot be read ({error.strerror})") from error
    return value

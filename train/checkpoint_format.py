"""What a checkpoint looks like on disk, and the checks that a directory must pass to be one.

    step-00000100/
        rank-00003.safetensors   row ranges (rows, columns) under `name|first|last|kind`; small tensors, `name|extra`
        state.json               plain data of the run
        manifest.json            written last: schema, size and sha256 of every file, slices of every tensor, own digest

The slices of a tensor tile its rows, whoever wrote them, so any layout can read any row range. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
FORMAT = "bireme-checkpoint"
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 256 << 20
FILE_NAME = re.compile(r"(rank-\d{5,}\.safetensors|state\.json)")
STEP_NAME = re.compile(r"step-(\d{8,})")

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class CheckpointError(Exception):
    """A checkpoint that is damaged, of another schema, or of another model."""

    exit_code = 66


class CheckpointWriteError(Exception):
    """A checkpoint could not be written; the ones before it are untouched."""

    exit_code = 73


@dataclass(frozen=True)
class Slice:
    """Rows [first, last) of one kind of a tensor, in `file`."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class TensorEntry:
    """A canonical tensor of true `shape`, stored as rows x `columns`. kinds: dtype code and slices in row order."""

    shape: tuple[int, ...]
    columns: int
    kinds: dict[str, tuple[str, tuple[Slice, ...]]]

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel() // self.columns


@dataclass(frozen=True)
class ExtraEntry:
    """A small tensor that is not a parameter (router bias), whole in one file."""

    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclass(frozen=True)
class FileEntry:
    """Size and content hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. written_by: versions and world size, for people."""

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    extra: dict[str, ExtraEntry]
    written_by: dict[str, Any]


def slice_key(name: str, first: int, last: int, kind: str) -> str:
    return f"{name}|{first}|{last}|{kind}"


def extra_key(name: str) -> str:
    return f"{name}|extra"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The inverse of `step_name`."""
    return int(name.removeprefix("step-"))


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Write byte pieces, fsync, and return size and hash of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def safetensors_pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time: no second copy of the state in memory."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1).cpu().contiguous()
        yield flat.view(torch.uint8).numpy().data


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest_text(manifest: Manifest) -> bytes:
    tensors = {
        name: {
            "shape": entry.shape,
            "columns": entry.columns,
            "kinds": {
                kind: {"dtype": dtype, "slices": [[s.file, s.first, s.last] for s in slices]}
                for kind, (dtype, slices) in entry.kinds.items()
            },
        }
        for name, entry in manifest.tensors.items()
    }
    body = {
        "format": FORMAT,
        "schema": SCHEMA,
        "step": manifest.step,
        "written_by": manifest.written_by,
        "files": {name: vars(entry) for name, entry in manifest.files.items()},
        "tensors": tensors,
        "extra": {name: vars(entry) for name, entry in manifest.extra.items()},
    }
    return json.dumps({**body, "digest": _digest(body)}, indent=1).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """A JSON file of at most 256 MiB that is a plain file; CheckpointError otherwise."""
    try:
        check_plain(path)
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is {size} bytes; at most {MAX_JSON_BYTES} are allowed")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def check_plain(path: Path) -> None:
    """CheckpointError for a missing file, a link, a device, a directory."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise CheckpointError(f"{path} is missing") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a plain file")


def read_manifest(path: Path) -> Manifest:
    """Parse and check `manifest.json`; CheckpointError says what is wrong. Files themselves are not looked at."""
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a Bireme checkpoint")
    if found.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has schema {found.get('schema')!r}; this version reads schema {SCHEMA}")
    digest = found.pop("digest", None)
    if digest != _digest(found):
        raise CheckpointError(f"{path} does not match its own digest: the file is damaged")
    try:
        return _parse(found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__} {error}") from error


def _parse(found: dict[str, Any]) -> Manifest:
    files = {name: FileEntry(_int(entry["bytes"]), str(entry["sha256"])) for name, entry in found["files"].items()}
    for name in files:
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"file name {name!r} is not one that a checkpoint may hold")
    if STATE not in files:
        raise CheckpointError(f"{STATE} is not listed")
    tensors = {name: _parse_tensor(name, entry, files) for name, entry in found["tensors"].items()}
    extra = {}
    for name, entry in found["extra"].items():
        _check_reference(name, entry["file"], entry["dtype"], files)
        extra[name] = ExtraEntry(tuple(_int(n) for n in entry["shape"]), entry["dtype"], entry["file"])
    return Manifest(_int(found["step"]), files, tensors, extra, dict(found["written_by"]))


def _parse_tensor(name: str, entry: dict[str, Any], files: dict[str, FileEntry]) -> TensorEntry:
    shape, columns = tuple(_int(n) for n in entry["shape"]), _int(entry["columns"])
    if columns < 1 or torch.Size(shape).numel() % columns:
        raise CheckpointError(f"tensor {name} of shape {shape} does not have {columns} columns")
    kinds = {}
    for kind, stored in entry["kinds"].items():
        slices = tuple(Slice(str(file), _int(first), _int(last)) for file, first, last in stored["slices"])
        for piece in slices:
            _check_reference(name, piece.file, stored["dtype"], files)
        kinds[kind] = (stored["dtype"], slices)
    parsed = TensorEntry(shape, columns, kinds)
    for kind, (_, slices) in kinds.items():
        check_tiling(name, kind, slices, parsed.rows)
    return parsed


def _check_reference(name: str, file: str, dtype: str, files: dict[str, FileEntry]) -> None:
    if file not in files:
        raise CheckpointError(f"tensor {name} is in {file!r}, which is not listed")
    if dtype not in DTYPES:
        raise CheckpointError(f"tensor {name} has unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")


def check_tiling(name: str, kind: str, slices: tuple[Slice, ...], rows: int) -> None:
    """CheckpointError unless the slices, in order, hold every row once."""
    row = 0
    for piece in slices:
        if piece.first != row or piece.last <= piece.first:
            raise CheckpointError(f"{kind} of {name}: rows {piece.first} to {piece.last} follow row {row} of {rows}")
        row = piece.last
    if row != rows:
        raise CheckpointError(f"{kind} of {name}: rows {row} to {rows} are missing")


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value

"""Completion markers: `done.json` in the directory of a finished task says what it was made from and what it holds.

A directory appears under its name only with its marker inside and everything flushed to disk, so a directory that is
there is whole, unless the disk lost something later: sizes and digests in the marker find that out.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import CannotWriteError
from data.hashing import canonical_json, file_sha256

MARKER_FILE = "done.json"
MARKER_VERSION = 1


@dataclass(frozen=True)
class Done:
    """A finished task. identity: digest of function, settings and inputs. outputs: file -> (bytes, sha256)."""

    name: str
    directory: Path
    identity: str
    outputs: dict[str, tuple[int, str]]
    counts: dict[str, Any]

    def file(self, name: str) -> str:
        """Path of an output, for the inputs of the next task."""
        return str(self.directory / name)


def fresh_directory(place: Path) -> Path:
    """The empty directory in which the outputs of `place` are made."""
    partial = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CannotWriteError(f"cannot write {partial}: {error.strerror}") from None
    return partial


def publish(partial: Path, place: Path, identity: str, counts: dict[str, Any]) -> Done:
    """Mark `partial` and give it its name, durable before anybody can see it. Error: CannotWriteError."""
    counts = json.loads(canonical_json(counts))  # the same whether it was made now or is read from the marker
    try:
        outputs = {}
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            outputs[path.relative_to(partial).as_posix()] = (path.stat().st_size, file_sha256(path))
            sync(path)
        marker = {"version": MARKER_VERSION, "identity": identity, "outputs": outputs, "counts": counts}
        (partial / MARKER_FILE).write_bytes(canonical_json(marker) + b"\n")
        sync(partial / MARKER_FILE)
        for directory in (path for path in partial.rglob("*") if path.is_dir()):
            sync(directory)
        sync(partial)
        remove(place)
        os.rename(partial, place)
        sync(place.parent)
    except OSError as error:
        raise CannotWriteError(f"cannot write {place}: {error.strerror}") from None
    return Done(place.name, place, identity, outputs, counts)


def load(place: Path, digests: bool) -> Done | None:
    """The finished task at `place`; None if there is none or it is not whole. digests: compare contents, not only
    sizes.
    """
    try:
        marker = json.loads((place / MARKER_FILE).read_bytes())
        if marker["version"] != MARKER_VERSION:
            return None
        outputs = {name: (int(size), str(sha256)) for name, (size, sha256) in marker["outputs"].items()}
        for name, (size, sha256) in outputs.items():
            path = place / name
            if path.stat().st_size != size or (digests and file_sha256(path) != sha256):
                return None
        return Done(place.name, place, marker["identity"], outputs, dict(marker["counts"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove(place: Path) -> None:
    """Delete a task's directory, its marker first, so that a half-deleted one is never taken for whole."""
    (place / MARKER_FILE).unlink(missing_ok=True)
    if place.is_dir():
        shutil.rmtree(place)


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

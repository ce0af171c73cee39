"""Output appears whole or not at all: files and directories are made under another name, flushed to disk, then
renamed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import BusyError, CannotWriteError, UsageError


def write_file(path: Path, content: bytes) -> None:
    """Write and flush a file, appearing under its name only when complete. Error: CannotWriteError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CannotWriteError(f"cannot write {path}: {error.strerror}") from None


def make_directory(path: Path) -> None:
    """Create a directory and its parents. Error: CannotWriteError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"cannot make directory {path}: {error.strerror}") from None


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """What cannot be written inside is one line (CannotWriteError) that names `what`."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(f"cannot write {what}: {error.strerror or error}") from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the right to make `out`; the lock dies with the process. Errors: UsageError where it has no name, BusyError,
    CannotWriteError.
    """
    if out.name in ("", ".."):
        raise UsageError(f"out: found '{out}', need a directory with a name of its own")
    make_directory(out.parent)
    try:
        lock = (out.parent / f".{out.name}.lock").open("w")
    except OSError as error:
        raise CannotWriteError(f"cannot write beside {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{out}: another process is making it") from None
        yield


def refuse_foreign(out: Path, marker: str) -> None:
    """Error (CannotWriteError) if `out` is there with something else than an output, which always holds `marker`."""
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CannotWriteError(f"{out} exists and holds no {marker}: not replacing it")


@contextmanager
def published(out: Path, marker: str) -> Iterator[Path]:
    """A fresh directory to fill; it becomes `out` when the block ends well and vanishes otherwise. Call under
    `locked(out)`.

    marker: a file every complete output holds; an `out` with other content is refused, not replaced
    (CannotWriteError).
    """
    refuse_foreign(out, marker)
    partial, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    make_directory(partial)
    try:
        yield partial
        _sync_directory(partial)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        _sync_directory(out.parent)
    except OSError as error:
        raise CannotWriteError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

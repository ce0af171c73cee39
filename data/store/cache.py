"""A bounded directory of fetched files, each named by the sha256 of its content.

Processes may share it and die at any moment. A fetch writes `.SHA256.partial` under a `flock` that ends with its
process; whoever waits for the same file then finds it, or the lock, free. Complete files appear by rename, so a name
without a leading dot is always whole. The least recently opened files go when room is needed; one that is still mapped
lives on until its reader lets go of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.errors import CannotWriteError, DataError, UsageError
from data.publish import make_directory

SHA256 = re.compile(r"[0-9a-f]{64}")
PARTIAL = re.compile(r"\.[0-9a-f]{64}\.partial")
Write = Callable[[bytes], object]


class FetchError(Exception):
    """A fetch raised `cause`, an OSError of its own, which says nothing about the cache."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class BlockCache:
    """Files by digest in `directory`, at most `limit` bytes of them; fetches under way count with their full size, and
    only those of other processes can take it beyond.

    Errors: UsageError for a limit below 1, CannotWriteError.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        if limit < 1:
            raise UsageError(f"cache of {directory}: found {limit} bytes, need at least 1")
        self.directory, self.limit = directory, limit
        make_directory(directory)
        self._sweep()

    def open(self, sha256: str, size: int, fetch: Callable[[Write], None], shown: str) -> BinaryIO:
        """The file of this digest, opened for reading; `fetch` is called to write it where it is not there.

        size: bytes it may have, for which room is made. shown: the name in errors. Errors: DataError for another
        digest, UsageError for one that cannot fit, CannotWriteError, FetchError, and what else `fetch` raises.
        """
        if not SHA256.fullmatch(sha256):
            raise DataError(f"{shown}: '{sha256}' is not a sha256")
        if size > self.limit:
            raise UsageError(f"{shown}: {size} bytes do not fit a cache of {self.limit} bytes")
        path = self.directory / sha256
        if (file := self._opened(path)) is not None:
            return file
        with self._partial(sha256) as (partial, target):
            if (file := self._opened(path)) is not None:
                partial.unlink(missing_ok=True)
                return file
            try:
                return self._fetched(partial, target, sha256, size, fetch, shown)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise CannotWriteError(f"cannot write {path}: {error.strerror}") from None
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def _fetched(
        self,
        partial: Path,
        target: BinaryIO,
        sha256: str,
        size: int,
        fetch: Callable[[Write], None],
        shown: str,
    ) -> BinaryIO:
        self._make_room(target, size)
        digest, written = hashlib.sha256(), 0

        def write(content: bytes) -> None:
            nonlocal written
            digest.update(content)
            written += len(content)
            try:
                target.write(content)
            except OSError as error:
                raise CannotWriteError(f"cannot write {partial}: {error.strerror}") from None

        try:
            fetch(write)
        except OSError as error:
            raise FetchError(error) from error
        if (found := digest.hexdigest()) != sha256:
            raise DataError(f"{shown}: sha256 is {found}, the manifest has {sha256}")
        target.flush()
        target.truncate(written)
        os.fsync(target.fileno())
        file = partial.open("rb")
        os.replace(partial, self.directory / sha256)
        return file

    def _opened(self, path: Path) -> BinaryIO | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot read the cache: {error.strerror}") from None
        os.utime(file.fileno())
        return file

    @contextmanager
    def _partial(self, sha256: str) -> Iterator[tuple[Path, BinaryIO]]:
        """The partial file of a digest, held by this process alone."""
        partial = self.directory / f".{sha256}.partial"
        while True:
            try:
                target = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
            except OSError as error:
                raise CannotWriteError(f"cannot write {partial}: {error.strerror}") from None
            with target:
                fcntl.flock(target, fcntl.LOCK_EX)
                if _is_file_at(target, partial):
                    yield partial, target
                    return

    def _make_room(self, target: BinaryIO, size: int) -> None:
        """Reserve `size` bytes for `target`, then remove the least recently opened files above the limit."""
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            target.truncate(size)
            entries, total = [], 0
            for entry in os.scandir(self.directory):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                total += status.st_size
                if SHA256.fullmatch(entry.name):
                    entries.append((status.st_mtime_ns, entry.name, status.st_size))
            for _, name, bytes_ in sorted(entries):
                if total <= self.limit:
                    break
                (self.directory / name).unlink(missing_ok=True)
                total -= bytes_
        finally:
            os.close(directory)

    def _sweep(self) -> None:
        """Remove what fetches of dead processes left."""
        for entry in os.scandir(self.directory):
            if not PARTIAL.fullmatch(entry.name):
                continue
            try:
                with open(entry.path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_file_at(file, Path(entry.path)):
                        os.unlink(entry.path)
            except (BlockingIOError, FileNotFoundError):
                continue


def _is_file_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False

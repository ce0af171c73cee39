"""Where a corpus lies: a local directory, or any fsspec URL read through a bounded local cache.

Both give open local files, so that everything above maps and reads the same bytes in the same way.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped]

from data.errors import CannotWriteError, DataError, UnavailableError, UsageError
from data.sources.files import unreached
from data.store.cache import BlockCache, FetchError
from data.store.names import checked_name, open_below

COPY_BYTES = 1 << 22
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Remote:
    """How a remote corpus is read. cache: local directory of fetched files, which processes may share. cache_bytes: its
    bound.

    attempts: tries of a fetch before it fails. pause: seconds before the second try; it doubles with each.
    """

    cache: str = ""
    cache_bytes: int = 64 << 30
    attempts: int = 4
    pause: float = 0.5


class Location(ABC):
    """Files of one corpus, by their names below it."""

    # Bytes of files that may be mapped at once; None: any.
    mapped_bytes: int | None = None
    # Whether `open` compares the digest with the content.
    checks_digests = False

    @abstractmethod
    def shown(self, name: str) -> str:
        """The file as errors name it."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """A small file whole. Errors (DataError): missing, unreadable, longer than `limit` bytes."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file. Error: UnavailableError where that cannot be told."""

    @abstractmethod
    def open(self, name: str, sha256: str, limit: int) -> BinaryIO:
        """A file as an open local one, at most `limit` bytes long. Error: DataError."""


class LocalLocation(Location):
    """A directory. A corpus that is built anew takes the place of the old one as a whole; files of the new one are
    refused (DataError) to who began with the old one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._began: tuple[int, int] | None = None

    def shown(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str, limit: int) -> bytes:
        with self.open(name, "", limit) as file:
            return file.read()

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.root / checked_name(name, str(self.root)))

    def open(self, name: str, sha256: str, limit: int) -> BinaryIO:
        try:
            file = open_below(self.root, name)
            found = os.stat(self.root)
        except FileNotFoundError:
            raise DataError(f"{self.shown(name)}: missing") from None
        except OSError as error:
            raise DataError(f"{self.shown(name)}: cannot read: {error.strerror}") from None
        place = (found.st_dev, found.st_ino)
        if (began := self._began or place) != place:
            file.close()
            raise DataError(f"{self.shown(name)}: another corpus has taken the place of the one that was opened")
        self._began = began
        if (size := os.fstat(file.fileno()).st_size) > limit:
            file.close()
            raise DataError(f"{self.shown(name)}: {size} bytes, at most {limit} expected")
        return file


class RemoteLocation(Location):
    """An fsspec URL. Files with a digest go through the cache, which compares it on arrival."""

    checks_digests = True

    def __init__(self, url: str, remote: Remote) -> None:
        if not remote.cache:
            raise UsageError(f"{shown_url(url)}: a corpus at a URL needs a cache directory")
        self.url, self.remote = url.rstrip("/"), remote
        try:
            self.filesystem, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{shown_url(url)}: {str(error).splitlines()[0]}") from None
        self.cache = BlockCache(Path(remote.cache), remote.cache_bytes)
        self.mapped_bytes = remote.cache_bytes // 2

    def shown(self, name: str) -> str:
        return f"{shown_url(self.url)}/{name}"

    def read(self, name: str, limit: int) -> bytes:
        def action() -> bytes:
            parts: list[bytes] = []
            self._copy(name, limit, parts.append)
            return b"".join(parts)

        content: bytes = self._tried(name, action)
        return content

    def exists(self, name: str) -> bool:
        path = f"{self.root}/{checked_name(name, shown_url(self.url))}"

        def action() -> bool:
            try:
                return bool(self.filesystem.info(path)["type"] == "file")
            except FileNotFoundError as error:
                if (cause := unreached(error)) is not None:
                    raise cause from None
                return False

        return bool(self._tried(name, action))

    def open(self, name: str, sha256: str, limit: int) -> BinaryIO:
        def fetch(write: Callable[[bytes], object]) -> None:
            self._copy(name, limit, write)

        file: BinaryIO = self._tried(name, lambda: self.cache.open(sha256, limit, fetch, self.shown(name)))
        return file

    def _copy(self, name: str, limit: int, write: Callable[[bytes], object]) -> None:
        path = f"{self.root}/{checked_name(name, shown_url(self.url))}"
        size = 0
        with self.filesystem.open(path, "rb") as file:
            while content := file.read(COPY_BYTES):
                size += len(content)
                if size > limit:
                    raise DataError(f"{self.shown(name)}: more than the {limit} bytes expected")
                write(content)

    def _tried(self, name: str, action: Callable[[], Any]) -> Any:
        failed: Exception
        for attempt in range(self.remote.attempts):
            try:
                return action()
            except FileNotFoundError:
                raise DataError(f"{self.shown(name)}: missing") from None
            except (UsageError, CannotWriteError):
                raise
            except FetchError as error:
                if isinstance(error.cause, FileNotFoundError):
                    raise DataError(f"{self.shown(name)}: missing") from None
                failed = error.cause
            # Stores raise classes of their own libraries; and what arrived damaged may arrive whole the next time.
            except Exception as error:
                failed = error
            if attempt + 1 < self.remote.attempts:
                time.sleep(self.remote.pause * 2**attempt)
        if isinstance(failed, DataError):
            raise failed
        said = " ".join(str(failed).split()) or type(failed).__name__
        raise UnavailableError(f"{self.shown(name)}: {said} (after {self.remote.attempts} attempts)") from None


def open_location(corpus: str | Path, remote: Remote | None = None) -> Location:
    """The corpus at a path or fsspec URL. remote: needed for a URL. Errors: UsageError, DataError."""
    text = str(corpus)
    if isinstance(corpus, Path) or not SCHEME.match(text):
        return LocalLocation(Path(corpus))
    if text.startswith("file://"):
        return LocalLocation(Path(text.removeprefix("file://")))
    return RemoteLocation(text, remote or Remote())


def shown_url(url: str) -> str:
    """The URL without user, password and query."""
    return re.sub(r"://[^/@]*@", "://", url).split("?")[0]

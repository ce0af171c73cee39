"""Finding and opening a source's files: a path, a directory, a glob or an fsspec URL.

What the user names is trusted; what a listing answers is not: a link or a name that leads out of the listed place is
refused.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from data.errors import DataError, UnavailableError, UsageError

JSONL, PARQUET, TEXT = "jsonl", "parquet", "text"
FORMS = {".jsonl": JSONL, ".ndjson": JSONL, ".json": JSONL, ".parquet": PARQUET, ".txt": TEXT}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_URL = re.compile(r"^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SECRET = re.compile(r"(?<=://)[^/@]*@")


@dataclass(frozen=True)
class SourceFile:
    """One file to read, or a range of its lines.

    path: local path or URL. name: relative to what was listed; part of made-up ids, so it does not depend on where the
    corpus lies. bytes: size as stored. first, last: a plain jsonl file's lines that start at `first` < offset <= `last`
    (the one at 0 belongs to the range that starts there); last None: to the end.
    """

    path: str
    name: str
    bytes: int
    form: str
    compression: str = ""
    first: int = 0
    last: int | None = None

    @property
    def shown(self) -> str:
        """The path for messages, without credentials."""
        return without_secrets(self.path)


def without_secrets(path: str) -> str:
    """A URL without user name and password."""
    return _SECRET.sub("", path)


def list_files(path: str) -> list[SourceFile]:
    """The files that `path` names, sorted by name: one file, all files below a directory, or those a glob matches.

    Names that begin with `.` or `_` are passed over below a directory (markers of other tools). Errors (DataError):
    nothing there; a file of another kind; a link that leads out of the directory. UsageError: a package for the URL is
    missing. UnavailableError: the store does not answer.
    """
    local = _local(path)
    found = _list_local(local) if local is not None else _list_remote(path)
    if not found:
        raise DataError(f"no files: {without_secrets(path)}")
    return sorted(found, key=lambda file: file.name)


def open_file(file: SourceFile) -> BinaryIO:
    """The stored bytes, unbuffered where local. Errors: DataError for what cannot be opened, read or is no plain file;
    those of `list_files` for a store.
    """
    local = _local(file.path)
    if local is None:
        with _answering(file.path):
            filesystem, name = _filesystem(file.path)
            return cast(BinaryIO, _Remote(filesystem.open(name, "rb", block_size=8 << 20), file.path))
    try:
        # Without O_NONBLOCK a named pipe would wait for a writer.
        descriptor = os.open(local, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot open {file.shown}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{file.shown}: not a plain file")
    return cast(BinaryIO, os.fdopen(descriptor, "rb", buffering=0))


def read_some(stream: BinaryIO, shown: str, size: int) -> bytes:
    """At most `size` bytes. Error: DataError where the disk cannot give them."""
    try:
        return stream.read(size)
    except OSError as error:
        raise DataError(f"cannot read {shown}: {error.strerror or error}") from None


def unreached(error: FileNotFoundError) -> OSError | None:
    """Why a store was not reached, where it says instead that a file is not there, as fsspec's for HTTP does."""
    cause = error.__cause__
    return cause if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) else None


def _local(path: str) -> str | None:
    match = _URL.match(path)
    if match is None:
        return path
    return path[len(match[0]) :] if match[1].lower() in ("file", "local") else None


def _list_local(path: str) -> list[SourceFile]:
    if os.path.isfile(path):
        return [_file(path, os.path.basename(path), os.path.getsize(path), path)]
    if os.path.isdir(path):
        root = path
        names = [
            os.path.relpath(os.path.join(directory, name), root)
            for directory, directories, files in os.walk(root, onerror=_unreadable)
            for name in [*files, *(name for name in directories if os.path.islink(os.path.join(directory, name)))]
        ]
        names = [name for name in names if not _passed_over(name)]
    elif glob.has_magic(path):
        root = _fixed_part(path)
        matches = glob.glob(path, recursive=True, include_hidden=False)
        names = [os.path.relpath(match, root) for match in matches if not os.path.isdir(match)]
    elif os.path.lexists(path):
        raise DataError(f"{path}: not a plain file")
    else:
        raise DataError(f"no such file: {path}")
    real_root = os.path.realpath(root)
    found = []
    for name in names:
        place = os.path.join(root, name)
        if not os.path.realpath(place).startswith(os.path.join(real_root, "")):
            raise DataError(f"{place}: leads out of {root}; name the place it leads to instead")
        if os.path.isdir(place):
            raise DataError(f"{place}: a link to a directory; name the directory instead")
        if not os.path.isfile(place):
            raise DataError(f"{place}: not a plain file")
        found.append(_file(place, name.replace(os.sep, "/"), os.path.getsize(place), place))
    return found


def _list_remote(path: str) -> list[SourceFile]:
    with _answering(path):
        filesystem, place = _filesystem(path)
        if glob.has_magic(place):
            root = _fixed_part(place)
            details = filesystem.glob(place, detail=True)
        elif filesystem.isfile(place):
            root = str(PurePosixPath(place).parent)
            details = {place: filesystem.info(place)}
        else:
            root = place
            # Some stores find nothing where they are not reached; asked about the place itself, they say so.
            details = filesystem.find(place, detail=True) or _no_details(filesystem, place)
    found = []
    for name, detail in details.items():
        if detail.get("type", "file") != "file":
            continue
        inner = PurePosixPath("/" + name.lstrip("/"))
        try:
            relative = inner.relative_to("/" + root.strip("/"))
        except ValueError:
            raise DataError(f"{without_secrets(path)}: the store lists '{name}', which is not below it") from None
        if ".." in relative.parts:
            raise DataError(f"{without_secrets(path)}: the store lists '{name}', which leads out of it")
        if root == place and _passed_over(str(relative)):
            continue
        url = filesystem.unstrip_protocol(name)
        found.append(_file(url, str(relative), int(detail.get("size") or 0), without_secrets(url)))
    return found


def _no_details(filesystem: Any, place: str) -> dict[str, Any]:
    try:
        filesystem.info(place)
    except FileNotFoundError as error:
        if (cause := unreached(error)) is not None:
            raise cause from None
    return {}


def _fixed_part(pattern: str) -> str:
    """The directory before the first part with a wildcard."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")


def _passed_over(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}") from None


def _file(path: str, name: str, size: int, shown: str) -> SourceFile:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{shown!a}: the name is not UTF-8") from None
    stem, suffix = os.path.splitext(name)
    compression = COMPRESSIONS.get(suffix, "")
    form = FORMS.get(os.path.splitext(stem)[1] if compression else suffix)
    if form is None or (form == PARQUET and compression):
        allowed = ", ".join(FORMS)
        raise DataError(
            f"{shown}: not a kind of file that is read ({allowed}; all but .parquet also with .gz or .zst); "
            "to leave files out, name the others with a glob"
        )
    return SourceFile(path, name, size, form, compression)


def _filesystem(path: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        filesystem, place = url_to_fs(path)
    except ImportError as error:
        raise UsageError(f"{without_secrets(path)}: {error}".rstrip(".") + " (pip install it)") from None
    except ValueError as error:
        raise UsageError(f"{without_secrets(path)}: {error}") from None
    return filesystem, place


class _answering:
    """Turns whatever a store raises into one line: stores of different packages share no exception of their own."""

    def __init__(self, path: str) -> None:
        self.shown = without_secrets(path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, DataError) or not isinstance(error, Exception):
            return
        if isinstance(error, FileNotFoundError):
            raise DataError(f"no such file: {self.shown}") from None
        lines = str(error).splitlines() or [""]
        if "support range requests" in lines[0]:
            message = "its server does not give parts of a file (HTTP range requests); copy it here and name the copy"
            raise DataError(f"{self.shown}: {message}") from None
        raise UnavailableError(f"{self.shown}: {type(error).__name__}: {without_secrets(lines[0])}") from None


class _Remote(io.RawIOBase):
    """A store's file whose faults are one line."""

    def __init__(self, inner: Any, path: str) -> None:
        self._inner, self._path = inner, path

    def read(self, size: int = -1) -> bytes:
        with _answering(self._path):
            return cast(bytes, self._inner.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        with _answering(self._path):
            return cast(int, self._inner.seek(offset, whence))

    def tell(self) -> int:
        return cast(int, self._inner.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._inner.close()
        super().close()

"""Names of a corpus' files. Every name is made here from a source name and a number, so that no manifest can point a
reader anywhere else.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError

SOURCE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
# One file or directory of a corpus: no separators, no leading dot.
PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")


def checked_source_name(name: object, where: str) -> str:
    """A source name that is safe in a path. Error: DataError."""
    if not isinstance(name, str) or not SOURCE_NAME.fullmatch(name):
        raise DataError(f"{where}: source name {name!r} may hold only letters, digits, - and _, at most 100")
    return name


def block_stem(source: str, number: int) -> str:
    """Path of a block's files below the corpus directory, without `.bin`, `.npy` and `.ids.json`."""
    return f"blocks/{source}/{number:06d}"


def table_file(source: str) -> str:
    """Path of a source's block table below the corpus directory."""
    return f"blocks/{source}.npy"


def checked_name(name: str, where: str) -> str:
    """A relative path without empty, hidden, `.` or `..` parts. Error: DataError."""
    if not all(PART.fullmatch(part) for part in name.split("/")):
        raise DataError(f"{where}: '{name}' is not a name of a corpus file")
    return name


def open_below(root: Path, name: str) -> BinaryIO:
    """Open a file below `root` for reading.

    Errors: DataError for a name that leads out, a symbolic link at or below `root`'s entries, anything but a plain
    file; FileNotFoundError when there is none.
    """
    path = root / checked_name(name, str(root))
    expected = os.path.join(os.path.realpath(root), name)
    if os.path.realpath(path) != expected:
        raise DataError(f"{path}: a symbolic link; the files of a corpus must lie in its directory")
    # Not to wait for the other end of a pipe that stands where a file should.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path}: not a plain file")
    return os.fdopen(descriptor, "rb")

"""Files that appear whole or not at all."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A binary file under a temporary name beside `path`; fsynced and renamed when the block ends without error.

    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def published_text(path: Path) -> Iterator[io.TextIOBase]:
    """The same for UTF-8 text, compressed where the name ends in .gz. Equal text gives equal bytes."""
    with published(path) as raw:
        if path.suffix != ".gz":
            text = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
            yield text
            text.flush()
            text.detach()
            return
        # no file name and no date in the header
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
            text = io.TextIOWrapper(cast(BinaryIO, packed), encoding="utf-8", newline="\n")
            yield text
            text.flush()
            text.detach()

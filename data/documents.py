"""Raw documents: reading them from jsonl, with every fault named by file and place.

A line is {"id": str, "text": str, ...}; other fields are ignored. Files are read in bytes, so that a fault in the
encoding has an exact offset. `read_jsonl` is the plain form of data/sources/read.py, which reads the other kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data.errors import DataError

DOCUMENTS = pa.schema(
    [("source", pa.string()), ("id", pa.string()), ("language", pa.string()), ("text", pa.large_string())]
)
"""Shards of documents between stages. (source, id) is a document's identity, kept to the end."""

SURVIVORS = DOCUMENTS.append(pa.field("copies", pa.int32()))
"""Shards after dedup. copies: documents that this one stands for, itself included."""


@dataclass(frozen=True)
class Document:
    """One document. source: the name of the configured source it came from. language: ISO 639-1, as declared, later as
    found.
    """

    id: str
    text: str
    source: str
    language: str

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())


def read_jsonl(path: Path, source: str, language: str) -> Iterator[Document]:
    """Documents of one jsonl file, in order.

    Errors (DataError): missing or empty file; a byte that is not UTF-8 (offset named); a line that is no JSON object
    or lacks `id` or `text`.
    """
    if not path.is_file():
        raise DataError(f"source '{source}': no such file: {path}")
    offset = count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = offset + error.start
                raise DataError(
                    f"source '{source}': {path} is not UTF-8: byte 0x{line[error.start]:02x} at offset {place}"
                ) from None
            offset += len(line)
            if not text.strip():
                continue
            count += 1
            yield _parse(text, path, number, source, language)
    if not count:
        raise DataError(f"source '{source}': {path} holds no documents")


def _parse(line: str, path: Path, number: int, source: str, language: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"source '{source}': {path} line {number} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"source '{source}': {path} line {number}: found {type(record).__name__}, need an object")
    for field in ("id", "text"):
        if not isinstance(record.get(field), str):
            found = type(record[field]).__name__ if field in record else "nothing"
            raise DataError(f"source '{source}': {path} line {number}: field '{field}' must be text, found {found}")
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"source '{source}': {path} line {number}: text holds a lone surrogate at character {error.start}"
        ) from None
    return Document(record["id"], record["text"], source, language)

"""Documents of any source file in batches, each with the place from which reading goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from data.documents import DOCUMENTS
from data.errors import DataError
from data.sources.columns import column_records
from data.sources.config import NO_ID, SKIP, ReadConfig
from data.sources.decompress import chunks
from data.sources.files import JSONL, PARQUET, TEXT, SourceFile
from data.sources.lines import lines
from data.sources.record import Fault, Record, checked, decoded

BATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Position:
    """A place between two documents, JSON-able by asdict. offset: bytes of the uncompressed stream, or rows of a
    parquet file. documents: read so far, from the beginning of the file or range.
    """

    offset: int = 0
    documents: int = 0


def read_batches(
    file: SourceFile,
    source: str,
    language: str,
    start: Position | None,
    documents: int,
    settings: ReadConfig | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[tuple[pa.Table, Position]]:
    """Tables of the DOCUMENTS schema with at most `documents` rows and, beyond the first row, 32 MiB of text, each with
    the position after it. The rows are the same for any `documents` and any `start` among the positions given.

    Ids are the records' own (text or an integer), or with `id: none` the file's name and the place in the file, which
    no splitting changes. skipped: counts faulty documents by reason when `settings.faults` is "skip". The last table
    can be empty, when only skipped documents follow.

    Errors (DataError, file and place named): see `chunks`, `lines`, `column_records`; a document that is not UTF-8, not
    JSON, lacks a field, holds NUL or a lone surrogate; a whole file without documents.
    """
    settings = settings or ReadConfig()
    counts: Counter[str] = Counter() if skipped is None else skipped
    position = start or Position()
    seen = position.documents
    ids: list[str] = []
    texts: list[str] = []
    held = 0
    records = {JSONL: _jsonl, PARQUET: column_records, TEXT: _text}[file.form]
    for end, record in records(file, settings, position.offset if start else None):
        try:
            identity, text, size = checked(record, settings)
        except Fault as fault:
            if settings.faults != SKIP:
                raise DataError(f"source '{source}': {file.shown} {fault}") from None
            counts[fault.reason] += 1
            position = Position(end, seen)
            continue
        if ids and (len(ids) == documents or held + size > BATCH_BYTES):
            yield _table(source, language, ids, texts), position
            ids, texts, held = [], [], 0
        ids.append(identity)
        texts.append(text)
        held += size
        seen += 1
        position = Position(end, seen)
    whole = file.first == 0 and file.last is None
    if not seen and whole and not counts.total():
        raise DataError(f"source '{source}': {file.shown} holds no documents")
    if ids or position != (start or Position()):
        yield _table(source, language, ids, texts), position


def _table(source: str, language: str, ids: list[str], texts: list[str]) -> pa.Table:
    columns = [[source] * len(ids), ids, [language] * len(ids), texts]
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, DOCUMENTS, strict=True)], DOCUMENTS)


def _jsonl(file: SourceFile, settings: ReadConfig, offset: int | None) -> Iterator[tuple[int, Record | Fault]]:
    for start, end, line in lines(file, settings, offset):
        try:
            text = decoded(line, start)
            if text.strip():
                yield end, _parsed(text, f"{file.name}:{start}", start, settings)
        except Fault as fault:
            yield end, fault


def _parsed(line: str, made_id: str, offset: int, settings: ReadConfig) -> Record:
    place = f"line at offset {offset}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Fault("not JSON", f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Fault("not an object", f"{place}: found {type(record).__name__}, need an object")
    identity = made_id if settings.id == NO_ID else record.get(settings.id)
    return Record(place, identity, record.get(settings.text))


def _text(file: SourceFile, settings: ReadConfig, offset: int | None) -> Iterator[tuple[int, Record | Fault]]:
    parts = []
    held = 0
    for part in chunks(file, settings, offset or 0):
        parts.append(part)
        held += len(part)
        if held > settings.max_document_bytes:
            raise DataError(f"{file.shown}: longer than {settings.max_document_bytes} bytes")
    if held:
        try:
            yield held, Record("text", file.name, decoded(b"".join(parts), 0))
        except Fault as fault:
            yield held, fault

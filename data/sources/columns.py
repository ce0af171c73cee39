"""Documents of a parquet file, row by row in small batches.

A short dictionary entry can stand for millions of rows, so dictionary columns are measured before they are spelled out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import DataError
from data.sources.config import NO_ID, ReadConfig
from data.sources.files import SourceFile, open_file
from data.sources.record import Fault, Record, decoded

ROWS = 256


def column_records(file: SourceFile, settings: ReadConfig, row: int | None) -> Iterator[tuple[int, Record | Fault]]:
    """(number of the next row, record) from row `row` on (None: the first). Row groups before it are not read.

    Errors (DataError): not parquet, truncated or damaged; a column missing or of another type; more than `max_ratio`
    times the file's bytes of text; `row` beyond the end.
    """
    with open_file(file) as stream:
        try:
            yield from _rows(file, stream, settings, row or 0)
        except (pa.ArrowException, OSError) as error:
            message = str(error).splitlines()[0]
            raise DataError(f"{file.shown}: truncated or damaged parquet: {message}") from None


def _rows(file: SourceFile, stream: Any, settings: ReadConfig, row: int) -> Iterator[tuple[int, Record | Fault]]:
    names = [settings.text] if settings.id == NO_ID else [settings.id, settings.text]
    schema = pq.read_schema(stream)
    for name in names:
        if name not in schema.names:
            known = ", ".join(schema.names)
            raise DataError(f"{file.shown}: no column '{name}' (there are: {known})")
        if schema.names.count(name) > 1:
            raise DataError(f"{file.shown}: {schema.names.count(name)} columns are named '{name}', need one")
        if not _readable(schema.field(name).type, integers=name != settings.text):
            needed = "text" if name == settings.text else "text or integers"
            raise DataError(f"{file.shown}: column '{name}' must be {needed}, found {schema.field(name).type}")
    parquet = pq.ParquetFile(stream, read_dictionary=[settings.text], page_checksum_verification=True)
    if row > parquet.metadata.num_rows:
        raise DataError(f"{file.shown}: told to go on at row {row}, beyond its {parquet.metadata.num_rows}")
    given, first = 0, 0
    for group in range(parquet.metadata.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        if first + size <= row:
            first += size
            continue
        for batch in parquet.iter_batches(ROWS, [group], names, use_threads=False):
            text = batch.column(settings.text)
            given += _spelled_out(text)
            if given > settings.max_ratio * file.bytes + settings.slack_bytes:
                raise DataError(
                    f"{file.shown}: a decompression bomb? Its {file.bytes} bytes give {given} up to row {first}, "
                    f"allowed {settings.max_ratio:g} times as much and {settings.slack_bytes} bytes"
                )
            identities = [] if settings.id == NO_ID else batch.column(settings.id).to_pylist()
            for number, content in enumerate(_contents(text), start=first):
                if number >= row:
                    identity = f"{file.name}:{number}" if settings.id == NO_ID else identities[number - first]
                    yield number + 1, _record(identity, content, number)
            first += len(batch)


def _readable(kind: pa.DataType, integers: bool) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    return text or (integers and pa.types.is_integer(value))


def _spelled_out(text: pa.Array) -> int:
    """UTF-8 bytes of a text column, without spelling it out."""
    if not pa.types.is_dictionary(text.type):
        return int(pc.sum(pc.binary_length(text)).as_py() or 0)
    sizes = pc.binary_length(text.dictionary)
    return int(pc.sum(sizes.cast(pa.int64()).take(text.indices)).as_py() or 0)


def _contents(text: pa.Array) -> list[bytes | None]:
    """Bytes, since parquet does not promise that its text is UTF-8."""
    if not pa.types.is_dictionary(text.type):
        return list(text.cast(pa.large_binary()).to_pylist())
    entries = text.dictionary.cast(pa.large_binary()).to_pylist()
    return [None if index is None else entries[index] for index in text.indices.to_pylist()]


def _record(identity: Any, content: bytes | None, row: int) -> Record | Fault:
    place = f"row {row}"
    if content is None:
        return Record(place, identity, None)
    try:
        return Record(place, identity, decoded(content, 0))
    except Fault as fault:
        return Fault(fault.reason, f"{place} {fault} of its text")

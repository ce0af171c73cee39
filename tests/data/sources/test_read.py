"""Every kind of file gives the documents of the plain reader, from any position and in any ranges."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import DOCUMENTS, read_jsonl
from data.errors import DataError
from data.sources import decompress, read
from data.sources.config import ReadConfig
from data.sources.files import SourceFile, list_files
from data.sources.lines import split_ranges
from data.sources.read import Position, read_batches

Row = tuple[str, str, str, str]
TEXTS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60), min_size=1)


def rows(table: pa.Table) -> list[Row]:
    assert table.schema == DOCUMENTS
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def all_rows(file: SourceFile, documents: int = 7, start: Position | None = None, **given: Any) -> list[Row]:
    return [row for table, _ in read_batches(file, "s", "zh", start, documents, **given) for row in rows(table)]


def written(directory: Path, texts: list[str], ascii: bool, ends: bytes, closed: bool) -> Path:
    lines = [json.dumps({"n": 1, "id": str(i), "text": t}, ensure_ascii=ascii).encode() for i, t in enumerate(texts)]
    content = ends.join(lines) + (ends if closed else b"")
    path = directory / "a.jsonl"
    path.write_bytes(content)
    (directory / "b.jsonl.gz").write_bytes(
        gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :])
    )
    compressor = zstandard.ZstdCompressor()
    half = len(content) // 3
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    frames = skippable + compressor.compress(content[:half]) + skippable + compressor.compress(content[half:])
    (directory / "c.jsonl.zst").write_bytes(frames)
    table = pa.table({"n": [1] * len(texts), "id": [str(i) for i in range(len(texts))], "text": texts})
    pq.write_table(table, directory / "d.parquet", row_group_size=5, compression="zstd")
    return path


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decompress, "CHUNK", 13)
    monkeypatch.setattr(decompress, "PIECES", {"zst": 3, "gz": 2})
    monkeypatch.setattr("data.sources.columns.ROWS", 3)
    yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read")


@pytest.mark.usefixtures("_small_chunks")
@given(
    TEXTS,
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"]),
    st.booleans(),
    st.integers(1, 9),
    st.integers(1, 200),
)
@settings(max_examples=30, deadline=None)
def test_same_as_the_plain_reader(
    directory: Path, texts: list[str], ascii: bool, ends: bytes, closed: bool, documents: int, size: int
) -> None:
    path = written(directory, texts, ascii, ends, closed)
    expected = [(d.source, d.id, d.language, d.text) for d in read_jsonl(path, "s", "zh")]
    files = list_files(str(directory))
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    for file in files:
        batches = list(read_batches(file, "s", "zh", None, documents))
        found = [row for table, _ in batches for row in rows(table)]
        assert found == expected
        assert all(0 < len(table) <= documents for table, _ in batches)
        done = 0
        for table, position in batches:
            done += len(table)
            assert position.documents == done
            place = Position(**json.loads(json.dumps(asdict(position))))
            assert all_rows(file, documents + 1, place) == expected[done:]
    ranges = split_ranges(files[0], size)
    assert [row for part in ranges for row in all_rows(part)] == expected
    for part in ranges:
        mine = all_rows(part)
        for table, position in read_batches(part, "s", "zh", None, 2):
            assert rows(table) == mine[position.documents - len(table) : position.documents]
            assert all_rows(part, 3, position) == mine[position.documents :]


def test_ranges_of_every_size_give_every_line_once(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(i), "text": "x" * (i * 7 % 23)}) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    file = list_files(str(tmp_path))[0]
    whole = all_rows(file)
    assert len(whole) == 12
    for size in range(1, file.bytes + 2):
        ranges = split_ranges(file, size)
        assert (ranges[0].first, ranges[-1].last) == (0, None)
        assert len(ranges) == -(-file.bytes // size)
        assert [row for part in ranges for row in all_rows(part)] == whole


def test_made_up_ids_tell_file_and_place_and_do_not_depend_on_ranges(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.jsonl").write_text('{"body": "1"}\n\n{"body": "2"}\n{"body": "3"}\n')
    pq.write_table(pa.table({"body": ["p", "q"]}), tmp_path / "x" / "p.parquet")
    (tmp_path / "x" / "t.txt").write_text("whole\nfile")
    parquet, text, jsonl = sorted(list_files(str(tmp_path / "x")), key=lambda file: file.form != "parquet")
    assert (text.name, jsonl.name) == ("t.txt", "y/a.jsonl")
    fields = {"settings": ReadConfig(text="body", id="none")}
    assert [(row[1], row[3]) for row in all_rows(parquet, **fields)] == [("p.parquet:0", "p"), ("p.parquet:1", "q")]
    expected = [("y/a.jsonl:0", "1"), ("y/a.jsonl:15", "2"), ("y/a.jsonl:29", "3")]
    for size in (1, 10, 16, 1000):
        found = [row for part in split_ranges(jsonl, size) for row in all_rows(part, **fields)]
        assert [(row[1], row[3]) for row in found] == expected
    assert all_rows(text) == [("s", "t.txt", "zh", "whole\nfile")]
    integers = tmp_path / "i.jsonl"
    integers.write_text('{"id": 12, "text": "a"}\n')
    assert all_rows(list_files(str(integers))[0])[0][1] == "12"


def test_batches_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BATCH_BYTES", 20)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": "{i}", "text": "汉字abc"}}\n' for i in range(5)))
    file = list_files(str(tmp_path))[0]
    assert [len(table) for table, _ in read_batches(file, "s", "zh", None, 100)] == [2, 2, 1]


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "t.txt.gz"])
def test_remote_files_read_as_local_ones(tmp_path: Path, name: str) -> None:
    written(tmp_path, ["eins", "二", "three"], False, b"\n", True)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("Text 文".encode()))
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/corpus/inner/{name}", (tmp_path / name).read_bytes())
    local = list_files(str(tmp_path / name))[0]
    try:
        for url in (f"memory://corpus/inner/{name}", "memory://corpus/inner/*", "memory://corpus/**"):
            (remote,) = list_files(url)
            assert all_rows(remote) == all_rows(local) if name != "t.txt.gz" or "**" not in url else True
            assert (remote.bytes, remote.form, remote.compression) == (local.bytes, local.form, local.compression)
        (below,) = list_files("memory://corpus")
        assert below.name == f"inner/{name}"
        (file_url,) = list_files(f"file://{tmp_path}/{name}")
        assert all_rows(replace(file_url, name=local.name)) == all_rows(local)
    finally:
        memory.rm("/corpus", recursive=True)


BAD_LINES = {
    "not JSON": (b'{"id": "1", "text": "x"', "line at offset 27 is not JSON"),
    "not an object": (b"[1]", "line at offset 27: found list, need an object"),
    "no text": (b'{"id": "1", "text": 5}', "line at offset 27: field 'text' must be text, found int"),
    "no id": (b'{"text": "x"}', "line at offset 27: field 'id' must be text or an integer, found nothing"),
    "not UTF-8": (b'{"id": "1", "text": "\xe6\xb1\x00"}', "is not UTF-8: byte 0xe6 at offset 48"),
    "NUL": (b'{"id": "1", "text": "ab\\u0000"}', "text holds NUL at character 2"),
    "lone surrogate": (b'{"id": "1", "text": "a\\ud800"}', "text holds a lone surrogate at character 1"),
    "too long": (b'{"id": "1", "text": "' + b"\\u6c49" * 40 + b'"}', "text of 120 bytes, allowed 100"),
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_faulty_document_stops_or_is_counted(tmp_path: Path, reason: str) -> None:
    line, message = BAD_LINES[reason]
    content = b'{"id": "0", "text": "goo"}\n' + line + b'\n{"id": "2", "text": "end"}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    file = list_files(str(tmp_path))[0]
    limits = ReadConfig(max_document_bytes=300 if reason != "too long" else 100)
    if reason == "too long":
        (tmp_path / "a.jsonl").unlink()
        text = "汉" * 40
        table = pa.table({"id": ["0", "1", "2"], "text": ["goo", text, "end"]})
        pq.write_table(table, tmp_path / "a.parquet")
        file = list_files(str(tmp_path))[0]
    with pytest.raises(DataError) as caught:
        all_rows(file, settings=limits)
    assert message in str(caught.value) and file.path in str(caught.value) and caught.value.exit_code == 65
    skipped: Counter[str] = Counter()
    found = all_rows(file, documents=1, settings=replace(limits, faults="skip"), skipped=skipped)
    assert [row[1] for row in found] == ["0", "2"]
    assert skipped == {reason: 1}


def test_positions_pass_over_what_is_skipped(tmp_path: Path) -> None:
    content = b'{"id": "0", "text": "a"}\nbad\n{"id": "1", "text": "b"}\nbad\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (file,) = list_files(str(tmp_path))
    skip = ReadConfig(faults="skip")
    counts: Counter[str] = Counter()
    batches = list(read_batches(file, "s", "zh", None, 1, skip, counts))
    assert [position.documents for _, position in batches] == [1, 2]
    assert counts == {"not JSON": 2}
    first, last = (position for _, position in batches)
    assert last.offset == len(content)
    rest: Counter[str] = Counter()
    assert [len(table) for table, _ in read_batches(file, "s", "zh", first, 1, skip, rest)] == [1]
    assert list(read_batches(file, "s", "zh", last, 1, skip, rest)) == []
    # The skipped line before the second document was read with the first batch, the one after it with the second.
    assert rest == {"not JSON": 1}
    (tmp_path / "a.jsonl").write_bytes(b"bad\n")
    ((nothing, position),) = read_batches(list_files(str(tmp_path))[0], "s", "zh", None, 1, skip)
    assert len(nothing) == 0 and position == Position(4, 0)

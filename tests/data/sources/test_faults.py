"""Broken, hostile and missing files: one line each, with the place, and bounded memory."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import socket
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.errors import DataError, UnavailableError, UsageError
from data.sources import decompress
from data.sources.config import ReadConfig, validate_read
from data.sources.files import list_files, without_secrets
from data.sources.lines import split_ranges
from data.sources.read import Position, read_batches
from data.sources.record import MAX_ID_BYTES
from data.store.files import identities_bytes
from data.store.location import Remote, open_location
from data.store.manifest import load_manifest

LINES = b"".join(b'{"id": "%d", "text": "%s"}\n' % (i, os.urandom(40).hex().encode()) for i in range(300))


def fault(path: Path, settings: ReadConfig | None = None, start: Position | None = None) -> str:
    with pytest.raises(DataError) as caught:
        for _ in read_batches(list_files(str(path))[0], "s", "en", start, 50, settings):
            pass
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert caught.value.exit_code == 65
    return str(caught.value)


def compress(name: str, content: bytes) -> bytes:
    return gzip.compress(content) if name.endswith("gz") else zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_at_every_byte(tmp_path: Path, name: str) -> None:
    content = LINES[:400]
    whole = compress(name, content)
    path = tmp_path / name
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        assert re.search(rf"truncated: its {size} bytes end inside a \w+ frame", fault(path))
    path.write_bytes(whole + whole[:-3])
    assert f"truncated: its {2 * len(whole) - 3} bytes" in fault(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_bytes_after_the_end_and_damage(tmp_path: Path, name: str) -> None:
    whole = compress(name, LINES)
    path = tmp_path / name
    path.write_bytes(whole + b"\0\0\0\0")
    assert f"bytes after the end: offset {len(whole)} does not begin" in fault(path)
    path.write_bytes(LINES)
    assert "does not begin with a" in fault(path)
    path.write_bytes(b"")
    assert "holds no documents" in fault(path)
    path.write_bytes(compress(name, b""))
    assert "holds no documents" in fault(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path.write_bytes(damaged)
    fault(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(compress(name, bytes(1 << 26)) if name.endswith("gz") else _zstd_bomb())
    tracemalloc.start()
    message = fault(path)
    assert "decompression bomb?" in message
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def _zstd_bomb() -> bytes:
    """1 GiB in run-length blocks of 128 KiB, four bytes each (RFC 8878, 3.1.1.2)."""
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    return b"\x28\xb5\x2f\xfd\x00\x38" + block * 8192


def test_many_lines_of_one_bomb_and_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress("a.zst", b'{"id": "1", "text": "x"}\n' * 2_000_000))
    assert "decompression bomb?" in fault(path)
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"id": "1", "text": "x"}\n' + b'{"id": "1", "text": "' + b"x" * 5000 + b'"}\n')
    assert "the line at offset 25 is longer than 4000 bytes" in fault(path, ReadConfig(max_document_bytes=4000))
    path = tmp_path / "c.txt"
    path.write_bytes(b"x" * 5000)
    assert "longer than 4000 bytes" in fault(path, ReadConfig(max_document_bytes=4000))


def test_a_window_above_the_bound(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=24)
    path = tmp_path / "a.jsonl.zst"
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(LINES) + stream.flush())
    assert "too much memory" in fault(path, ReadConfig(max_window_bytes=1 << 20))
    assert list(read_batches(list_files(str(path))[0], "s", "en", None, 500))


def test_utf8_offsets_are_exact_in_every_form_and_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"id": "1", "text": "汉字"}\n'.encode()
    monkeypatch.setattr(decompress, "CHUNK", 5)
    monkeypatch.setattr(decompress, "PIECES", {"zst": 3, "gz": 3})
    for place in range(line.index("汉".encode()), line.index(b'"}')):
        for byte in (b"\xff", b"\xe6"):
            content = line * 3 + line[:place] + byte + line[place:]
            try:
                content.decode()
            except UnicodeDecodeError as error:
                offset = error.start
            for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt", "e.txt.zst"):
                path = tmp_path / name
                path.write_bytes(compress(name, content) if name.endswith(("gz", "zst")) else content)
                assert f"byte 0x{content[offset]:02x} at offset {offset}" in fault(path)


def test_parquet_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"id": ["1", "2", "3"], "text": ["a", "b", "c"], "n": [1, 2, 3]})
    pq.write_table(table, path)
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated or damaged parquet" in fault(path)
    path.write_bytes(whole)
    assert "no column 'body' (there are: id, text, n)" in fault(path, ReadConfig(text="body"))
    assert "column 'n' must be text, found int64" in fault(path, ReadConfig(text="n"))
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", None]}), path)
    assert "row 1: field 'text' must be text, found nothing" in fault(path)
    latin = pa.array([b"abc", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"id": [1, 2], "text": latin}), path)
    assert "row 1 is not UTF-8: byte 0xe9 at offset 3 of its text" in fault(path)
    pq.write_table(table.slice(0, 0), path)
    assert "holds no documents" in fault(path)
    pq.write_table(pa.table([pa.array(["1"])] * 3, names=["id", "text", "text"]), path)
    assert "2 columns are named 'text', need one" in fault(path)
    pq.write_table(pa.table({"id": [1.5], "text": ["a"]}), path)
    assert "column 'id' must be text or integers, found double" in fault(path)
    entries = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"id": ["1"] * 3000, "text": entries}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    assert "decompression bomb?" in fault(path)
    tracemalloc.stop()


def test_positions_beyond_the_end(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(compress(name, LINES) if name.endswith("gz") else LINES)
        assert f"go on at byte {len(LINES) + 1}" in fault(path, start=Position(len(LINES) + 1, 300))
        (file,) = list_files(str(path))
        assert list(read_batches(file, "s", "en", Position(len(LINES), 300), 10)) == []
    with pytest.raises(UsageError):
        split_ranges(file, 0)


def test_listing_refuses_what_leads_out(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_bytes(LINES)
    (tmp_path / "secret.jsonl").write_bytes(LINES)
    (corpus / "inner.jsonl").symlink_to("a.jsonl")
    assert [file.name for file in list_files(str(corpus))] == ["a.jsonl", "inner.jsonl"]
    (corpus / "out.jsonl").symlink_to("../secret.jsonl")
    for path in (corpus, corpus / "*.jsonl"):
        with pytest.raises(DataError, match="leads out of"):
            list_files(str(path))
    assert len(list_files(str(corpus / "out.jsonl"))) == 1
    (corpus / "out.jsonl").unlink()
    (corpus / "tree").symlink_to(tmp_path)
    with pytest.raises(DataError, match="leads out of"):
        list_files(str(corpus))
    (corpus / "tree").unlink()
    (corpus / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match="not a plain file"):
        list_files(str(corpus))
    (corpus / "loop.jsonl").unlink()
    os.mkfifo(corpus / "pipe.jsonl")
    with pytest.raises(DataError, match="not a plain file"):
        list_files(str(corpus))


def test_listing_of_directories_and_globs(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a.parquet", "b/_SUCCESS", ".hidden/c.jsonl", "_tmp/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    assert [file.name for file in list_files(str(tmp_path))] == ["a.parquet", "b/x.jsonl"]
    assert [file.name for file in list_files(f"{tmp_path}/*/x.jsonl")] == ["b/x.jsonl"]
    assert [file.name for file in list_files(f"{tmp_path}/**/*.jsonl")] == ["_tmp/d.jsonl", "b/x.jsonl"]
    (tmp_path / "README.md").write_bytes(b"")
    with pytest.raises(DataError, match=r"README.md: not a kind of file that is read .* name the others with a glob"):
        list_files(str(tmp_path))
    for missing in ("nothing.jsonl", "*.csv"):
        with pytest.raises(DataError, match=r"no (such file|files): "):
            list_files(str(tmp_path / missing))
    with open(os.fsencode(tmp_path / "b") + b"/\xff.jsonl", "wb"):
        pass
    with pytest.raises(DataError, match="the name is not UTF-8"):
        list_files(str(tmp_path / "b"))


def test_stores_that_are_missing_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.registry

    fsspec.register_implementation(
        "absent", "no_such_package.Store", errtxt="Install the package absentfs to read absent://", clobber=True
    )
    with pytest.raises(UsageError, match=r"^absent://b/x.jsonl: Install the package absentfs .* \(pip install it\)$"):
        list_files("absent://user:password@b/x.jsonl")
    with pytest.raises(UsageError, match="Protocol not known: nope"):
        list_files("nope://x")
    with pytest.raises(DataError, match="no files: memory://none"):
        list_files("memory://none/at/all")
    assert without_secrets("ftp://user:pass@host/x@y") == "ftp://host/x@y"


def test_settings_are_checked() -> None:
    validate_read(ReadConfig())
    with pytest.raises(UsageError) as caught:
        validate_read(ReadConfig(faults="ignore", max_ratio=0.5, text=""))
    for part in ("read.text", "read.faults: found 'ignore', allowed: stop, skip", "read.max_ratio: found 0.5"):
        assert part in str(caught.value)


def test_numbers_too_long_and_nesting_too_deep_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line in (b"9" * 5000, b"[" * 100_000):
        path.write_bytes(b'{"id": "1", "text": "x", "n": ' + line + b"}\n")
        assert "line at offset 0 is not JSON" in fault(path)
    assert json.loads(LINES.split(b"\n")[0])["id"] == "0"


def test_identities_that_no_block_could_hold_or_that_steer_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    longest = '"' * MAX_ID_BYTES
    assert 2 + len(json.dumps(longest)) <= identities_bytes(1)
    for identity, message in (
        ("\u00e9" * (MAX_ID_BYTES // 2 + 1), f"id of {MAX_ID_BYTES + 2} bytes, allowed {MAX_ID_BYTES}"),
        ("a\x1b[31m", "id holds control character 0x1b at character 1"),
        ("\x85", "id holds control character 0x85 at character 0"),
    ):
        path.write_text(json.dumps({"id": longest, "text": "a"}) + "\n" + json.dumps({"id": identity, "text": "a"}))
        assert message in fault(path) and f"line at offset {2 * MAX_ID_BYTES + 24}" in fault(path)


def test_no_plain_file_is_not_a_missing_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: not a plain file"):
        list_files(str(tmp_path / "a.jsonl"))


def test_a_server_that_is_not_there_is_not_a_missing_file(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens there
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="Cannot connect"):
            list_files(f"{url}/a.jsonl")
        remote = Remote(str(tmp_path), attempts=1)
        with pytest.raises(UnavailableError, match="Cannot connect"):
            load_manifest(open_location(url, remote))


def test_a_disk_that_does_not_give_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(LINES)
        monkeypatch.setattr(decompress, "open_file", lambda file: Broken())
        assert f"cannot read {tmp_path / name}: Input/output error" in fault(tmp_path / name)

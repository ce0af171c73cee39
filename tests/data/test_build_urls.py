"""Sources behind a URL: the same corpus as from local files; a server that fails is one line with its exit code."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zlib import crc32

import fsspec
import pytest
from rich.console import Console

from data.__main__ import main
from data.build import build
from data.config import DataConfig, SourceConfig
from data.errors import UnavailableError
from tests.data.stages.corpus import documents, settings
from tests.data.synthetic import write_jsonl

QUIET = Console(quiet=True)
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Handler(SimpleHTTPRequestHandler):
    """Files of a directory. ranges: whether parts of them can be asked for. cut: the file whose second half never
    comes. status: of every answer to a GET, 0 for the true one. tag: files have an ETag, of their contents.
    """

    ranges = True
    cut = ""
    status = 0
    tag = False

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.status or not path.is_file():
            self.send_error(self.status) if self.status else super().do_GET()
            return
        content = path.read_bytes()
        match = RANGE.match(self.headers.get("Range", "")) if self.ranges else None
        first = int(match[1]) if match else 0
        last = min(int(match[2] or len(content) - 1), len(content) - 1) if match else len(content) - 1
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if path.name == self.cut:
            self.wfile.write(content[first : first + (last + 1 - first) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[first : last + 1])

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if self.tag and path.is_file():
            self.send_header("ETag", f'"{crc32(path.read_bytes())}"')
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(directory: Path, **behaviour: object) -> Iterator[str]:
    """The URL of a server of `directory`, that is let go of at the end."""
    handler = type("Handling", (Handler,), behaviour)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(directory))) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, str]:
    """A build of local files, which lie in `raw` beside it both plain and as .gz, and its manifest's digest."""
    directory = tmp_path_factory.mktemp("local")
    raw = directory / "raw"
    raw.mkdir()
    for language in ("en", "zh"):
        plain = raw / f"{language}.jsonl"
        write_jsonl(plain, [document for document in documents() if document.language == language])
        (raw / f"{language}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    config = settings(
        directory / "out", {language: [raw / f"{language}.jsonl"] for language in ("en", "zh")}, shard_bytes=30_000
    )
    return config, build(config, QUIET)["manifest_digest"]


def raw(config: DataConfig) -> Path:
    return Path(config.out).parent / "raw"


def behind(config: DataConfig, out: Path, paths: dict[str, str]) -> DataConfig:
    sources = {language: SourceConfig(path, language) for language, path in paths.items()}
    return replace(config, out=str(out), sources=sources)


@pytest.mark.parametrize(
    ("pattern", "ranges"),
    [("{}.jsonl", True), ("{}.jsonl.gz", True), ("{}.jsonl.gz", False), ("{}*.jsonl", True)],
    ids=["plain", "gz", "gz of a server without ranges", "pattern"],
)
def test_the_corpus_is_that_of_local_files(
    local: tuple[DataConfig, str], tmp_path: Path, pattern: str, ranges: bool
) -> None:
    config, digest = local
    with served(raw(config), ranges=ranges) as url:
        given = behind(config, tmp_path / "out", {name: f"{url}/{pattern.format(name)}" for name in ("en", "zh")})
        assert build(given, QUIET)["manifest_digest"] == digest
        assert build(given, QUIET)["reused"]


def test_a_file_that_changed_is_read_again(local: tuple[DataConfig, str], tmp_path: Path) -> None:
    """fsspec takes what is behind an HTTP address for unchanging."""
    config, digest = local
    (tmp_path / "raw").mkdir()
    content = (raw(config) / "zh.jsonl").read_bytes()
    file = tmp_path / "raw" / "zh.jsonl"
    file.write_bytes(content)
    with served(tmp_path / "raw", tag=True) as url:
        given = behind(config, tmp_path / "out", {"en": f"{raw(config)}/en.jsonl", "zh": f"{url}/zh.jsonl"})
        given = replace(given, keep_work=True)
        assert build(given, QUIET)["manifest_digest"] == digest
        file.write_bytes(content.replace(b'"39"', b'"4x"'))
        fsspec.filesystem("http").invalidate_cache()
        again = build(given, QUIET)
    assert again["reused"] is False
    assert again["manifest_digest"] != digest


@pytest.mark.parametrize(
    ("code", "message", "behaviour"),
    [
        (65, "source 'zh': no files: http://127", {"status": 404}),
        (69, "ClientPayloadError: Response payload is not completed", {"cut": "zh.jsonl"}),
        (65, "does not give parts of a file (HTTP range requests)", {"ranges": False}),
        (69, "500", {"status": 500}),
    ],
    ids=["absent", "breaks off", "no ranges", "broken"],
)
def test_a_server_that_fails_is_one_line(
    local: tuple[DataConfig, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    message: str,
    behaviour: dict[str, object],
) -> None:
    config, _ = local
    keys = [f"out={tmp_path / 'out'}", f"sources.en.path={raw(config)}/en.jsonl", "engine.shard_bytes=30000"]
    with served(raw(config), **behaviour) as url:
        assert main(["build", *keys, f"sources.zh.path={url}/zh.jsonl"]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_came_back_is_all_that_is_needed(local: tuple[DataConfig, str], tmp_path: Path) -> None:
    config, digest = local
    handler: dict[str, object] = {"cut": "zh.jsonl.gz"}
    with served(raw(config), **handler) as url:
        given = behind(config, tmp_path / "out", {name: f"{url}/{name}.jsonl.gz" for name in ("en", "zh")})
        with pytest.raises(UnavailableError):
            build(given, QUIET)
    with served(raw(config)) as url:
        given = behind(config, tmp_path / "out", {name: f"{url}/{name}.jsonl.gz" for name in ("en", "zh")})
        assert build(given, QUIET)["manifest_digest"] == digest

"""Corpora at URLs and the cache in front of them: the bytes of a directory; bounded, shared, crash-safe."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest

from data.errors import CannotWriteError, DataError, UnavailableError, UsageError
from data.store.blocks import BlockStore
from data.store.cache import BlockCache
from data.store.location import Remote, open_location, shown_url
from data.store.manifest import load_manifest
from tests.data.synthetic import token_corpus

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def uploaded(directory: Path, filesystem: fsspec.AbstractFileSystem) -> str:
    for path in directory.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"/corpus/{path.relative_to(directory)}", path.read_bytes())
    return "memory://corpus"


def cached(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir())


def test_memory_and_directory_give_the_same(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    token_corpus(tmp_path / "corpus", {"one": 40, "two": 20})
    location = open_location(uploaded(tmp_path / "corpus", memory), Remote(str(tmp_path / "cache")))
    manifest, local = load_manifest(location), load_manifest(tmp_path / "corpus")
    assert manifest.digest == local.digest
    here, there = BlockStore(tmp_path / "corpus", local), BlockStore(location, manifest)
    for source in manifest.sources:
        there.prefetch(source.blocks)
        for block in source.blocks:
            assert np.array_equal(here.tokens(block), there.tokens(block))
            assert np.array_equal(here.offsets(block), there.offsets(block))
    there.close()
    memory.store.clear()
    again = BlockStore(location, manifest)
    assert all(again.tokens(block).size for source in manifest.sources for block in source.blocks)


def test_a_corpus_at_a_url_over_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    token_corpus(tmp_path / "corpus", {"one": 20})
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path / "corpus",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split(" port ")[1].split()[0]
        location = open_location(f"http://127.0.0.1:{port}", Remote(str(tmp_path / "cache")))
        manifest = load_manifest(location)
        assert BlockStore(location, manifest).tokens(manifest.sources[0].blocks[0]).size
        server.terminate()


def test_faults_are_tried_again_then_one_line(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_corpus(tmp_path / "corpus", {"one": 20})
    url = uploaded(tmp_path / "corpus", memory)
    location = open_location(url, Remote(str(tmp_path / "cache"), attempts=3, pause=0.001))
    manifest = load_manifest(location)
    block = manifest.sources[0].blocks[0]
    opened, left = memory.open, [0]

    def flaky(path: str, *arguments: Any, **settings: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise TimeoutError("no\nanswer")
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(location.filesystem, "open", flaky)  # type: ignore[attr-defined]
    left[0] = 2
    assert BlockStore(location, manifest).tokens(block).size
    left[0] = 3
    other = manifest.sources[0].blocks[1]
    with pytest.raises(
        UnavailableError, match=r"memory://corpus/blocks/one/000001.bin: no answer \(after 3 attempts\)"
    ):
        BlockStore(location, manifest).tokens(other)
    content = memory.cat_file(f"/corpus/{other.file}")
    for damage, message in (
        (content[:-1] + b"\x07", "sha256 is"),
        (content + b"\0", "more than the"),
        (None, "missing"),
    ):
        memory.pipe_file(f"/corpus/{other.file}", damage) if damage else memory.rm_file(f"/corpus/{other.file}")
        with pytest.raises(DataError, match=message) as error:
            BlockStore(location, manifest).tokens(other)
        assert "memory://corpus/blocks/one/000001.bin" in str(error.value)
    assert not list((tmp_path / "cache").glob(".*"))


def test_wrong_urls_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a cache directory"):
        open_location("memory://corpus")
    with pytest.raises(UsageError, match="nosuch://"):
        open_location("nosuch://corpus", Remote(str(tmp_path)))
    with pytest.raises(DataError, match="cannot read the manifest: no such file"):
        load_manifest(open_location("memory://nowhere", Remote(str(tmp_path))))
    assert shown_url("s3://name:secret@host/path?token=1") == "s3://host/path"
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="cannot make directory"):
        open_location("memory://corpus", Remote(str(tmp_path / "file")))


def fetcher(content: bytes, calls: list[int] | None = None) -> Callable[[Callable[[bytes], object]], None]:
    def fetch(write: Callable[[bytes], object]) -> None:
        if calls is not None:
            calls.append(1)
        write(content)

    return fetch


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_least_recently_opened_files_go(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    contents = [bytes([number]) * 300 for number in range(5)]

    def use(number: int) -> bool:
        """Whether it had to be fetched."""
        calls: list[int] = []
        with cache.open(sha256(contents[number]), 300, fetcher(contents[number], calls), "x") as file:
            assert file.read() == contents[number]
        time.sleep(0.01)
        return bool(calls)

    assert [use(number) for number in (0, 1, 2, 0)] == [True, True, True, False]
    held = cache.open(sha256(contents[1]), 300, fetcher(contents[1]), "x")
    time.sleep(0.01)
    assert use(3)
    assert {path.name for path in tmp_path.iterdir()} == {sha256(contents[n]) for n in (0, 1, 3)}
    assert use(4) and use(2) and cached(tmp_path) <= 1000
    assert held.read() == contents[1]
    held.close()
    with pytest.raises(UsageError, match="1001 bytes do not fit a cache of 1000 bytes"):
        cache.open("0" * 64, 1001, fetcher(b""), "x")
    with pytest.raises(DataError, match="is not a sha256"):
        cache.open("../x", 10, fetcher(b""), "x")


def test_a_cache_smaller_than_the_corpus(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    token_corpus(tmp_path / "corpus", {"one": 120})
    local = load_manifest(tmp_path / "corpus")
    largest = max(block.tokens for block in local.sources[0].blocks) * 4
    url, cache = uploaded(tmp_path / "corpus", memory), tmp_path / "cache"
    location = open_location(url, Remote(str(cache), cache_bytes=2 * largest))
    manifest = load_manifest(location)
    here, there = BlockStore(tmp_path / "corpus", local), BlockStore(location, manifest)
    for block in [*manifest.sources[0].blocks] * 2:
        assert np.array_equal(here.tokens(block), there.tokens(block))
        assert cached(cache) <= 2 * largest
    assert sum(array.nbytes for array in there._open.values()) <= largest


def test_what_a_dead_fetch_left_is_no_harm(tmp_path: Path) -> None:
    content = b"whole" * 100
    partial = tmp_path / f".{sha256(content)}.partial"
    code = (
        "import os, signal, sys, time; sys.path.insert(0, os.getcwd())\n"
        "from pathlib import Path; from data.store.cache import BlockCache\n"
        "def fetch(write):\n    write(b'x' * 200); print('writing', flush=True); time.sleep(60)\n"
        "BlockCache(Path(sys.argv[1]), 10_000).open(sys.argv[2], 500, fetch, 'x')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), sha256(content)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        BlockCache(tmp_path, 10_000)
        assert partial.exists(), "a fetch under way was swept"
        process.send_signal(signal.SIGKILL)
    assert partial.exists()
    with BlockCache(tmp_path, 10_000).open(sha256(content), 500, fetcher(content), "x") as f:
        assert f.read() == content
    partial.write_bytes(b"left")
    BlockCache(tmp_path, 10_000)
    assert [path.name for path in tmp_path.iterdir()] == [sha256(content)]


def test_a_file_is_fetched_once_for_all_who_wait(tmp_path: Path) -> None:
    content, calls, found = b"y" * 1000, [], []

    def slow(write: Callable[[bytes], object]) -> None:
        calls.append(1)
        time.sleep(0.1)
        write(content)

    def reader() -> None:
        with BlockCache(tmp_path, 10_000).open(sha256(content), 1000, slow, "x") as file:
            found.append(file.read())

    threads = [threading.Thread(target=reader) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1] and found == [content] * 5


def test_a_failed_fetch_leaves_the_next_to_another(tmp_path: Path) -> None:
    content = b"z" * 100
    cache = BlockCache(tmp_path, 1000)

    def broken(write: Callable[[bytes], object]) -> None:
        write(b"half")
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        cache.open(sha256(content), 100, broken, "x")
    with pytest.raises(DataError, match="x: sha256 is"):
        cache.open(sha256(content), 100, fetcher(b"other"), "x")
    assert not list(tmp_path.iterdir())
    assert cache.open(sha256(content), 100, fetcher(content), "x").read() == content


def test_who_waited_for_a_fetch_that_failed_fetches(tmp_path: Path) -> None:
    content, began, found = b"w" * 100, threading.Event(), []

    def broken(write: Callable[[bytes], object]) -> None:
        began.set()
        time.sleep(0.3)
        raise RuntimeError("gone")

    def waiter() -> None:
        began.wait()
        with BlockCache(tmp_path, 1000).open(sha256(content), 100, fetcher(content), "x") as file:
            found.append(file.read())

    thread = threading.Thread(target=waiter)
    thread.start()
    with pytest.raises(RuntimeError, match="gone"):
        BlockCache(tmp_path, 1000).open(sha256(content), 100, broken, "x")
    thread.join()
    assert found == [content]
    assert [path.name for path in tmp_path.iterdir()] == [sha256(content)]


def hammer(directory: str, seed: int) -> int:
    """Open random files through a tight cache; how many had wrong content."""
    rng = np.random.default_rng(seed)
    cache = BlockCache(Path(directory), 2500)
    wrong = 0
    for _ in range(40):
        content = bytes([int(rng.integers(8))]) * 500
        with cache.open(sha256(content), 500, fetcher(content), "x") as file:
            wrong += file.read() != content
    return wrong


def test_processes_share_a_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(hammer, [(str(tmp_path), seed) for seed in range(2)]) == [0, 0]
    assert cached(tmp_path) <= 2500 and not list(tmp_path.glob(".*"))


def test_no_lock_outlives_its_process(tmp_path: Path) -> None:
    BlockCache(tmp_path, 1000).open(sha256(b"q"), 1, fetcher(b"q"), "x").close()
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(directory)

"""Blocks: what is written is read back, and whatever does not fit is one line that names file and place."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.contract import Block, Manifest, Source
from data.errors import DataError
from data.store import blocks as blocks_module
from data.store.blocks import BlockStore, Identities, write_block
from data.store.manifest import FORMAT_VERSION, load_manifest, verify_files, with_digest, write_manifest
from tests.data.synthetic import token_corpus

DOCUMENTS = [np.array([0, 7, 8, 1]), np.array([0, 9, 1]), np.array([0, 511, 1])]


NAMED = Identities(["a", "é", "中"], [1, 12, 3])


def corpus(directory: Path, identities: Identities | None = None) -> tuple[Manifest, Block]:
    block = write_block(directory, "en", 0, DOCUMENTS, identities)
    manifest = with_digest(
        Manifest(FORMAT_VERSION, "0" * 64, 512, 0, 1, 2, (Source("en", "en", 3, 10, 5, [block]),), "")
    )
    write_manifest(directory, manifest)
    return load_manifest(directory), block


def test_a_block_is_read_back(tmp_path: Path) -> None:
    manifest, block = corpus(tmp_path, NAMED)
    store = BlockStore(tmp_path, manifest)
    listed = manifest.sources[0].blocks[0]
    assert listed == block
    assert store.tokens(listed).tolist() == [0, 7, 8, 1, 0, 9, 1, 0, 511, 1]
    assert store.offsets(listed).tolist() == [0, 4, 7, 10] and store.offsets(listed).dtype == np.int64
    assert store.identities(listed) == NAMED
    assert (tmp_path / "blocks/en/000000.bin").read_bytes() == np.concatenate(DOCUMENTS).astype("<u4").tobytes()
    named = (tmp_path / "blocks/en/000000.ids.json").read_text(encoding="utf-8")
    assert named == '{"copies":[1,12,3],"id":["a","é","中"]}'
    index = (tmp_path / "blocks/en/000000.npy").read_bytes()
    assert len(index) == 128 + 4 * 8 and np.load(io.BytesIO(index)).tolist() == [0, 4, 7, 10]
    with pytest.raises(ValueError, match="read-only"):
        store.tokens(listed)[0] = 1


def test_what_cannot_be_a_block_is_refused(tmp_path: Path) -> None:
    for source, documents, identities, message in (
        ("../x", DOCUMENTS, None, "may hold only letters"),
        ("en", [], None, "must not be empty"),
        ("en", [np.array([], dtype=np.uint32)], None, "must not be empty"),
        ("en", DOCUMENTS, Identities(["a"]), "1 id are not the identities of 3 documents"),
        ("en", DOCUMENTS, Identities(["a"] * 3, [1]), "3 id and 1 copies are not the identities of 3 documents"),
        ("en", DOCUMENTS, Identities(["a"] * 3, [1, 0, 1]), "are not the identities of 3 documents"),
    ):
        with pytest.raises(DataError, match=message):
            write_block(tmp_path, source, 0, documents, identities)
    assert not list(tmp_path.iterdir())


def test_copies_may_be_unknown_and_identities_absent(tmp_path: Path) -> None:
    manifest, block = corpus(tmp_path / "named", Identities(["0", "1", "2"]))
    assert (tmp_path / "named" / block.ids_file).read_bytes() == b'{"id":["0","1","2"]}'
    assert BlockStore(tmp_path / "named", manifest).identities(block) == Identities(["0", "1", "2"], None)
    manifest, block = corpus(tmp_path / "bare")
    assert not (tmp_path / "bare" / block.ids_file).exists()
    with pytest.raises(DataError, match="made without identities"):
        BlockStore(tmp_path / "bare", manifest).identities(block)


def test_the_longest_identities_fit(tmp_path: Path) -> None:
    longest = Identities(["x" * 4094] * 3, [2**31 - 1] * 3)
    manifest, block = corpus(tmp_path, longest)
    assert BlockStore(tmp_path, manifest).identities(block) == longest


def resigned(directory: Path, block: Block, **content: bytes) -> Manifest:
    """The corpus with other contents of a block's files, and digests that fit them."""
    digests = {}
    for field, new in content.items():
        name = {"sha256": block.file, "index_sha256": block.index_file, "ids_sha256": block.ids_file}[field]
        (directory / name).write_bytes(new)
        digests[field] = hashlib.sha256(new).hexdigest()
    block = replace(block, **digests)  # type: ignore[arg-type]
    manifest = with_digest(
        Manifest(FORMAT_VERSION, "0" * 64, 512, 0, 1, 2, (Source("en", "en", 3, 10, 5, [block]),), "")
    )
    write_manifest(directory, manifest)
    return load_manifest(directory)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("sha256", np.arange(600, 610, dtype="<u4").tobytes(), "token 600 at index 0, but the vocabulary has 512"),
        ("sha256", np.array([0] * 9 + [512], "<u4").tobytes(), "token 512 at index 9, but the vocabulary has 512"),
        ("sha256", b"\x00" * 39, "39 bytes, the manifest has 10 tokens of 4 bytes"),
        ("sha256", b"\x00" * 44, "44 bytes, at most 40 expected"),
        ("sha256", b"", "0 bytes, the manifest has 10 tokens"),
        ("index_sha256", npy(np.array([0, 4, 7, 9])), "offsets run from 0 to 9, the block has 10 tokens"),
        ("index_sha256", npy(np.array([1, 4, 7, 10])), "offsets run from 1 to 10"),
        ("index_sha256", npy(np.array([0, 7, 4, 10])), "document 1 at offset 7 ends where it begins"),
        ("index_sha256", npy(np.array([0, 4, 4, 10])), "document 1 at offset 4"),
        ("index_sha256", npy(np.array([0, 4, 10])), "needs int64"),
        ("index_sha256", npy(np.array([0, 4, 7, 10], "f8")), "needs int64"),
        ("index_sha256", npy(np.array([0, 4, 7, 10]))[:-1], "cannot read the block index"),
        ("index_sha256", b"nothing", "cannot read the block index"),
        ("index_sha256", npy(np.arange(11)), "bytes, at most 160 expected"),
        ("ids_sha256", b'["a","b","c"]', "not the identities of 3 documents"),
        ("ids_sha256", b'{"id":["a","b"]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"id":["a","b",3]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"id":"abc"}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"copies":[1,1,1]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"copies":[1,1],"id":["a","b","c"]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"copies":[1,0,1],"id":["a","b","c"]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"copies":[1,true,1],"id":["a","b","c"]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"copies":[1,1.5,1],"id":["a","b","c"]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"copies":null,"id":["a","b","c"]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"id":["a","b","c"],"x":[1,1,1]}', "not the identities of 3 documents"),
        ("ids_sha256", b'{"id":["a","b"', "not JSON"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, field: str, content: bytes, message: str) -> None:
    _, block = corpus(tmp_path, NAMED)
    manifest = resigned(tmp_path, block, **{field: content})
    store = BlockStore(tmp_path, manifest)
    with pytest.raises(DataError, match=message) as error:
        for read in (store.tokens, store.offsets, store.identities):
            read(manifest.sources[0].blocks[0])
    assert str(tmp_path / "blocks/en/000000") in str(error.value) and "\n" not in str(error.value)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    _, block = corpus(tmp_path)
    manifest = resigned(tmp_path, block, index_sha256=npy(np.array([print] * 4, dtype=object))[:160])
    with pytest.raises(DataError, match="cannot read the block index"):
        BlockStore(tmp_path, manifest).offsets(manifest.sources[0].blocks[0])


def test_damage_is_found_at_open_or_at_the_first_read(tmp_path: Path) -> None:
    manifest, block = corpus(tmp_path, NAMED)
    for name, read in ((block.file, "tokens"), (block.index_file, "offsets"), (block.ids_file, "identities")):
        path = tmp_path / name
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(DataError, match=f"{name}: sha256 is"):
            verify_files(tmp_path, manifest, digests=True)
        verify_files(tmp_path, manifest, digests=False)
        with pytest.raises(DataError, match=f"{name}: sha256 is"):
            getattr(BlockStore(tmp_path, manifest), read)(block)
        path.unlink()
        with pytest.raises(DataError, match=f"{name}: missing"):
            verify_files(tmp_path, manifest, digests=False)
        path.write_bytes(content)
    verify_files(tmp_path, manifest, digests=True)


def test_digests_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, block = corpus(tmp_path)
    checked = []
    monkeypatch.setattr(blocks_module, "check_digest", lambda file, where, sha256: checked.append(where))
    for verified, count in ((False, 2), (True, 0)):
        store = BlockStore(tmp_path, manifest, verified=verified)
        for _ in range(3):
            store.tokens(block), store.offsets(block)
        assert len(checked) == count
        checked.clear()


def test_few_blocks_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "OPEN_BLOCKS", 2)
    manifest = token_corpus(tmp_path, {"one": 48})
    store = BlockStore(tmp_path, manifest)
    first, second, third, _ = manifest.sources[0].blocks
    for block in (first, second, first, third):
        store.tokens(block)
    assert list(store._open) == [first.file, third.file]


def test_prefetch_reads_in_the_background_and_keeps_faults_for_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = token_corpus(tmp_path, {"one": 48})
    first, second, third, fourth = manifest.sources[0].blocks
    (tmp_path / second.file).unlink()
    store = BlockStore(tmp_path, manifest)
    threads = set()
    load: Callable[[Block], None] = store._load

    def watched(block: Block) -> None:
        threads.add(threading.current_thread().name)
        load(block)

    monkeypatch.setattr(store, "_load", watched)
    store.prefetch([first, second, third])
    with pytest.raises(DataError, match=f"{second.file}: missing"):
        store.tokens(second)
    assert store.tokens(first).tolist() == BlockStore(tmp_path, manifest).tokens(first).tolist()
    assert store.tokens(fourth).size
    store.close()
    assert threads and all(name.startswith("prefetch") for name in threads)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())

"""The block table and the manifest: laziness, exactness to the byte, refusal of everything else."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.contract import Block, Manifest, Source
from data.errors import DataError
from data.hashing import json_sha256
from data.store.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    load_manifest,
    manifest_files,
    with_digest,
    write_manifest,
)
from data.store.table import BLOCK_DTYPE, BlockTable, block_table, table_bytes, table_sha256
from tests.data.synthetic import VOCABULARY, token_corpus


def some_blocks(count: int) -> list[Block]:
    rng = np.random.default_rng(count)

    def digest() -> str:
        return rng.bytes(32).hex()

    return [
        Block("en", number, size, 2 * size, digest(), digest(), digest() if number % 2 else "")
        for number, size in enumerate(rng.integers(1, 2**31, count).tolist())
    ]


def test_a_table_gives_back_its_blocks() -> None:
    blocks = some_blocks(9)
    table = block_table("en", blocks)
    assert list(table) == blocks and len(table) == 9
    assert table[2:7:2] == blocks[2:7:2] and table[-1] == blocks[-1]
    with pytest.raises(IndexError, match="has 9 blocks, asked for 9"):
        table[9]
    assert table.first_document_B.tolist() == [sum(b.documents for b in blocks[:n]) for n in range(9)]
    assert table.first_token_B.tolist() == [sum(b.tokens for b in blocks[:n]) for n in range(9)]
    assert block_table("en", table) is table
    assert blocks[1].file == "blocks/en/000001.bin" and blocks[1].index_file == "blocks/en/000001.npy"


def test_the_file_is_as_documented() -> None:
    blocks = some_blocks(3)
    content = table_bytes(block_table("en", blocks))
    assert hashlib.sha256(content).hexdigest() == table_sha256(block_table("en", blocks))
    start = 10 + struct.unpack("<H", content[8:10])[0]
    assert content[:8] == b"\x93NUMPY\x01\x00" and len(content) == start + 3 * 120
    documents = tokens = 0
    for number, block in enumerate(blocks):
        record = content[start + number * 120 : start + (number + 1) * 120]
        expected = struct.pack("<IIQQ", block.documents, block.tokens, documents, tokens)
        for digest in (block.sha256, block.index_sha256, block.ids_sha256 or "00" * 32):
            expected += bytes.fromhex(digest)
        assert record == expected
        documents, tokens = documents + block.documents, tokens + block.tokens


def test_blocks_out_of_order_or_of_another_source_are_refused() -> None:
    first, second = some_blocks(2)
    with pytest.raises(DataError, match="found 1 of source 'en'"):
        block_table("en", [second, first])
    with pytest.raises(DataError, match="block 0 of source 'zh'"):
        block_table("zh", [first])
    with pytest.raises(DataError, match="allowed 1 to 4294967295"):
        block_table("en", [replace(first, tokens=2**32)])
    with pytest.raises(DataError, match="may hold only letters"):
        block_table("../en", [])


def test_a_written_manifest_is_read_back(tmp_path: Path) -> None:
    manifest = token_corpus(tmp_path, {"one": 30, "two": 5})
    found = load_manifest(tmp_path)
    assert found.digest == manifest.digest
    assert [list(source.blocks) for source in found.sources] == [list(source.blocks) for source in manifest.sources]
    assert isinstance(found.sources[0].blocks, BlockTable)
    assert isinstance(found.sources[0].blocks.record_B, np.memmap)
    assert with_digest(found).digest == manifest.digest
    assert manifest_files(found) == manifest_files(manifest)


def changed(path: Path, change: Any, digest: bool = True) -> None:
    """Rewrite manifest.json after `change(content)`, with a digest that fits unless told otherwise."""
    content = json.loads(path.read_bytes())
    change(content)
    if digest:
        content["digest"] = json_sha256({key: value for key, value in content.items() if key != "digest"})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2, this program reads 3; build it again"),
        (lambda m: m.update(version=4), "format version 4"),
        (lambda m: m.update(version=True), "format version True"),
        (lambda m: m.pop("version"), "format version None"),
        (lambda m: m.pop("pad_id"), "damaged: 'pad_id'"),
        (lambda m: m.update(extra=1), "unknown key extra"),
        (lambda m: m["sources"][0].update(extra=1), "unknown key extra"),
        (lambda m: m.update(vocab_size="512"), "'vocab_size' is '512'"),
        (lambda m: m.update(vocab_size=True), "'vocab_size' is True"),
        (lambda m: m.update(sources=[7]), "damaged"),
        (lambda m: m.update(fim_ids=[-1]), "'fim_ids' is -1"),
        (lambda m: m["sources"][0].update(blocks=-1), "'blocks' is -1"),
        (lambda m: m["sources"][0].update(blocks=2), "the manifest has 2 blocks"),
        (lambda m: m["sources"][0].update(tokens=1), "1 tokens, its blocks have"),
        (lambda m: m["sources"][0].update(table_sha256="0" * 64), "the manifest has 0000"),
        (lambda m: m["sources"].append(m["sources"][0]), "given twice: one, one"),
        (lambda m: m["sources"][0].update(name="../one"), "may hold only letters"),
        (lambda m: m["sources"][0].update(name="/etc"), "may hold only letters"),
        (lambda m: m["sources"][0].update(name="one\n"), "may hold only letters"),
        (lambda m: m["sources"][0].update(name=".."), "may hold only letters"),
        (lambda m: m["sources"][0].update(name="two"), "missing"),
    ],
)
def test_a_wrong_manifest_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    token_corpus(tmp_path, {"one": 30})
    changed(tmp_path / MANIFEST_FILE, change)
    with pytest.raises(DataError, match=message) as error:
        load_manifest(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_damage_of_the_manifest_itself(tmp_path: Path) -> None:
    token_corpus(tmp_path, {"one": 30})
    path = tmp_path / MANIFEST_FILE
    changed(path, lambda m: m.update(vocab_size=513), digest=False)
    with pytest.raises(DataError, match="content has digest"):
        load_manifest(tmp_path)
    for content, message in ((b"[1]", "version list"), (b"\xff", "not JSON"), (b"[" * 100_000, "not JSON")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot read the manifest: no such file"):
        load_manifest(tmp_path)


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    token_corpus(tmp_path, {"one": 30})
    table = tmp_path / "blocks" / "one.npy"
    content = table.read_bytes()
    for damage, message in (
        (content[:-1], "sha256 is"),
        (content[:-120], "sha256 is"),
        (content[:-1] + bytes([content[-1] ^ 1]), "sha256 is"),
        (content[:-120] + b"\x00" + content[-119:], "documents of blocks 0 to 2 do not add up"),
        (content[:-112] + b"\x00" + content[-111:], "documents of blocks 0 to 2 do not add up"),
        (content[:-104] + b"\x00" + content[-103:], "tokens of blocks 0 to 2 do not add up"),
        (content.replace(b"(3,)", b"(2,)"), "holds .2,. records"),
        (b"", "not a block table"),
        (content + bytes(5000), "bytes, at most"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70, "not a block table"),
    ):
        table.write_bytes(damage)
        with pytest.raises(DataError, match=message) as error:
            load_manifest(tmp_path)
        assert str(table) in str(error.value) and "\n" not in str(error.value)
    np.save(table, np.zeros(3, dtype=[("documents", object)]), allow_pickle=True)
    with pytest.raises(DataError, match=r"holds|not a block table"):
        load_manifest(tmp_path)


def test_links_are_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    token_corpus(corpus, {"one": 30})
    table = corpus / "blocks" / "one.npy"
    moved = table.rename(tmp_path / "one.npy")
    table.symlink_to(moved)
    with pytest.raises(DataError, match=r"one\.npy: a symbolic link"):
        load_manifest(corpus)
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(DataError, match="not a plain file"):
        load_manifest(corpus)
    table.unlink()
    moved.rename(table)
    (corpus / "blocks").rename(tmp_path / "elsewhere")
    (corpus / "blocks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a symbolic link"):
        load_manifest(corpus)
    (corpus / "blocks").unlink()
    (tmp_path / "elsewhere").rename(corpus / "blocks")
    (tmp_path / "way").symlink_to(corpus)
    load_manifest(tmp_path / "way")


def test_a_large_table_is_not_held_in_memory(tmp_path: Path) -> None:
    count = 90_000
    record_B = np.zeros(count, dtype=BLOCK_DTYPE)
    record_B["documents"], record_B["tokens"] = 13_000, 1 << 24
    record_B["first_document"] = np.arange(count) * 13_000
    record_B["first_token"] = np.arange(count) << 24
    source = Source("big", "en", count * 13_000, count << 24, 0, BlockTable("big", record_B))
    write_manifest(tmp_path, with_digest(Manifest(FORMAT_VERSION, "0" * 64, 512, 0, 1, 2, (source,), "")))
    tracemalloc.start()
    found = load_manifest(tmp_path).sources[0].blocks
    assert found[count - 1].number == count - 1 and found[77].tokens == 1 << 24
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < record_B.nbytes / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": "nan"}, "source 'one': weight 'nan', need a rational above 0"),
        ({"weight": "0"}, "weight '0', need"),
        ({"weight": "-1"}, "weight '-1', need"),
        ({"weight": "1/0"}, "weight '1/0', need"),
        ({"weight": "1e999999999"}, "weight '1e999999999', need"),
        ({"sources": ()}, "no sources"),
        ({"bos_id": VOCABULARY}, f"bos_id is {VOCABULARY}, but the vocabulary has {VOCABULARY}"),
        ({"pad_id": 10**30}, "pad_id is 1"),
        ({"fim_ids": (3, 4, VOCABULARY)}, rf"fim_ids\[2\] is {VOCABULARY}, but"),
        ({"fim_ids": (3, 4)}, "2 fim_ids, allowed none or 3"),
        ({"vocab_size": 0}, "vocab_size 0, allowed 1 to"),
        ({"vocab_size": 10**30}, "vocab_size 1"),
    ],
)
def test_a_manifest_that_says_what_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    manifest = token_corpus(tmp_path, {"one": 5})
    if "weight" in changes:
        changes = {"sources": (replace(manifest.sources[0], **changes),)}
    write_manifest(tmp_path, with_digest(replace(manifest, **changes)))
    with pytest.raises(DataError, match=message) as error:
        load_manifest(tmp_path)
    assert str(tmp_path / MANIFEST_FILE) in str(error.value) and error.value.exit_code == 65


@pytest.mark.parametrize("weight", ["1", "0.25", "1/3", "0.1", "12/100"])
def test_weights_of_every_spelling(tmp_path: Path, weight: str) -> None:
    manifest = token_corpus(tmp_path, {"one": 5})
    write_manifest(tmp_path, with_digest(replace(manifest, sources=(replace(manifest.sources[0], weight=weight),))))
    assert load_manifest(tmp_path).sources[0].weight == weight


def test_names_that_differ_only_in_case(tmp_path: Path) -> None:
    manifest = token_corpus(tmp_path, {"one": 5})
    other = replace(
        manifest.sources[0], name="ONE", blocks=[replace(b, source="ONE") for b in manifest.sources[0].blocks]
    )
    write_manifest(tmp_path, with_digest(replace(manifest, sources=(*manifest.sources, other))))
    with pytest.raises(DataError, match="differ only in case: one, ONE"):
        load_manifest(tmp_path)

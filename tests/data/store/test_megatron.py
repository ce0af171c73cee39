"""Megatron's indexed datasets: bytes against the format's definition, round trips, and refusals.

`benchmarks/stream.py` compares the same bytes with Megatron-Core's own reader and writer.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from data.contract import Manifest, Source
from data.errors import DataError, UsageError
from data.hashing import file_sha256
from data.store.blocks import BlockStore, write_block
from data.store.exchange import (
    ExportConfig,
    ImportConfig,
    ImportSourceConfig,
    export_megatron,
    import_megatron,
)
from data.store.manifest import FORMAT_VERSION, load_manifest, with_digest, write_manifest
from data.store.megatron import read_indexed, write_indexed

TOKENIZER = Tokenizer(BPE()).to_str()


def expected_index(code: int, width: int, lengths: list[int], boundaries: list[int]) -> bytes:
    """The format, field by field, with struct alone."""
    content = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    content += struct.pack("<QQ", len(lengths), len(boundaries)) + struct.pack(f"<{len(lengths)}i", *lengths)
    pointers, place = [], 0
    for length in lengths:
        pointers.append(place)
        place += length * width
    return content + struct.pack(f"<{len(pointers)}q", *pointers) + struct.pack(f"<{len(boundaries)}q", *boundaries)


def corpus(directory: Path, vocabulary: int, seed: int = 3) -> Manifest:
    """Two sources in several blocks, a tokenizer.json of any content."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(TOKENIZER)
    sources = []
    for name in ("en", "zh"):
        blocks, tokens = [], 0
        for number in range(3):
            documents = [
                np.concatenate([[0], rng.integers(3, vocabulary, length), [1]])
                for length in rng.integers(0, 40, 7).tolist()
            ]
            blocks.append(write_block(directory, name, number, documents))
            tokens += blocks[-1].tokens
        sources.append(Source(name, name, 21, tokens, 0, blocks))
    digest = file_sha256(directory / "tokenizer.json")
    manifest = with_digest(Manifest(FORMAT_VERSION, digest, vocabulary, 0, 1, 2, tuple(sources), ""))
    write_manifest(directory, manifest)
    return manifest


@pytest.mark.parametrize(("vocabulary", "code", "width"), [(65_499, 8, 2), (65_500, 4, 4), (129_280, 4, 4)])
def test_the_files_are_megatrons(tmp_path: Path, vocabulary: int, code: int, width: int) -> None:
    manifest = corpus(tmp_path / "corpus", vocabulary)
    report = export_megatron(ExportConfig(str(tmp_path / "corpus"), str(tmp_path / "out")))
    store = BlockStore(tmp_path / "corpus", load_manifest(tmp_path / "corpus"))
    for source in manifest.sources:
        tokens = [token for block in source.blocks for token in store.tokens(block).tolist()]
        lengths = [length for block in source.blocks for length in np.diff(store.offsets(block)).tolist()]
        assert (tmp_path / f"out/{source.name}.idx").read_bytes() == expected_index(
            code, width, lengths, list(range(len(lengths) + 1))
        )
        packed = struct.pack(f"<{len(tokens)}{'H' if width == 2 else 'i'}", *tokens)
        assert (tmp_path / f"out/{source.name}.bin").read_bytes() == packed
        found = report["sources"][source.name]
        assert (found["tokens"], found["documents"]) == (len(tokens), 21)
        for suffix in ("bin", "idx"):
            assert found[f"{suffix}_sha256"] == file_sha256(tmp_path / f"out/{source.name}.{suffix}")


def imported(tmp_path: Path, **changes: object) -> ImportConfig:
    settings = {
        "out": str(tmp_path / "back"),
        "tokenizer": str(tmp_path / "corpus"),
        "sources": {name: ImportSourceConfig(str(tmp_path / "out" / name), name) for name in ("en", "zh")},
        "vocab_size": 70_000,
        "block_tokens": 150,
        **changes,
    }
    return ImportConfig(**settings)  # type: ignore[arg-type]


def test_export_import_export_is_the_same(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "corpus", 70_000)
    export_megatron(ExportConfig(str(tmp_path / "corpus"), str(tmp_path / "out")))
    report = import_megatron(imported(tmp_path))
    export_megatron(ExportConfig(str(tmp_path / "back"), str(tmp_path / "again")))
    for name in ("en.bin", "en.idx", "zh.bin", "zh.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    found = load_manifest(tmp_path / "back")
    assert found.digest == report["manifest_digest"] and found.tokenizer_sha256 == manifest.tokenizer_sha256
    assert [s.tokens for s in found.sources] == [s.tokens for s in manifest.sources]
    assert report["sources"]["en"]["documents"] == 21 and report["sources"]["en"]["blocks"] > 1
    store = BlockStore(tmp_path / "back", found)
    named = [store.identities(block) for block in found.sources[0].blocks]
    assert [i for block in named for i in block.id] == [str(n) for n in range(21)]
    assert all(block.copies is None for block in named)
    one = export_megatron(ExportConfig(str(tmp_path / "corpus"), str(tmp_path / "one"), ["zh"]))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["zh.bin", "zh.idx"]
    assert list(one["sources"]) == ["zh"]


def test_import_in_another_order_with_ends_and_sequences_joined(tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "en"
    prefix.parent.mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/tokenizer.json").write_text(TOKENIZER)
    documents = [[10, 11, 12], [13], [14, 15]]
    (tmp_path / "out/en.bin").write_bytes(struct.pack("<6q", *range(10, 16)))
    (tmp_path / "out/en.idx").write_bytes(expected_index(5, 8, [2, 1, 1, 2], [0, 2, 3, 4]))
    sources = {"en": ImportSourceConfig(str(prefix), "en", "3/2", 77)}
    report = import_megatron(imported(tmp_path, sources=sources, add_ends=True, shuffle=5, block_tokens=4))
    assert report["sources"]["en"] == {"documents": 3, "sequences": 4, "tokens": 12, "blocks": 2}
    manifest = load_manifest(tmp_path / "back")
    store = BlockStore(tmp_path / "back", manifest)
    order = [int(i) for block in manifest.sources[0].blocks for i in store.identities(block).id]
    assert sorted(order) == [0, 1, 2] != order
    tokens = [token for block in manifest.sources[0].blocks for token in store.tokens(block).tolist()]
    assert tokens == [token for number in order for token in (0, *documents[number], 1)]
    assert (manifest.sources[0].weight, manifest.sources[0].text_bytes) == ("3/2", 77)
    with pytest.raises(DataError, match="document 0 runs from token 10 to 12, not from BOS 0 to EOS 1; add_ends=true"):
        import_megatron(imported(tmp_path, out=str(tmp_path / "other"), sources=sources))
    with pytest.raises(DataError, match="document 0 at offset 2: token 12, but the vocabulary has 12"):
        import_megatron(imported(tmp_path, out=str(tmp_path / "other"), sources=sources, add_ends=True, vocab_size=12))
    assert not (tmp_path / "other").exists()


def test_negative_tokens_and_empty_documents_are_named(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "out").mkdir()
    sources = {"en": ImportSourceConfig(str(tmp_path / "out/en"), "en")}
    for lengths, tokens, message in (
        ([2, 1], [3, 4, -1], "document 1 at offset 0: token -1"),
        ([3, 0], [3, 4, 5], "document 1 is empty"),
    ):
        (tmp_path / "out/en.bin").write_bytes(struct.pack("<3i", *tokens))
        (tmp_path / "out/en.idx").write_bytes(expected_index(4, 4, lengths, [0, 1, 2]))
        with pytest.raises(DataError, match=message):
            import_megatron(imported(tmp_path, sources=sources, add_ends=True))


GOOD = expected_index(4, 4, [2, 1], [0, 1, 2])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "cannot read the index"),
        (GOOD[:20], "cannot read the index"),
        (b"NOTANIDX\x00" + GOOD[9:], "not an index of version 1"),
        (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], "not an index of version 1"),
        (GOOD[:17] + b"\x06" + GOOD[18:], "token type 6, allowed 1, 2, 3, 4, 5, 8"),
        (GOOD[:17] + b"\x00" + GOOD[18:], "token type 0"),
        (GOOD[:-1], "2 sequences and 3 boundaries need"),
        (GOOD + b"\x00\x00", "modes of sequences are not read"),
        (GOOD[:18] + struct.pack("<Q", 2**62) + GOOD[26:], "sequences and 3 boundaries need"),
        (expected_index(4, 4, [2, -1], [0, 1, 2]), "sequence 1 does not lie behind"),
        (GOOD[:42] + struct.pack("<qq", 0, 4) + GOOD[58:], "sequence 1 does not lie behind"),
        (expected_index(4, 4, [2, 1], [0, 1, 1]), "boundaries do not run from 0 to 2"),
        (expected_index(4, 4, [2, 1], [1, 2]), "boundaries do not run from 0 to 2"),
        (expected_index(4, 4, [2, 1], [0, 2, 1, 2]), "boundaries do not run from 0 to 2"),
        (expected_index(4, 4, [2, 1], []), "boundaries do not run from 0 to 2"),
        (expected_index(4, 4, [2, 2], [0, 1, 2]), "12 bytes, the index has 4 tokens of 4 bytes"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "en.bin").write_bytes(bytes(12))
    (tmp_path / "en.idx").write_bytes(GOOD)
    assert np.array_equal(read_indexed(tmp_path / "en").offset_D, [0, 2, 3])
    (tmp_path / "en.idx").write_bytes(index)
    with pytest.raises(DataError, match=message) as error:
        read_indexed(tmp_path / "en")
    assert str(tmp_path / "en") in str(error.value) and "\n" not in str(error.value)


def test_wrong_settings_are_one_line(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus", 70_000)
    with pytest.raises(UsageError, match="unknown fr; the corpus has en, zh"):
        export_megatron(ExportConfig(str(tmp_path / "corpus"), str(tmp_path / "out"), ["fr"]))
    with pytest.raises(UsageError, match="sources: none given"):
        import_megatron(imported(tmp_path, sources={}))
    with pytest.raises(UsageError, match=r"pad_id: found 9, allowed 0 to 8; fim_ids\.1: found 10"):
        import_megatron(imported(tmp_path, vocab_size=9, pad_id=9, fim_ids=[3, 10]))
    with pytest.raises(UsageError, match="may hold only letters"):
        import_megatron(imported(tmp_path, sources={"../x": ImportSourceConfig("p", "en")}))
    names = {"en": ImportSourceConfig("p", "en"), "EN": ImportSourceConfig("p", "en")}
    for changes, message in (
        ({"sources": names}, "en, EN differ only in case"),
        ({"sources": {"en": ImportSourceConfig("", "en")}}, r"sources.en.prefix: found ''"),
        ({"sources": {"en": ImportSourceConfig("/", "en")}}, r"sources.en.prefix: found '/'"),
        ({"sources": {"en": ImportSourceConfig("p", "en", text_bytes=-1)}}, r"text_bytes: found -1"),
        ({"sources": {"en": ImportSourceConfig("p", "en", "1/3")}}, "shares that sum to 1/3"),
        ({"fim_ids": [3, 4]}, "fim_ids: found 2, allowed none or 3"),
        ({"shuffle": 2**63}, "shuffle: found 9223372036854775808"),
    ):
        with pytest.raises(UsageError, match=message):
            import_megatron(imported(tmp_path, **changes))
    (tmp_path / "words").write_text("no tokenizer")
    with pytest.raises(DataError, match="words: not a tokenizer"):
        import_megatron(imported(tmp_path, tokenizer=str(tmp_path / "words")))
    (tmp_path / "three").write_text(Tokenizer(BPE({"a": 0, "b": 1, "c": 2}, [])).to_str())
    with pytest.raises(DataError, match="three: the tokenizer has 3 entries, vocab_size is 2"):
        import_megatron(imported(tmp_path, tokenizer=str(tmp_path / "three"), vocab_size=2, pad_id=1))
    with pytest.raises(DataError, match="tokenizer: no such file"):
        import_megatron(imported(tmp_path, tokenizer=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"en\.idx: cannot read the index"):
        import_megatron(imported(tmp_path))
    assert not (tmp_path / "back").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus", 70_000)
    (tmp_path / "corpus/blocks/en/000002.npy").unlink()
    with pytest.raises(DataError, match="missing"):
        export_megatron(ExportConfig(str(tmp_path / "corpus"), str(tmp_path / "out"), ["en"]))
    assert not list((tmp_path / "out").iterdir())
    report = write_indexed(tmp_path / "none", 10, iter(()))
    assert report["documents"] == 0 and (tmp_path / "none.idx").read_bytes() == expected_index(8, 2, [], [0])

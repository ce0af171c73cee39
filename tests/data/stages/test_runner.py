"""The runner and the local engine on tasks of a few bytes: what is skipped, what is thrown away, how errors end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from data.errors import BusyError, CannotWriteError, DataError, WorkerLostError
from data.stages.contract import Counts, Task
from data.stages.local import LOCK_FILE, LocalEngine
from data.stages.marker import MARKER_FILE
from data.stages.progress import Progress
from data.stages.runner import LOG_FILE, Runner

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Repeat:
    times: int


def repeat(task: Task, directory: Path) -> Counts:
    """The input, so many times."""
    content = Path(task.inputs[0]).read_bytes() * task.settings.times
    (directory / "deep").mkdir()
    (directory / "deep" / "out").write_bytes(content)
    return {"documents": {"en": [1, len(content)]}, "pid": os.getpid()}


def lines(task: Task, last: Counts | None, fresh: Callable[[], Path]) -> Iterator[Counts]:
    """One part per line; stops dead at a line "stop" while a file named in it is there."""
    content = Path(task.inputs[0]).read_text().splitlines()
    for number in range(last["line"] + 1 if last else 0, len(content)):
        directory = fresh()
        (directory / "line").write_text(content[number])
        if content[number] == "stop" and not (Path(task.inputs[0]).parent / "go").exists():
            raise DataError("planted")
        yield {"line": number, "last": number + 1 == len(content)}


def fail(task: Task, directory: Path) -> Counts:
    if task.settings.times == 1:
        time.sleep(0.3)
    raise DataError(f"planted {task.settings.times}")


def die(task: Task, directory: Path) -> Counts:
    if task.settings.times == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def full(task: Task, directory: Path) -> Counts:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def runner(work: Path, engine: LocalEngine | None = None, verify: bool = True) -> Runner:
    work.mkdir(exist_ok=True)
    return Runner(work, engine or LocalEngine(1, work), Progress(Console(quiet=True)), verify)


def tasks(source: Path, count: int = 3) -> list[Task]:
    source.write_bytes(b"abc")
    return [Task("stage", f"t{i}", (str(source),), Repeat(i)) for i in range(count)]


def begun(work: Path) -> list[str]:
    events = [json.loads(line) for line in (work / LOG_FILE).read_text().splitlines()]
    return [event["task"] for event in events if event["event"] == "begun"]


def test_finished_tasks_are_skipped_until_something_differs(tmp_path: Path) -> None:
    work, source = tmp_path / "work", tmp_path / "source"
    first = runner(work).run("stage", tasks(source), repeat)
    assert [done.counts["documents"]["en"][1] for done in first] == [0, 3, 6]
    assert Path(first[2].file("deep/out")).read_bytes() == b"abcabc"
    again = runner(work).run("stage", tasks(source), repeat)
    assert again == first
    assert begun(work) == ["t0", "t1", "t2"]
    (work / "stage" / "t1" / "deep" / "out").write_bytes(b"abd")
    (work / "stage" / "t2" / MARKER_FILE).write_bytes(b'{"version": 1')
    (work / "stage" / ".t0.partial").mkdir()
    assert runner(work).run("stage", tasks(source), repeat) == first
    assert begun(work)[3:] == ["t1", "t2"]
    source.write_bytes(b"xyz")
    changed = [Task("stage", f"t{i}", (str(source),), Repeat(i)) for i in range(2)]
    assert Path(runner(work).run("stage", changed, repeat)[1].file("deep/out")).read_bytes() == b"xyz"
    assert sorted(path.name for path in (work / "stage").iterdir()) == ["t0", "t1"]


def test_sizes_alone_where_contents_are_not_to_be_read(tmp_path: Path) -> None:
    work, source = tmp_path / "work", tmp_path / "source"
    runner(work).run("stage", tasks(source), repeat)
    (work / "stage" / "t1" / "deep" / "out").write_bytes(b"abd")
    (work / "stage" / "t2" / "deep" / "out").write_bytes(b"short")
    runner(work, verify=False).run("stage", tasks(source), repeat)
    assert begun(work)[3:] == ["t2"]


def test_a_chain_goes_on_after_its_last_whole_part(tmp_path: Path) -> None:
    work, source = tmp_path / "work", tmp_path / "source"
    source.write_text("one\ntwo\nstop\nfour\n")
    task = Task("chain", "c", (str(source),), Repeat(0))
    with pytest.raises(DataError, match="planted"):
        runner(work).chain("chain", [task], lines)
    assert begun(work) == ["c.00000", "c.00001", "c.00002"]
    (tmp_path / "go").touch()
    (parts,) = runner(work).chain("chain", [task], lines)
    assert begun(work)[3:] == ["c.00002", "c.00003"]
    assert [Path(part.file("line")).read_text() for part in parts] == ["one", "two", "stop", "four"]
    (work / "chain" / "c.00001" / "line").write_text("TWO")
    (again,) = runner(work).chain("chain", [task], lines)
    assert begun(work)[5:] == ["c.00001", "c.00002", "c.00003"]
    assert again == parts


def test_workers_share_the_tasks_and_the_earliest_error_is_told(tmp_path: Path) -> None:
    work, source = tmp_path / "work", tmp_path / "source"
    work.mkdir()
    with LocalEngine(2, work) as engine:
        given = tasks(source, 6)
        done = runner(work, engine).run("stage", given, repeat)
        assert [held.counts["documents"]["en"][1] for held in done] == [0, 3, 6, 9, 12, 15]
        pids = {held.counts["pid"] for held in done}
        assert len(pids) == 2 and os.getpid() not in pids
        with pytest.raises(DataError, match=r"^planted 1$"):
            runner(work, engine).run("other", given[1:], fail)
        message = r"^stage 'third', task 't2': its worker process was killed by SIGKILL \(out of memory\?\); run again"
        with pytest.raises(WorkerLostError, match=message):
            runner(work, engine).run("third", [Task("third", t.name, t.inputs, t.settings) for t in given], die)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ORPHANS = """
import sys, time
from pathlib import Path
from data.stages.local import LocalEngine
if __name__ == "__main__":
    with LocalEngine(2, Path(sys.argv[1])) as engine:
        for item, _ in engine.map(time.sleep, [0.0, 0.0, 30.0, 30.0]):
            print(item, flush=True)
"""


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["0.0\n", "0.0\n"]
    process.kill()
    process.wait()
    with LocalEngine(1, tmp_path):
        pass  # waits for the lock that the workers shared


def test_workers_of_another_build_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.stages.local.LOCK_SECONDS", 0.1)
    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(BusyError, match="worker processes of another build"), LocalEngine(1, tmp_path):
            pass


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(CannotWriteError, match=r"cannot write .*stage/.*t0.*: No space left on device"):
        runner(tmp_path / "work").run("stage", tasks(source, 1), full)
    assert not (tmp_path / "work/stage/t0").exists()
    (tmp_path / "work" / LOG_FILE).unlink()
    (tmp_path / "work" / LOG_FILE).mkdir()
    with pytest.raises(CannotWriteError, match=r"log\.jsonl: Is a directory"):
        runner(tmp_path / "work").run("stage", tasks(source, 1), full)


def test_one_engine_in_a_work_directory(tmp_path: Path) -> None:
    with LocalEngine(1, tmp_path):
        with pytest.raises(BusyError, match="another build is at work there"), LocalEngine(1, tmp_path):
            pass
    with LocalEngine(1, tmp_path):
        pass

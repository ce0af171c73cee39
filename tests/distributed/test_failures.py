"""A stage that raises, a rank that is killed, a rank that is stopped: every process is gone in time, and says why.

First the real executor on four gloo processes, with stages of y = w x that break at a chosen action; then training
runs, under `python -m launch` and under torchrun.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parallel.schedule.actions import Compute, Op, Post, Table, Transfer, flatten
from parallel.schedule.registry import build
from tests.distributed.broken import FAULTY, MICRO_BATCHES, RANKS, SIZES, Fault, steps
from tests.distributed_helper import DistributedFailure, run_distributed
from tests.train.ranks import ROOT, arguments, make_corpus, nursery, stage
from train.history import read_lines

TIMEOUT_SECONDS = 5.0
BOUND_SECONDS = TIMEOUT_SECONDS + 10


def middle(table: Table, op: Op) -> Compute:
    """The middle one of the faulty rank's actions of this kind."""
    found = [action for action in flatten(table.actions[FAULTY]) if action.op is op]
    return found[len(found) // 2]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def check_gone(pids: list[int], since: float, bound: float) -> float:
    """Seconds from `since` until none of the processes is left, the stopped one included."""
    while not all(map(gone, pids)):
        assert time.monotonic() - since < bound, [pid for pid in pids if not gone(pid)]
        time.sleep(0.01)
    return time.monotonic() - since


def break_it(schedule: str, kind: str, op: Op, folder: Path, slow: bool = False) -> None:
    """Break rank FAULTY; all are gone in time, and each has named what it was doing, with whom."""
    folder.mkdir()
    table = build(schedule, RANKS, MICRO_BATCHES)
    fault = Fault(kind, middle(table, op), slow)
    with pytest.raises(DistributedFailure) as failure:
        run_distributed(steps, RANKS, schedule, fault, str(folder), timeout=120, collective_timeout=TIMEOUT_SECONDS)
    pids = [int((folder / f"pid{rank}").read_text()) for rank in range(RANKS)]
    seconds = check_gone(pids, float((folder / "struck").read_text()), BOUND_SECONDS)
    print(f"{schedule}, {kind} in {fault.action}: {seconds:.1f} s")
    parts = re.split(r"^----- rank (\d) ", str(failure.value), flags=re.MULTILINE)[1:]
    said = dict(zip(map(int, parts[::2]), parts[1::2], strict=True))
    if kind == "raise":
        a = fault.action
        where = re.escape(f"pipeline rank {FAULTY}, ") + rf".*{re.escape(str(a))} .stage {a.stage}, chunk {a.chunk}."
        assert re.search(rf"^ValueError: broken on purpose\n{where}", said[FAULTY], re.MULTILINE), said[FAULTY]
    else:
        assert "(no output)" in said[FAULTY]
    listed = [{str(t): t for a in row if isinstance(a, Post) for t in a.transfers} for row in table.actions]
    heard = 0
    for rank in set(range(RANKS)) - {FAULTY}:
        line = said[rank].strip().splitlines()[-1]
        named = re.search(
            rf"PeerLost: pipeline rank {rank}: (\S+) .stage (\d+), chunk (\d+), peer (\d+).(?: with | did not)",
            line,
        )
        if named:
            transfer: Transfer = listed[rank][named[1]]
            assert [transfer.stage, transfer.chunk, transfer.peer] == [int(named[i]) for i in (2, 3, 4)]
        # It may also be killed unheard after the helper's two seconds of grace.
        assert named or "(exit code -9)" in said[rank], said[rank]
        heard += "(exit code 1)" in said[rank]
    assert heard


@pytest.mark.parametrize("schedule", SIZES)
def test_stage_that_raises_and_rank_that_is_killed(schedule: str, tmp_path: Path) -> None:
    break_it(schedule, "raise", Op.F, tmp_path / "forward")
    break_it(schedule, "raise", Op.W, tmp_path / "weight gradient")
    break_it(schedule, "kill", Op.F, tmp_path / "killed")
    break_it(schedule, "kill", Op.F, tmp_path / "killed beside slow ones", slow=True)


def test_rank_that_is_stopped(tmp_path: Path) -> None:
    """Both schedules at once: nothing happens until the timeout."""
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(break_it, schedule, "stop", Op.F, tmp_path / schedule) for schedule in SIZES]:
            done.result()


# Training runs -------------------------------------------------------------------------------------------------------

# Long enough for the imports of a first step on a machine shared with others.
RUN_TIMEOUT_SECONDS = 10.0
TWO = ["parallel.pipeline=2", "model.num_layers=2", f"parallel.timeout_seconds={RUN_TIMEOUT_SECONDS}"]
LONG = [stage("only", 32, 4_000_000, "[{until:9000000,value:4}]")]
LAUNCH = ["launch"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
LOST = re.compile(
    r"bireme: rank 0, step \d+: (pipeline rank 0: .* .stage \d, chunk \d+, peer 1. did not complete|.* lost a peer): "
    r"(Timed out|Connection|Read error|Application timeout)"
)


def rank_processes(launcher: int) -> dict[int, int]:
    """Rank -> process id, of the ranks that a launcher has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            rank = re.search(r"(?:^|\0)RANK=(\d+)", (folder / "environ").read_text()) if parent == launcher else None
        except OSError:  # it ended while we looked
            continue
        if rank is not None:
            found[int(rank[1])] = int(folder.name)
    return found


def lose_rank_one(
    command: list[str], number: signal.Signals, root: Path, corpus: Path, bound: float
) -> tuple[int, list[str], int]:
    """Send rank 1 of a run a signal after two steps: (exit code, lines on stderr, process id of rank 1)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    given = [sys.executable, "-m", *command, *arguments(root, corpus, "run", LONG, *TWO)]
    root.mkdir()
    with open(root / "out", "w") as out, open(root / "error", "w") as error:
        process = subprocess.Popen(given, cwd=ROOT, env=environment, stdout=out, stderr=error)
    try:
        end = time.monotonic() + 240
        while len(list(read_lines(root / "run" / "metrics.jsonl"))) < 2:
            assert process.poll() is None and time.monotonic() < end, (root / "error").read_text()
            time.sleep(0.05)
        ranks = rank_processes(process.pid)
        assert sorted(ranks) == [0, 1]
        struck = time.monotonic()
        os.kill(ranks[1], number)
        code = process.wait(timeout=bound)
        seconds = check_gone([process.pid, *ranks.values()], struck, bound)
        print(f"{command[0]}, {number.name}: {seconds:.1f} s\n{(root / 'error').read_text()}")
    finally:
        for pid in [*rank_processes(process.pid).values(), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return code, (root / "error").read_text().splitlines(), ranks[1]


def test_launcher_loses_a_rank(tmp_path: Path) -> None:
    corpus, bound = make_corpus(tmp_path / "corpus"), RUN_TIMEOUT_SECONDS + 10
    with ThreadPoolExecutor() as pool:
        runs = {
            number: pool.submit(lose_rank_one, LAUNCH, number, tmp_path / number.name, corpus, bound)
            for number in (signal.SIGKILL, signal.SIGSTOP)
        }
    endings = {
        signal.SIGKILL: "was killed by SIGKILL",
        signal.SIGSTOP: "was still silent 5 s after the first failure: killed",
    }
    for number, run in runs.items():
        code, lines, pid = run.result()
        assert code == 69
        assert len(lines) == 2 and LOST.match(lines[0]), lines
        assert lines[1] == f"bireme: rank 1 (process {pid}) {endings[number]}"


@pytest.mark.slow
def test_torchrun_loses_a_stopped_rank(tmp_path: Path) -> None:
    """torchrun waits 30 s before it kills; its own page of text follows the line of the rank that noticed."""
    corpus, bound = make_corpus(tmp_path / "corpus"), RUN_TIMEOUT_SECONDS + 40
    code, lines, _ = lose_rank_one(TORCHRUN, signal.SIGSTOP, tmp_path / "run", corpus, bound)
    assert code == 1
    assert len([line for line in lines if LOST.match(line)]) == 1
    assert any("exitcode" in line and "69" in line for line in lines)


def test_a_stage_that_raises_in_training(tmp_path: Path) -> None:
    given = arguments(tmp_path, make_corpus(tmp_path / "corpus"), "run", LONG, *TWO)
    with nursery() as nurse:
        started = nurse.start(given, tmp_path / "logs", 2, first="tests.distributed.broken:break_stage")
        codes = started.wait()
        assert all(map(gone, started.pids))
    assert codes == [69, 1], started.error(1)
    (line,) = started.error(0).splitlines()
    assert LOST.match(line)
    line = started.error(1).splitlines()[-1]
    expected = r"ValueError: broken on purpose in two lines \(pipeline rank 1, .*F\d.1@\d \(stage \d, chunk 1\).*\)"
    assert re.fullmatch(rf"bireme: rank 1, step 1: {expected}", line), line

"""A run that is killed, stopped and resumed is, to the last bit, the run that was left alone: PP2 DualPipe x EP2 on
four processes in the FP8 recipe, with a batch ramp and a second stage of longer sequences (YaRN on)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.trace.__main__ import main as trace
from tests.train.ranks import LAYOUT, Nursery, arguments, losses, make_corpus, nursery, stage
from train.history import read_lines

STAGES = [
    stage("first", 32, 900, "[{until:400,value:4},{until:9000,value:8}]"),
    stage("second", 64, 500, "[{until:9000,value:4}]"),
]
# FP8 needs widths that are multiples of 16.
MODEL = [
    "model.num_layers=3",
    "model.rope_scaling.original_length=32",
    "model.kv_lora_rank=16",
    "model.qk_rope_head_dim=16",
    "precision.fp8=true",
]
RUN = [*LAYOUT, *MODEL, "checkpoint.every=3", "checkpoint.keep=2", "optimizer.groups.router.learning_rate_factor=0.5"]


@pytest.fixture(scope="module")
def nurse() -> Iterator[Nursery]:
    with nursery() as started:
        yield started


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def reference(nurse: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run. It alone is traced, which must change nothing."""
    root = tmp_path_factory.mktemp("reference")
    started = nurse.start(arguments(root, corpus, "run", STAGES, *RUN, "logging.trace_steps=[2,3]"), root / "logs")
    assert started.wait() == [0, 0, 0, 0], started.error(0)
    return root / "run"


def tensors(run: Path) -> dict[str, bytes]:
    """Every file of tensors in the last stage's checkpoint, as bytes."""
    (last,) = (run / "stages" / "second").glob("step-*")
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}


def position(run: Path) -> dict[str, object]:
    (last,) = (run / "stages" / "second").glob("step-*")
    state = json.loads((last / "state.json").read_text())["run"]
    del state["tracker_id"]  # made anew for every run
    return state


def test_killed_and_stopped_run_equals_the_uninterrupted_one(
    reference: Path, nurse: Nursery, corpus: Path, tmp_path: Path
) -> None:
    run, given = tmp_path / "run", arguments(tmp_path, corpus, "run", STAGES, *RUN)
    whole = losses(reference)
    first_of_second = next(n for n, line in enumerate(read_lines(reference / "metrics.jsonl")) if line["train/stage"])
    assert (first_of_second, len(whole)) == (6, 9)

    # One rank killed between two checkpoints, where the batch grows.
    started = nurse.start(given, tmp_path / "logs1")
    started.when(run, lambda lines: len(lines) >= 4)
    os.kill(started.pids[2], signal.SIGKILL)
    begin = time.monotonic()
    codes = started.wait()
    assert time.monotonic() - begin < 60
    assert codes[2] == -signal.SIGKILL
    assert [code for rank, code in enumerate(codes) if rank != 2] == [69, 69, 69]
    for rank in (0, 1, 3):
        (line,) = started.error(rank).strip().splitlines()
        assert line.startswith(f"bireme: rank {rank}, step ")
        assert "lost a peer" in line or "did not complete" in line
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] == 69

    # Resumed, and all ranks killed after the second stage began.
    started = nurse.start(given, tmp_path / "logs2")
    started.when(run, lambda lines: len(lines) >= first_of_second + 2)
    for pid in started.pids:
        os.kill(pid, signal.SIGKILL)
    assert started.wait() == [-signal.SIGKILL] * 4

    # Resumed, and asked to stop by a file.
    started = nurse.start(given, tmp_path / "logs3")
    # Before the first step, which is slow: few and quick steps are left, and the run must not be done before it looks.
    started.when(run, lambda lines: lines[-1]["event"] == "started", file="events.jsonl")
    (run / "STOP").touch()
    assert started.wait() == [75, 75, 75, 75]
    (line,) = started.error(0).strip().splitlines()
    assert "stopped on request after step" in line
    assert not (run / "STOP").exists()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()

    # A stop that came too late for the last job does not stop the next one.
    (run / "STOP").touch()
    started = nurse.start(given, tmp_path / "logs4")
    assert started.wait() == [0, 0, 0, 0], started.error(0)

    starts = [line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "started"]
    assert starts == [0, 3, 6, status["step"]]
    assert losses(run) == whole
    assert tensors(run) == tensors(reference)
    assert position(run) == position(reference)
    assert not list(tmp_path.glob("run/**/*.partial")) and not list(tmp_path.glob("run/**/*.tmp-*"))


def test_the_optimizers_groups_are_printed_and_saved(reference: Path) -> None:
    event = next(line for line in read_lines(reference / "events.jsonl") if line["event"] == "optimizer_groups")
    found = {group["group"]: (group["learning_rate_factor"], group["weight_decay"]) for group in event["groups"]}
    others = {"embedding", "head", "experts", "matrices"}
    assert found == dict.fromkeys(others, (1, 0.1)) | {
        "norms": (1, 0),
        "router": (0.5, 0.1),
        "router biases": (None, None),
    }
    printed = (reference.parent / "logs" / "rank0.out").read_text()
    assert printed.count("optimizer groups") == 1 and " x 0.5 " in printed
    assert not any((reference.parent / "logs" / f"rank{rank}.out").read_text() for rank in (1, 2, 3))


def test_traced_steps_of_a_run(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in (reference / "trace").iterdir()) == [f"rank-{rank}.json" for rank in range(4)]
    for rank in range(4):
        events = json.loads((reference / "trace" / f"rank-{rank}.json").read_text())["traceEvents"]
        assert sum(event.get("cat") == "run" for event in events) == 2
    assert trace([str(reference)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ranks"] == 4 and figures["all_to_all_ms"] > 0
    moved = {hidden["all_to_all"] for hidden in figures["hidden"]}
    assert moved == {f"{name}({way})" for name in ("dispatch", "combine") for way in "FB"}

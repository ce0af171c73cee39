"""Metrics: one history across restarts, exact floats, and sinks that cannot hurt a run."""

from __future__ import annotations

import io
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from model.groups import group_table
from parallel.optimizer.config import GROUPS, GroupConfig, GroupsConfig, OptimizerConfig
from tests.model.models import model_config
from train.console import ConsoleSink, duration, short
from train.history import JsonLinesSink, exact, read_lines, rewind
from train.metrics import RunMetrics, new_tracker_id, open_metrics, write_status
from train.tracker import WandbSink


class Broken:
    """A sink that works until it is told to fail."""

    name = "broken"

    def __init__(self) -> None:
        self.calls = 0
        self.failing = False

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.failing:
            raise OSError("no space left")

    def event(self, kind: str, fields: Mapping[str, object]) -> None: ...

    def expert_load(self, step: int, loads: Mapping[int, Sequence[float]]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class FakeRun:
    """What `wandb.init` returns, as far as we use it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, float], **more: Any) -> None:
        assert not more, f"wandb drops rows when given {more}"
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def wandb_sink(start: Any, **more: Any) -> WandbSink:
    return WandbSink(
        project="p",
        name="n",
        identifier="abc",
        mode="offline",
        directory=Path("."),
        run_config={"a": 1},
        start=start,
        **more,
    )


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_jsonl_keeps_floats_exactly(tmp_path: Path) -> None:
    metrics = RunMetrics([JsonLinesSink(tmp_path)])
    loss = math.pi / 3
    values = {
        "train/loss": torch.tensor(loss, dtype=torch.float64),
        "train/loss_mtp": np.float32(0.1),
        "train/loss/zh": float("nan"),
        "optim/grad_norm": float("inf"),
        "optim/lr": 1e-3,
        "optim/skipped": 1,
    }
    metrics.log(7, 4096, values)  # type: ignore[arg-type]
    text = (tmp_path / "metrics.jsonl").read_text()  # before close: flushed line by line
    assert text.endswith("\n") and "NaN" not in text and "Infinity" not in text
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["tokens"], line["optim/skipped"]) == (7, 4096, 1)
    assert float.fromhex(line["train/loss_hex"]) == loss == line["train/loss"]
    assert exact(line, "train/loss_mtp") == float(np.float32(0.1))
    assert line["train/loss/zh"] is None and math.isnan(exact(line, "train/loss/zh"))
    assert line["optim/grad_norm"] is None and exact(line, "optim/grad_norm") == math.inf
    assert "optim/lr_hex" not in line


def test_a_value_that_is_no_number_is_the_callers_error(tmp_path: Path) -> None:
    metrics = RunMetrics([JsonLinesSink(tmp_path)])
    with pytest.raises(TypeError, match="metric 'train/loss' must be one number, found list"):
        metrics.log(1, 1, {"train/loss": [1.0, 2.0]})  # type: ignore[dict-item]
    assert metrics.sinks == ("jsonl",)


def test_resume_leaves_one_history(tmp_path: Path) -> None:
    def run(after: int, until: int, value: float) -> None:
        metrics = open_metrics(
            tmp_path, rank=0, step=after, total_tokens=100, tracker_id="x", wandb="disabled", console=False
        )
        for step in range(after + 1, until + 1):
            metrics.log(step, step * 10, {"train/loss": value})
            metrics.expert_load(step, {3: [1, 2], 4: [2, 1]})
        metrics.event("stopped", step=until)
        metrics.close(0)

    run(0, 8, 1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "tok')  # the kill came in the middle of a line
    run(5, 7, 2.0)
    run(6, 9, 3.0)
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["train/loss"] for line in lines] == [1.0] * 5 + [2.0] + [3.0] * 3
    assert steps_of(tmp_path / "metrics.replaced-1.jsonl") == [6, 7, 8]
    assert steps_of(tmp_path / "metrics.replaced-2.jsonl") == [7]
    assert steps_of(tmp_path / "load.jsonl") == [step for step in range(1, 10) for _ in range(2)]
    assert [line["step"] for line in read_lines(tmp_path / "events.jsonl")] == [8, 7, 9]


def test_rewind_changes_nothing_when_there_is_nothing_later(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path)
    sink.log(1, 10, {"train/loss": 1.0})
    sink.close(0)
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "metrics.jsonl").stat().st_ino
    rewind(tmp_path, 1)
    assert before == ((tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "metrics.jsonl").stat().st_ino)
    assert not list(tmp_path.glob("*replaced*"))


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        rewind(tmp_path, 0)


def test_a_failing_sink_is_dropped_once_and_the_others_go_on(tmp_path: Path) -> None:
    warnings: list[str] = []
    broken = Broken()
    metrics = RunMetrics([broken, JsonLinesSink(tmp_path)], warn=warnings.append)
    metrics.log(1, 1, {"train/loss": 1.0})
    broken.failing = True
    for step in (2, 3, 4):
        metrics.log(step, step, {"train/loss": 1.0})
    metrics.close(0)
    assert broken.calls == 2
    assert warnings == ["warning: metrics sink 'broken' failed and is dropped: OSError: no space left"]
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert [line["sink"] for line in read_lines(tmp_path / "events.jsonl")] == ["broken"]


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path / "run", rank=1, step=0, total_tokens=1, tracker_id=new_tracker_id())
    metrics.log(1, 1, {"train/loss": 1.0})
    metrics.event("resumed")
    metrics.close(0)
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logging\.wandb is 'ofline'; allowed: offline, online, disabled"):
        open_metrics(tmp_path, rank=0, step=0, total_tokens=1, tracker_id="x", wandb="ofline")


def test_wandb_gets_tokens_as_axis_and_its_id(tmp_path: Path) -> None:
    run, arguments = FakeRun(), {}

    def start(**given: Any) -> FakeRun:
        arguments.update(given)
        return run

    sink = wandb_sink(start)
    sink.log(5, 500, {"train/loss": 2.0})
    sink.log(3, 300, {"train/loss": 3.0})  # resumed from an older checkpoint: steps go back
    sink.close(75)
    assert run.defined == [("tokens", None), ("*", "tokens")]
    assert run.logged == [
        {"tokens": 500, "step": 5, "train/loss": 2.0},
        {"tokens": 300, "step": 3, "train/loss": 3.0},
    ]
    assert run.exit_code == 75
    assert (arguments["id"], arguments["resume"], arguments["mode"]) == ("abc", "allow", "offline")


def test_a_dead_tracker_neither_blocks_nor_stops(tmp_path: Path) -> None:
    release = threading.Event()

    def never(**_: Any) -> FakeRun:
        release.wait(10)
        return FakeRun()

    warnings: list[str] = []
    metrics = RunMetrics([JsonLinesSink(tmp_path), wandb_sink(never, finish_timeout=0.05)], warn=warnings.append)
    began = time.monotonic()
    for step in range(1, 101):
        metrics.log(step, step, {"train/loss": 1.0})
    metrics.close(0)
    assert time.monotonic() - began < 5
    assert len(steps_of(tmp_path / "metrics.jsonl")) == 100
    assert len(warnings) == 1 and "did not finish within" in warnings[0]
    assert [line["event"] for line in read_lines(tmp_path / "events.jsonl")] == ["sink_dropped"]
    release.set()


def test_a_tracker_that_cannot_start_is_dropped(tmp_path: Path) -> None:
    def refuse(**_: Any) -> FakeRun:
        raise RuntimeError("no API key")

    warnings: list[str] = []
    sink = wandb_sink(refuse)
    sink._thread.join(5)
    metrics = RunMetrics([sink, JsonLinesSink(tmp_path)], warn=warnings.append)
    metrics.log(1, 1, {"train/loss": 1.0})
    metrics.log(2, 2, {"train/loss": 1.0})
    assert warnings == ["warning: metrics sink 'wandb' failed and is dropped: RuntimeError: no API key"]
    assert metrics.sinks == ("jsonl",)


def test_console_lines(tmp_path: Path) -> None:
    out, now = io.StringIO(), [0.0]
    sink = ConsoleSink(2_000_000, console=Console(file=out, force_terminal=False), clock=lambda: now[0])
    values = {
        "train/loss": 4.25,
        "train/loss_mtp": 5.5,
        "optim/lr": 3e-4,
        "optim/grad_norm": 1.25,
        "moe/max_vio": 0.5,
        "perf/tokens_per_s": 12345.0,
    }
    sink.log(1, 8192, values)
    now[0] = 10.0
    sink.log(2, 8192 * 2, {**values, "optim/skipped": 1})
    sink.log(3, 8192 * 2, {**values, "optim/skipped": 1})
    sink.log(2, 8192 * 2, {"val/en/bits_per_byte": 1.5})
    sink.event("checkpoint_saved", {"path": "runs/x/step-2"})
    sink.close(0)
    first, second, third, evaluation, event = out.getvalue().splitlines()
    for part in ("step      1", "8.19K", "loss  4.2500", "mtp  5.5000", "lr 3.00e-04", "1.25", "12.3K tok/s"):
        assert part in first
    assert first.endswith("left ?")
    assert "left 40m21s  SKIPPED" in second  # (2e6 - 16384) tokens at 819.2 per second
    assert "SKIPPED" not in third  # the count of the run has not grown
    assert "val/en/bits_per_byte 1.5" in evaluation
    assert event == "-- checkpoint saved: path runs/x/step-2"


def test_the_groups_table(tmp_path: Path) -> None:
    """On the console a line each, in events.jsonl the numbers."""
    out, optimizer = io.StringIO(), OptimizerConfig(groups=GroupsConfig(router=GroupConfig(0.0, 2.0)))
    groups = [asdict(group) for group in group_table(model_config("v3"), optimizer)]
    metrics = RunMetrics([JsonLinesSink(tmp_path), ConsoleSink(1, console=Console(file=out, width=80))])
    metrics.event("optimizer_groups", groups=groups)
    metrics.close(0)
    title, header, *lines = [line.split() for line in out.getvalue().splitlines()]
    assert title == ["optimizer", "groups"] and header == ["group", "tensors", "parameters", "rate", "decay"]
    assert [line[0] for line in lines] == [*GROUPS, "router"]
    assert lines[2] == ["norms", "252", "1.04M", "x", "1", "0"]
    assert lines[3] == ["router", "59", "108M", "x", "0", "0.2", "frozen"]
    assert lines[4] == ["experts", "30,208", "665B", "x", "1", "0.1"]
    assert lines[6] == ["router", "biases", "59", "15.1K", "-", "-", "moved", "by", "the", "load"]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert event["event"] == "optimizer_groups" and event["groups"] == groups


def test_progress_bar_on_a_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(100, console=Console(file=out, force_terminal=True, width=100, highlight=False))
    sink.log(1, 50, {"train/loss": 4.0})
    sink.close(0)
    assert "50%" in out.getvalue() and "loss  4.0000" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45s"), (725, "12m05s"), (12_000, "3h20m"), (370_800, "4d07h"), (-3, "0s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_short() -> None:
    assert [short(n) for n in (0, 999, 1500, 2_500_000, 14.8e12)] == ["0", "999", "1.5K", "2.5M", "14.8T"]


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    write_status(tmp_path, "running", step=1)
    write_status(tmp_path, "done", step=2, exit_code=0)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 2, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]

"""A traced step of the real engine on four processes: what is recorded is what the table says ran."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.pipeline.contract import DEFAULT_ORDER
from parallel.schedule.actions import Op, Pair, Post, Table, flatten
from parallel.schedule.registry import build
from parallel.trace.__main__ import main
from parallel.trace.chrome import write_rank
from parallel.trace.clock import clock_offset
from parallel.trace.recorder import Event, Kind, Recorder
from tests.distributed.test_schedules import FLOAT64, Case, model_of, plan_of, samples_of
from tests.distributed_helper import run_distributed
from train.engine import Engine

MICRO_BATCHES, LAYERS = 4, 4  # MoE layers of the tiny model, one MTP layer more
LAYOUT = ParallelConfig(pipeline=2, expert=2, schedule="dualpipe", timeout_seconds=60)


def traced(rank: int, world_size: int, directory: str) -> list[list[Event]]:
    """Spans of an untraced, a traced and another untraced step."""
    config = model_of(Case("dualpipe", 2, False, 1, False, False, MICRO_BATCHES))
    engine = Engine(config, LAYOUT, FLOAT64, torch.float64, False, rank, sources=2)
    engine.initialize(3)
    given = samples_of(config, MICRO_BATCHES) * 2
    order = engine.sample_order(0, 2 * MICRO_BATCHES, 1)
    recorder, found = Recorder(rank), []
    for use in (None, recorder, None):
        engine.record(use)
        engine.step({key: given[index] for key, (index,) in order.items()}, MICRO_BATCHES, plan_of(given, 1))
        found.append(recorder.events)
    write_rank(recorder, Path(directory), clock_offset())
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[list[Event]]]]:
    directory = tmp_path_factory.mktemp("traced")
    return directory, run_distributed(traced, 4, str(directory))


Run = tuple[Path, list[list[list[Event]]]]


def table() -> Table:
    return build("dualpipe", 2, MICRO_BATCHES)


def test_only_the_steps_asked_for(run: Run) -> None:
    for before, during, after in run[1]:
        assert before == [] and len(during) == len(after) > 100


def test_every_action_step_and_communication_is_there_once(run: Run) -> None:
    for rank, (_, events, _) in enumerate(run[1]):
        row = table().actions[rank // 2]
        kinds = Counter(event.kind for event in events)
        actions = [event.name for event in events if event.kind is Kind.ACTION]
        assert actions == flatten(row) and kinds[Kind.RUN] == 1
        listed = Counter(str(t) for action in row if isinstance(action, Post) for t in action.transfers)
        communications = [event for event in events if event.kind is Kind.COMMUNICATION]
        channels = channels_of(events, Kind.COMMUNICATION)
        assert Counter(str(e.name) for e in communications if "peer" in e.args) == listed
        chunks = sum(action.op is Op.F for action in flatten(row))
        # Every chunk passes both stages: each MoE layer and the MTP layer once, on this rank or its mirror.
        moves = sum(channels_of(run[1][mate][1], Kind.COMMUNICATION)["all_to_all"] for mate in (rank, (rank + 2) % 4))
        assert moves == 2 * 4 * MICRO_BATCHES // 2 * (LAYERS + 1)
        assert channels["counts"] * 4 == channels["all_to_all"]
        assert channels["reduction"] > 0 and chunks == MICRO_BATCHES
        assert all(event.end is not None and event.end >= event.start for event in events)


def channels_of(events: list[Event], kind: Kind) -> Counter[str]:
    return Counter(str(event.args["channel"]) for event in events if event.kind is kind and "channel" in event.args)


def test_a_communication_lasts_until_it_was_waited_for(run: Run) -> None:
    """Receives, all-to-alls and counts are over when the host has waited, and no wait is left out."""
    for _, events, _ in run[1]:
        waits = Counter(str(event.args["channel"]) for event in events if event.kind is Kind.WAIT)
        channels = Counter(
            str(e.args["channel"]) for e in events if e.kind is Kind.COMMUNICATION and "channel" in e.args
        )
        for channel in ("all_to_all", "counts", "reduction"):
            assert waits[channel] == channels[channel]


def test_the_steps_of_a_pair_follow_the_declared_order(run: Run) -> None:
    pairs = 0
    for rank, (_, events, _) in enumerate(run[1]):
        for pair in (action for action in table().actions[rank // 2] if isinstance(action, Pair)):
            (span,) = (e for e in events if e.kind is Kind.ACTION and e.name == pair.forward)
            inside = [e.name for e in events if e.kind is Kind.STEP and span.start <= e.start and e.end <= span.end]
            named = [name for name in inside if name in DEFAULT_ORDER]
            whole = [named[i : i + 10] for i in range(0, len(named) - 9, 10)]
            assert whole and whole[0] == list(DEFAULT_ORDER)
            pairs += 1
    assert pairs >= 4


def test_the_command_reads_it(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(run[0]), f"out={tmp_path}"]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ranks"] == 4
    assert 0 < figures["exposed_ms"] <= figures["all_to_all_ms"] <= figures["span_ms"]
    assert any("default" in order["equals"] for order in figures["orders"])
    assert {hidden["all_to_all"] for hidden in figures["hidden"]} == {
        f"{name}({way})" for name in ("dispatch", "combine") for way in "FB"
    }
    assert (tmp_path / "timeline.png").exists() and (tmp_path / "trace.json.gz").exists()

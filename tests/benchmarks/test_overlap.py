"""The overlap benchmark: orders as literals, times worked out by hand, and bounds that can fail."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import overlap
from benchmarks.overlap import (
    DEEPSEEK,
    ORDERS,
    SHARED,
    Case,
    broken_bounds,
    cases,
    in_declared_order,
    layer_times,
    measure,
    summary,
)
from parallel.clock.contract import COMPUTE
from parallel.device import EXPERT

VIRTUAL = [case for case in cases() if not case.real]

ISSUED = {
    "published": "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)",
    "default": "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) attn(W)",
    "ready first": "combine(B) attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) attn(W)",
}
# A layer's combine(F) is waited for by the next layer's attn(F), the last one's by the output.
WAITED = (
    "combine(B) dispatch(F) dispatch(B) combine(F) combine(B) dispatch(F) dispatch(B) combine(F) "
    "combine(B) dispatch(F) dispatch(B) combine(F) combine(B) dispatch(F) dispatch(B) combine(F)"
)


@pytest.mark.parametrize("order", ISSUED)
def test_issue_and_wait_as_declared(order: str) -> None:
    case = Case("", order)
    record = measure(case)
    assert " ".join(record.issued) == " ".join([ISSUED[order]] * 4)
    assert " ".join(record.waited) == WAITED
    assert in_declared_order(case, record)
    assert not in_declared_order(case, replace(record, waited=record.waited[::-1]))
    assert not in_declared_order(Case("", "default" if order == "published" else "published"), record)


def test_issue_and_wait_one_after_the_other() -> None:
    record = measure(Case("", "serial", "MM", "M"))
    assert " ".join(record.issued) == (
        "attn(F) dispatch(F) mlp(F) combine(F) attn(F) dispatch(F) mlp(F) combine(F) "
        "combine(B) mlp(B) dispatch(B) mlp(W) attn(B) attn(W)"
    )
    assert " ".join(record.waited) == "dispatch(F) combine(F) dispatch(F) combine(F) combine(B) dispatch(B)"


def test_fewer_layers_forward_than_backward() -> None:
    record = measure(Case("", "default", "M", "MM"))
    assert " ".join(record.issued) == (
        "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) attn(W) "
        "combine(B) mlp(B) dispatch(B) mlp(W) attn(B) attn(W)"
    )
    # The output is waited for in the second round, behind combine(B), which is already on its way.
    assert " ".join(record.waited) == "combine(B) dispatch(F) dispatch(B) combine(F) combine(B) dispatch(B)"


def test_dense_layers_lack_the_transfers() -> None:
    record = measure(Case("", "published", "DM", "MD"))
    # Backward runs from the last layer: dense beside dense, then MoE beside MoE.
    assert " ".join(record.issued) == (
        "attn(F) dense(B) dense(W) dense(F) attn(B) attn(W) "
        "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)"
    )
    assert record.compute_busy == pytest.approx(2 * 31.3)


def test_the_shared_expert_runs_before_the_wait() -> None:
    record = measure(Case("", "default", "M", "M", shared=0.5))
    assert " ".join(record.issued) == (
        "combine(B) attn(F) shared(B) mlp(B) dispatch(F) dispatch(B) shared(W) mlp(W) shared(F) mlp(F) "
        "combine(F) attn(B) attn(W)"
    )
    lane = {interval.name: interval for interval in record.lane(COMPUTE)}
    moved = {interval.name: interval for interval in record.lane(EXPERT)}
    assert lane["shared(B)"].start < moved["combine(B)"].end <= lane["mlp(B)"].start
    assert record.compute_busy == pytest.approx(31.3)
    alone = {interval.name: interval for interval in measure(Case("", "serial", "M", "M", shared=0.5)).intervals}
    assert alone["shared(F)"].start < alone["dispatch(F)"].end <= alone["mlp(F)"].start


def test_one_layer_by_hand() -> None:
    record = measure(Case("", "published", "M", "M"))
    found = {
        interval.name: (interval.start, interval.end) for lane in (COMPUTE, EXPERT) for interval in record.lane(lane)
    }
    by_hand = {
        "combine(B)": (0, 5.8),
        "attn(F)": (0, 4.4),
        "mlp(B)": (5.8, 11.1),  # behind combine(B)
        "dispatch(F)": (5.8, 12.5),  # its rows are there at 4.4, its link is free at 5.8
        "mlp(W)": (11.1, 16.4),
        "dispatch(B)": (12.5, 20.0),
        "mlp(F)": (16.4, 21.0),
        "combine(F)": (21.0, 29.7),  # issued last, but ready at 21.0
        "attn(B)": (21.0, 30.3),
        "attn(W)": (30.3, 32.7),
    }
    assert found.keys() == by_hand.keys()
    for name, interval in by_hand.items():
        assert found[name] == pytest.approx(interval), name
    assert record.span == pytest.approx(32.7)


@pytest.mark.parametrize("case", VIRTUAL, ids=[f"{case.about}, {case.order}" for case in VIRTUAL])
def test_no_pair_is_shorter_than_its_compute_or_its_links(case: Case) -> None:
    record = measure(case)
    times = layer_times(links=case.links)
    compute = {"(F)": ("attn", "mlp"), "(B)": ("attn", "mlp")}
    assert record.span >= max(record.compute_busy, record.transfer_time) - 1e-9
    forward = len(case.forward) * sum(times[f"{name}(F)"] for name in compute["(F)"])
    backward = len(case.backward) * sum(times[f"{name}{kind}"] for name in compute["(B)"] for kind in ("(B)", "(W)"))
    assert record.compute_busy == pytest.approx(forward + backward)
    links = case.forward.count("M") * (times["dispatch(F)"] + times["combine(F)"])
    links += case.backward.count("M") * (times["combine(B)"] + times["dispatch(B)"])
    assert record.transfer_time == pytest.approx(links)
    if case.order != "serial":
        assert record.span < measure(replace(case, order="serial")).span


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wait_for_all", [False, True])
def test_a_slower_host_never_shortens_a_pair(order: str, wait_for_all: bool) -> None:
    steps = [0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 40.0]
    case = Case("", order, wait_for_all=wait_for_all)
    for slower in (
        [replace(case, launch_cost=cost) for cost in steps],
        [replace(case, counts_late=ms) for ms in steps],
    ):
        spans = [measure(case).span for case in slower]
        assert spans == sorted(spans) and spans[-1] > spans[0]


def test_links_longer_than_all_compute_are_never_idle() -> None:
    record = measure(Case("", "published", links=1.5))
    assert record.transfer_time > record.compute_busy
    assert record.span == pytest.approx(record.transfer_time)


def test_split_of_the_mlp_keeps_its_time() -> None:
    times = layer_times(SHARED, stretch=10)
    assert times["shared(F)"] + times["mlp(F)"] == pytest.approx(10 * DEEPSEEK["mlp(F)"]) == times["dense(F)"]
    assert times["mlp(W)"] == pytest.approx(8 * times["shared(W)"])


def test_published_order_and_its_control() -> None:
    published = measure(Case("", "published"))
    assert 125.2 - 1e-9 <= published.span <= 132.9
    assert published.exposed_share <= 0.037
    assert measure(Case("", "published", wait_for_all=True)).exposed_share > 0.40


GOOD = {
    "published_span_ms": 126.6,
    "published_share": 0.012,
    "control_share": 0.5,
    "exposed_share": 0.2,
    "ready_first_share": 0.05,
    "orders_as_declared": True,
}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("published_span_ms", 133.0, "published order, virtual clock: span 133.0 ms, allowed 125.2 to 132.9"),
        ("published_span_ms", 125.0, "published order, virtual clock: span 125.0 ms, allowed 125.2 to 132.9"),
        ("published_share", 0.038, "published order, virtual clock: 0.038 exposed, at most 0.037 allowed"),
        ("published_share", float("nan"), "published order, virtual clock: nan exposed, at most 0.037 allowed"),
        ("control_share", 0.40, "control: 0.400 exposed, must be above 0.4"),
        ("exposed_share", 0.26, "default order, real sleeps: 0.260 exposed, at most 0.25 allowed"),
        ("ready_first_share", 0.09, "ready-first order, real sleeps: 0.090 exposed, at most 0.08 allowed"),
        ("orders_as_declared", False, "a pair issued or waited in another order than declared"),
    ],
)
def test_a_broken_bound_is_named(key: str, value: float, said: str) -> None:
    assert broken_bounds(GOOD) == []
    assert broken_bounds({**GOOD, key: value}) == [said]


def test_the_published_bound_fails_where_transfers_wait_for_all_compute() -> None:
    """The control must not pass for the measurement, nor the measurement for the control."""
    exchange = {overlap.CONTROL: "on time", "on time": overlap.CONTROL}
    measured = [(case, measure(case, 0.1)) for case in cases()]
    exchanged = [(replace(case, about=exchange.get(case.about, case.about)), record) for case, record in measured]
    lines = "\n".join(broken_bounds(summary(exchanged)))
    assert "published order, virtual clock: span" in lines
    assert "published order, virtual clock: 0.5" in lines
    assert "control: 0.012" in lines


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "overlap.png"
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--stretch", "0.2", "--repeats", "1", "--image", str(image)])
    # Sleeps this short say nothing about overlap.
    monkeypatch.setattr(overlap, "DEFAULT_BOUND", float("inf"))
    monkeypatch.setattr(overlap, "READY_BOUND", float("inf"))
    assert overlap.main() == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert found["bounds_hold"] and found["orders_as_declared"]
    assert {"exposed_share", "serial_share"} <= found.keys()
    assert len(found["rows"]) == len(cases())
    assert image.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(overlap, "PUBLISHED_BOUND", 0.01)
    assert overlap.main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert "bound broken: published order, virtual clock: 0.012 exposed, at most 0.01 allowed" in printed
    assert not json.loads(printed[-1])["bounds_hold"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--repeats", "0"], 64, "--repeats must be at least 1"),
        (["--stretch", "0"], 64, "--stretch above 0"),
        (["--image", "overlap.jpg"], 64, "must end in .png"),
    ],
)
def test_bad_usage(
    arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["overlap.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        overlap.main()
    assert ended.value.code == code and said in capsys.readouterr().err

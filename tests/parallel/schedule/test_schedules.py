"""What is known of every schedule: legal at all sizes, bubbles, peaks, and how they relate to one another."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from parallel.schedule.actions import Compute, Op, Pair, Payload, Post, Table, flatten
from parallel.schedule.boundary import boundary_of, parts, produced, stays
from parallel.schedule.checker import Report, check
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.dualpipev import dualpipev
from parallel.schedule.registry import SCHEDULES, build, stages_per_rank
from parallel.schedule.simulator import Costs, simulate
from parallel.schedule.transfers import forward_only
from parallel.schedule.variants import with_split, without_split

SIZES = (2, 4, 6, 8, 16)
ONE_DIRECTION = [name for name in SCHEDULES if name != "dualpipe"]
PAIRED = ("dualpipe", "dualpipev")


def words(table: Table, rank: int) -> list[str]:
    """A rank's compute actions as `F0.3` or `F0.3&B7.1` (stage.chunk)."""
    return [
        "&".join(f"{part.op}{part.stage}.{part.chunk}" for part in parts(action))
        for action in table.actions[rank]
        if not isinstance(action, Post)
    ]


def legal(name: str, ranks: int, micro_batches: int, held: int | None = None) -> Report:
    """Checks the table (both transports), that transfers delay nothing, and its chunks; returns the report."""
    table = build(name, ranks, micro_batches, held)
    report = check(table)
    assert (table.ranks, table.stages) == (ranks, ranks * stages_per_rank(name, held))
    assert sum(table.chunks(direction) for direction in range(table.directions)) == micro_batches
    return report


def most_chunks(name: str, ranks: int, micro_batches: int, rank: int) -> int:
    """Published peak of live chunks (of one stage each) where the pipeline can fill."""
    largest_group = -(-micro_batches // max(1, micro_batches // ranks))
    return {
        "gpipe": micro_batches,
        "1f1b": min(ranks - rank, micro_batches),
        "interleaved": min(largest_group + 2 * (ranks - 1 - rank) + 1, 2 * micro_batches),
        "zb1p": min(ranks, micro_batches),
        "zbv": 2 * ranks,
        "dualpipev": 2 * ranks + 1,
        "dualpipe": ranks + 1,
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", SIZES)
def test_every_size_is_legal(name: str, ranks: int) -> None:
    """Every even number of micro-batches to 8P up to 4 ranks, a choice of them above (the rest is marked slow)."""
    some = {4: range(2, 33, 2), 16: (2, 14, 16, 30, 32, 50)}.get(ranks) or (
        2, 4, ranks, ranks + 2, 2 * ranks - 2, 2 * ranks, 2 * ranks + 2, 3 * ranks + 4, 8 * ranks
    )  # fmt: skip
    for micro_batches in some:
        report = legal(name, ranks, micro_batches)
        for rank, peak in enumerate(report.peak_chunks):
            assert peak <= most_chunks(name, ranks, micro_batches, rank), (micro_batches, rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_legal_in_full(name: str) -> None:
    for ranks in SIZES:
        for micro_batches in range(2, 8 * ranks + 1, 2):
            report = legal(name, ranks, micro_batches)
            for rank, peak in enumerate(report.peak_chunks):
                assert peak <= most_chunks(name, ranks, micro_batches, rank), (ranks, micro_batches, rank)


@pytest.mark.parametrize("name", ONE_DIRECTION)
def test_one_rank_and_odd_numbers(name: str) -> None:
    """A pipeline of one rank sends nothing; one direction needs no even number of anything."""
    for micro_batches in (1, 2, 3, 4, 7):
        table = build(name, 1, micro_batches)
        check(table)
        assert not any(isinstance(action, Post) for action in table.actions[0])
        assert simulate(table).bubble(0) == 0
        for ranks in (2, 3, 5):
            legal(name, ranks, micro_batches)


@pytest.mark.parametrize("held", [2, 3, 4])
def test_interleaved_with_more_stages(held: int) -> None:
    """Bubble (P-1)(F+B)/v: P-1 forwards and backwards of a stage, whatever v is, with uneven groups too."""
    for ranks in (1, 2, 4, 8):
        for micro_batches in (ranks, ranks + 1, 2 * ranks, 2 * ranks + 1, 3 * ranks - 1, 3 * ranks):
            table = build("interleaved", ranks, micro_batches, held)
            report, run = check(table), simulate(table)
            assert [run.bubble(rank) for rank in range(ranks)] == [3 * (ranks - 1)] * ranks
            group = -(-micro_batches // (micro_batches // ranks))
            most = [(held - 1) * group + 2 * (ranks - 1 - rank) + 1 for rank in range(ranks)]
            assert list(report.peak_chunks) == [min(peak, held * micro_batches) for peak in most]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", SIZES)
def test_bubbles_and_peaks_at_unit_costs(name: str, ranks: int) -> None:
    """On every rank, in forwards of one stage: for V and interleaved schedules that is half of a rank's layers."""
    bubble = {
        "gpipe": 3 * (ranks - 1),
        "1f1b": 3 * (ranks - 1),
        "interleaved": 3 * (ranks - 1),
        "zb1p": ranks - 1,
        "zbv": ranks - 1,
        "dualpipev": 2 * ranks - 2,
        "dualpipe": ranks - 2,
    }[name]
    for micro_batches in (2 * ranks, 4 * ranks) if ranks <= 8 else (2 * ranks,):
        table = build(name, ranks, micro_batches)
        report, run = check(table), simulate(table)
        assert [run.bubble(rank) for rank in range(ranks)] == [bubble] * ranks
        assert list(report.peak_chunks) == [most_chunks(name, ranks, micro_batches, rank) for rank in range(ranks)]
        assert all((share > 0) == (name in PAIRED) for share in report.overlap_share)


@pytest.mark.parametrize("ranks", SIZES)
def test_zbv_has_no_bubble_between_a_rank_s_first_and_last_action(ranks: int) -> None:
    for row in simulate(build("zbv", ranks, 2 * ranks + 4), Costs(backward=2, weight_grad=1)).timed:
        assert all(before.end == after.start for before, after in pairwise(row))


@pytest.mark.parametrize(("forward", "backward", "weight"), [(1, 2, 1), (2, 4, 2), (1, 1.8, 0.8), (2, 3, 1), (3, 5, 2)])
def test_zb1p_bubble_formula(forward: float, backward: float, weight: float) -> None:
    """(P-1)(F+B-2W), B being I and W together; exact where I = F and I >= W."""
    costs = Costs(forward, backward, backward - weight, weight)
    run = simulate(build("zb1p", 8, 24), costs)
    assert max(run.bubble(rank) for rank in range(8)) == pytest.approx(7 * (forward + backward - 2 * weight))


GRID = [
    (1, 2, 1),
    (1, 1.8, 0.8),
    (2, 3, 1),
    (3, 5, 2),  # B-W = F and B >= 2W: exact
    (1, 2.2, 1),
    (1, 2.5, 1),
    (1, 3, 1),
    (2, 5, 2),  # B-W > F: the formula is too high
    (1, 1.5, 1),
    (1, 1.9, 1),
    (2, 3.5, 2),
    (1, 2.2, 1.2),  # B < 2W: too low
]


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("saved", [0, 0.5])
@pytest.mark.parametrize(("forward", "backward", "weight"), GRID)
def test_dualpipe_bubble_formula_and_its_exact_regime(
    forward: float, backward: float, weight: float, saved: float, ranks: int
) -> None:
    """(P/2-1)(F&B + B - 3W) is the most idle rank's bubble if and only if B-W = F and B >= 2W."""
    pair = forward + backward - saved
    costs = Costs(forward, backward, backward - weight, weight, pair)
    formula = (ranks / 2 - 1) * (pair + backward - 3 * weight)
    one = simulate(dualpipe(ranks, 3 * ranks), costs)
    found = max(one.bubble(rank) for rank in range(ranks))
    if backward < 2 * weight:
        assert found > formula + 1e-9
    elif backward - weight == pytest.approx(forward):
        assert found == pytest.approx(formula)
        if saved:
            assert one.bubble(0) <= found - 0.5 * (ranks > 4)
            assert found == pytest.approx(one.bubble(ranks // 2))
    else:
        assert found < formula - 1e-9
    half = simulate(dualpipev(ranks // 2, 3 * ranks // 2), costs)
    assert max(half.bubble(rank) for rank in range(ranks // 2)) == pytest.approx(found)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_dualpipev_is_the_first_half_of_dualpipe(ranks: int) -> None:
    """DualPipe over 2P ranks with 2M micro-batches, directions 0 and 1 read as the way down and the way up."""
    for micro_batches in (1, 2, 2 * ranks - 1, 2 * ranks, 2 * ranks + 2, 3 * ranks + 1):
        half, whole = dualpipev(ranks, micro_batches), dualpipe(2 * ranks, 2 * micro_batches)
        for rank in range(ranks):
            assert words(half, rank) == words(whole, rank)


def test_dualpipev_golden_lists() -> None:
    assert words(dualpipev(1, 2), 0) == "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 B1.1 I0.1 W0.1".split()
    assert (
        words(dualpipev(4, 10), 3)
        == (
            "F3.0 F4.0 F3.1 F4.1 F3.2 F4.2 F3.3 F4.3 F3.4 B4.0 F4.4&B3.0 F3.5&B4.1 F4.5&B3.1 F3.6&B4.2 F4.6&B3.2 "
            "F3.7&B4.3 F4.7&B3.3 F3.8&B4.4 F4.8&B3.4 F3.9&B4.5 F4.9&B3.5 B4.6 B3.6 B4.7 B3.7 I4.8 I3.8 I4.9 I3.9 "
            "W4.8 W3.8 W4.9 W3.9"
        ).split()
    )


def test_other_golden_lists() -> None:
    assert words(build("zb1p", 3, 3), 0) == "F0.0 F0.1 F0.2 I0.0 W0.0 I0.1 W0.1 I0.2 W0.2".split()
    assert words(build("zb1p", 3, 3), 2) == "F2.0 I2.0 F2.1 I2.1 F2.2 I2.2 W2.0 W2.1 W2.2".split()
    assert (
        words(build("zbv", 2, 3), 1)
        == ("F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1 W2.1 I1.1 I2.2 I1.2 W1.1 W2.2 W1.2").split()
    )
    assert words(build("interleaved", 2, 2), 0) == "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1".split()
    assert words(build("interleaved", 2, 2), 1) == "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1".split()


@pytest.mark.parametrize("name", SCHEDULES)
def test_short_rule(name: str) -> None:
    """Below the size at which the pipeline fills: shorter than the filled one, longer with every micro-batch."""
    spans = [simulate(build(name, 8, micro_batches)).makespan for micro_batches in range(2, 34, 2)]
    assert spans == sorted(set(spans))
    slowest = [simulate(build("1f1b", 8, m)).makespan for m in range(2, 34, 2)]
    held = stages_per_rank(name)
    assert all(span / held <= slow for span, slow in zip(spans, slowest, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_and_split_variants(name: str, ranks: int) -> None:
    for micro_batches in (2, 2 * ranks, 3 * ranks):
        table = build(name, ranks, micro_batches)
        whole, split = without_split(table), with_split(table)
        check(whole), check(split)
        again = without_split(split)
        assert {c.op for row in whole.actions for c in flatten(row)} == {Op.F, Op.B}
        for rank in range(ranks):
            assert words(again, rank) == words(whole, rank)
            single = [a.op for a in split.actions[rank] if isinstance(a, Compute)]
            assert Op.B not in single and single.count(Op.I) == single.count(Op.W)
            pairs = [a for a in table.actions[rank] if isinstance(a, Pair)]
            assert [a for a in split.actions[rank] if isinstance(a, Pair)] == pairs
            assert [a for a in whole.actions[rank] if isinstance(a, Pair)] == pairs
        assert words(forward_only(whole), 0) == words(forward_only(table), 0)


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_s_gradients_are_posted_before_everything_else(name: str) -> None:
    """A batch of gradients alone, directly behind the pair; the activation travels in the next one."""
    table = build(name, 4, 16)
    sent = 0
    for row in table.actions:
        for before, post in pairwise(row):
            if not (isinstance(before, Pair) and isinstance(post, Post)):
                continue
            handed = produced(before.backward, table.stages)
            if handed is None or stays(handed, table):
                continue
            assert [boundary_of(t) for t in post.transfers if t.send] == [handed]
            assert {t.payload for t in post.transfers} == {Payload.GRADIENT}
            sent += 1
    pairs = sum(isinstance(action, Pair) for row in table.actions for action in row)
    assert sent > 0.7 * pairs


def test_all_to_all_is_hidden_in_pairs_only() -> None:
    costs = Costs(all_to_all_forward=1.5, all_to_all_backward=0.5)
    f, b = Compute(Op.F, 0, 0, 1), Compute(Op.B, 0, 0, 0)
    i, w = replace(b, op=Op.I), replace(b, op=Op.W)
    assert [costs.of(action) for action in (f, b, i, w)] == [2.5, 2.5, 1.5, 1]
    assert costs.of(Pair(f, b)) == pytest.approx(3 + 0.037 * 2)
    assert replace(costs, exposed_share=1.0).of(Pair(f, b)) == 5
    half = costs.divided(2)
    assert [half.of(action) for action in (f, b, i, w)] == [1.25, 1.25, 0.75, 0.5]
    spans = {name: simulate(build(name, 4, 32), costs).makespan for name in ("1f1b", "dualpipe")}
    assert spans["dualpipe"] < 0.8 * spans["1f1b"]


def test_stages_per_rank() -> None:
    assert [stages_per_rank(name) for name in ("dualpipe", "1f1b", "zbv", "dualpipev", "interleaved")] == [
        1,
        1,
        2,
        2,
        2,
    ]
    assert build("interleaved", 2, 4).stages == 4 and build("interleaved", 2, 4, 3).stages == 6
    with pytest.raises(ValueError, match=r"zbv: stages_per_rank=2: must not be given, the schedule fixes it at 2"):
        build("zbv", 4, 8, 2)
    with pytest.raises(ValueError, match="interleaved: stages_per_rank=1: must be at least 2"):
        stages_per_rank("interleaved", 1)
    with pytest.raises(ValueError, match="schedule=zb: unknown"):
        stages_per_rank("zb")
    for name in ONE_DIRECTION:
        with pytest.raises(ValueError, match=f"{name}: ranks=0: must be at least 1"):
            build(name, 0, 2)
        with pytest.raises(ValueError, match=f"{name}: micro_batches=0: must be at least 1"):
            build(name, 2, 0)

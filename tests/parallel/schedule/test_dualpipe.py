"""DualPipe against a second formulation of DeepSeek's loop, and the figures known of it."""

from __future__ import annotations

from itertools import count

import pytest

from parallel.schedule.actions import Compute, Pair, Post, Table, flatten
from parallel.schedule.boundary import parts
from parallel.schedule.checker import check
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.simulator import Costs, simulate

SIZES = (2, 4, 6, 8, 16)


def words(table: Table, rank: int) -> list[str]:
    """A rank's compute actions as `F0.3` or `F0.3&B1.1` (direction.chunk)."""
    return [
        "&".join(f"{part.op}{part.direction}.{part.chunk}" for part in parts(action))
        for action in table.actions[rank]
        if not isinstance(action, Post)
    ]


def published(ranks: int, micro_batches: int, rank: int) -> list[str]:
    """DeepSeek's eight steps as text with phases, then phases turned into directions and chunks counted."""
    half_chunks, half_ranks = micro_batches // 2, ranks // 2
    second_half = rank >= half_ranks
    half_rank = min(rank, ranks - 1 - rank)
    outer = half_ranks - half_rank - 1
    text = ["F0"] * (2 * outer)
    text += ["F0", "F1"] * (half_rank + 1)
    text += ["I1", "W", "F1"] * outer
    for i in range(half_chunks - ranks + half_rank + 1):
        text += ["F0", "B1"] if i == 0 and outer == 0 else ["F0&B1"]
        text += ["F1&B0"]
    text += ["B1", "F1&B0"] * outer
    zero_bubble = False
    for i in range(half_rank + 1):
        if i == (half_rank + 1) // 2 and half_rank % 2 == 1:
            zero_bubble = True
        text.append("I1" if zero_bubble else "B1")
        if i == (half_rank + 1) // 2 and half_rank % 2 == 0:
            zero_bubble = True
        text.append("I0" if zero_bubble else "B0")
    text += ["W", "I0"] * outer
    text += ["W"] * (half_rank + 1)

    forwards, backwards, queue, out = (count(), count()), (count(), count()), [], []
    for word in text:
        named = []
        for letter in word.split("&"):
            if letter == "W":
                named.append("W" + queue.pop(0))
                continue
            phase = int(letter[1]) ^ second_half
            chunk = next((forwards if letter[0] == "F" else backwards)[phase])
            if letter[0] == "I":
                queue.append(f"{phase}.{chunk}")
            named.append(f"{letter[0]}{phase}.{chunk}")
        out.append("&".join(named))
    return out


@pytest.mark.parametrize("ranks", SIZES)
def test_the_order_is_the_published_one(ranks: int) -> None:
    for micro_batches in range(2 * ranks - 2, 4 * ranks + 1, 2):
        table = dualpipe(ranks, micro_batches)
        for rank in range(ranks):
            assert words(table, rank) == published(ranks, micro_batches, rank), (micro_batches, rank)


def test_golden_list() -> None:
    assert words(dualpipe(2, 4), 0) == "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 B1.1 I0.1 W0.1".split()
    assert [str(action) for action in dualpipe(2, 4).actions[1]] == [
        "F1.0@0",
        "[a0.0@1<-0 a1.0@1->0]",
        "F0.0@1",
        "F1.1@0",
        "[a0.1@1<-0 a1.1@1->0]",
        "B0.0@1",
        "[g0.0@0->0 g1.0@0<-0]",
        "F0.1@1&B1.0@0",
        "B0.1@1",
        "[g0.1@0->0 g1.1@0<-0]",
        "I1.1@0",
        "W1.1@0",
    ]


@pytest.mark.parametrize("ranks", SIZES)
def test_every_even_number_of_micro_batches_is_legal(ranks: int) -> None:
    """Checked in both modes; peaks, queues and bubble as known where the pipeline can fill (a choice at 16 ranks)."""
    for micro_batches in range(2, 4 * ranks + 1, 2 if ranks <= 8 else 10):
        table = dualpipe(ranks, micro_batches)
        report = check(table)
        assert table.chunks(0) == table.chunks(1) == micro_batches // 2
        assert max(report.peak_chunks) <= ranks + 1
        if micro_batches >= 2 * ranks:
            depths = tuple(min(rank, ranks - 1 - rank) + 1 for rank in range(ranks))
            assert report.peak_chunks == (ranks + 1,) * ranks
            assert report.queue_depth == depths
            run = simulate(table)
            assert [run.bubble(rank) for rank in range(ranks)] == [ranks - 2] * ranks


def test_transfers_cost_no_time_in_either_mode() -> None:
    """The batches delay nothing: with free transfers the makespan is that of the dependencies alone."""
    for ranks in (2, 4, 8):
        for micro_batches in (2, ranks, 2 * ranks - 2, 2 * ranks, 3 * ranks):
            table = dualpipe(ranks, micro_batches)
            alone = simulate(table, mode="dependencies").makespan
            assert simulate(table, mode="gloo").makespan == simulate(table, mode="nccl").makespan == alone


def test_figure_of_the_report() -> None:
    """P=8, M=20 at (F, B, W, F&B) = (1, 2, 1, 3)."""
    run = simulate(dualpipe(8, 20))
    assert run.makespan == 66
    assert [run.bubble(rank) for rank in range(8)] == [6] * 8


@pytest.mark.parametrize(("costs", "bubble"), [((1, 1.8, 0.8, 2.8), 6.6), ((2, 3, 1, 5), 15)])
def test_bubble_formula_in_its_exact_regime(costs: tuple[float, float, float, float], bubble: float) -> None:
    """(P/2-1)(F&B + B - 3W), exact where B-W = F and B >= 2W."""
    forward, backward, weight, pair = costs
    assert 3 * (pair + backward - 3 * weight) == pytest.approx(bubble)
    run = simulate(dualpipe(8, 20), Costs(forward, backward, backward - weight, weight, pair))
    assert max(run.bubble(rank) for rank in range(8)) == pytest.approx(bubble)


@pytest.mark.parametrize(("factor", "low", "high"), [(2, 28, 47), (4, 64, 73), (8, 82, 87)])
def test_overlap_share(factor: int, low: int, high: int) -> None:
    shares = check(dualpipe(16, factor * 16)).overlap_share
    assert (round(100 * min(shares)), round(100 * max(shares))) == (low, high)


@pytest.mark.parametrize("ranks", SIZES)
def test_mirror_rule(ranks: int) -> None:
    """Rank P-1-r does what rank r does with the directions exchanged, sends and receives included."""
    for micro_batches in (2, 2 * ranks - 2, 2 * ranks, 2 * ranks + 6):
        table = dualpipe(ranks, micro_batches)
        for rank in range(ranks):
            assert words(table, ranks - 1 - rank) == [_flip(word) for word in words(table, rank)]
            assert _posts(table, ranks - 1 - rank, flip=True) == _posts(table, rank, flip=False)


def _flip(word: str) -> str:
    return "&".join(f"{half[0]}{1 - int(half[1])}{half[2:]}" for half in word.split("&"))


def _posts(table: Table, rank: int, flip: bool) -> list[set[tuple[object, ...]]]:
    """Each batch as a set: equal stamps may stand in another order on the mirror."""
    return [
        {
            (
                t.send,
                t.payload,
                1 - t.direction if flip else t.direction,
                t.stage,
                t.chunk,
                table.ranks - 1 - t.peer if flip else t.peer,
            )
            for t in action.transfers
        }
        for action in table.actions[rank]
        if isinstance(action, Post)
    ]


def test_short_rule_keeps_the_last_chunks_of_the_full_table() -> None:
    full, short = dualpipe(8, 14), dualpipe(8, 6)
    for rank in range(8):
        kept = [(c.op, c.direction, c.chunk - 4) for c in flatten(full.actions[rank]) if c.chunk >= 4]
        assert [(c.op, c.direction, c.chunk) for c in flatten(short.actions[rank])] == kept
    spans = [simulate(dualpipe(16, m)).makespan for m in range(2, 34, 2)]
    assert spans == sorted(spans)
    assert spans[11] == 92  # V3's first batch: 24 micro-batches over 16 ranks


def test_receive_hides_behind_the_weight_gradient() -> None:
    """Step 3 on rank 0: the next activation of direction 1 is posted before W runs."""
    row = [str(action) for action in dualpipe(8, 20).actions[0]]
    where = row.index("W1.0@7")
    receive = next(i for i, action in enumerate(row) if "a1.1@7<-1" in action)
    assert row.index("I1.0@7") < receive < where < row.index("F1.1@7")


@pytest.mark.parametrize("ranks", SIZES)
def test_pairs_join_a_forward_and_a_full_backward_of_two_directions(ranks: int) -> None:
    for row in dualpipe(ranks, 3 * ranks).actions:
        for action in row:
            if isinstance(action, Pair):
                assert (action.forward.op, action.backward.op) == ("F", "B")
                assert action.forward.direction != action.backward.direction


def test_stage_placement() -> None:
    table = dualpipe(6, 12)
    assert [table.stages_of(rank) for rank in (0, 2, 5)] == [
        [(0, 0), (1, 5)],
        [(0, 2), (1, 3)],
        [(0, 5), (1, 0)],
    ]
    assert all(isinstance(c, Compute) and table.rank_of[c.direction][c.stage] == 2 for c in flatten(table.actions[2]))


@pytest.mark.parametrize(("stages", "micro_batches"), [(3, 6), (0, 4), (-2, 4), (4, 0), (4, 7), (4, -2)])
def test_illegal_sizes_are_named(stages: int, micro_batches: int) -> None:
    wrong = f"ranks={stages}" if stages % 2 or stages < 2 else f"micro_batches={micro_batches}"
    with pytest.raises(ValueError, match=f"dualpipe: {wrong}: must be an even number of at least 2"):
        dualpipe(stages, micro_batches)

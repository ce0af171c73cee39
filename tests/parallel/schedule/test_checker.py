"""Mutated tables are refused, each for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from parallel.schedule.actions import Action, Compute, Op, Pair, Payload, Post, Table, Transfer
from parallel.schedule.boundary import parts
from parallel.schedule.checker import Reason, ScheduleError, check
from parallel.schedule.dualpipe import dualpipe
from parallel.schedule.one_f_one_b import one_f_one_b
from parallel.schedule.registry import SCHEDULES, build
from parallel.schedule.simulator import Deadlock, simulate
from parallel.schedule.transfers import forward_only, with_transfers

Row = list[Action]


def mutate(table: Table, rank: int, change: Callable[[Row], Row | None]) -> Table:
    """`table` with rank's list changed in place (or replaced by what `change` returns)."""
    rows = list(table.actions)
    row = list(rows[rank])
    rows[rank] = tuple(change(row) or row)
    return replace(table, actions=tuple(rows))


def place(row: Row, text: str) -> int:
    return next(i for i, action in enumerate(row) if text in str(action))


def refused(table: Table, reason: Reason) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        check(table)
    assert caught.value.reason is reason, caught.value
    return caught.value


@pytest.mark.parametrize("text", ["F0.1@0", "B1.0@1", "I0.3@0", "W0.3@0"])
def test_dropped_action(text: str) -> None:
    error = refused(mutate(dualpipe(2, 8), 0, lambda row: row.pop(place(row, text)) and None), Reason.MISSING)
    assert error.rank == 0
    assert str(error.action)[1:] == text[1:]


def test_swapped_input_and_weight_gradient() -> None:
    def swap(row: Row) -> None:
        i, w = row.index(Compute(Op.I, 0, 0, 3)), row.index(Compute(Op.W, 0, 0, 3))
        row[i], row[w] = row[w], row[i]

    error = refused(mutate(dualpipe(2, 8), 0, swap), Reason.QUEUE)
    assert (error.rank, str(error.action)) == (0, "W0.3@0")


def test_weight_gradients_out_of_turn() -> None:
    def swap(row: Row) -> None:
        row[-1], row[-2] = row[-2], row[-1]

    refused(mutate(dualpipe(8, 20), 3, swap), Reason.QUEUE)


def late_send(row: Row) -> Row:
    """The first send that has a later one to the same peer goes behind that one, in its batch."""
    sends = [t for action in row if isinstance(action, Post) for t in action.transfers if t.send]
    first, second = next((a, b) for i, a in enumerate(sends) for b in sends[i + 1 :] if a.peer == b.peer)
    out: Row = []
    for action in row:
        if isinstance(action, Post):
            kept = tuple(t for t in action.transfers if t != first)
            action = Post((*kept, first) if second in kept else kept)
        if action != Post(()):
            out.append(action)
    return out


@pytest.mark.parametrize("name", SCHEDULES)
def test_crossed_sends(name: str) -> None:
    for rank in range(3):
        assert refused(mutate(build(name, 4, 8), rank, late_send), Reason.CROSSED).rank == rank


def test_crossed_sends_pass_by_name_but_not_by_order() -> None:
    table = mutate(dualpipe(4, 8), 1, late_send)
    simulate(table, mode="gloo")
    assert refused(table, Reason.CROSSED).rank == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_dropped_action_of_every_schedule(name: str) -> None:
    """Whatever action is left out, the checker names the first chunk that lacks it."""
    table = build(name, 2, 4)
    for rank, row in enumerate(table.actions):
        for index, action in enumerate(row):
            if isinstance(action, Post):
                refused(mutate(table, rank, lambda row, i=index: row[:i] + row[i + 1 :]), Reason.UNMATCHED)
                continue
            error = refused(mutate(table, rank, lambda row, i=index: row[:i] + row[i + 1 :]), Reason.MISSING)
            assert error.rank == rank and isinstance(error.action, Compute)
            names = [(lost.direction, lost.stage, lost.chunk) for lost in parts(action)]
            assert (error.action.direction, error.action.stage, error.action.chunk) in names


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("gpipe", "1f1b", "interleaved")])
def test_swapped_input_and_weight_gradient_of_every_schedule(name: str) -> None:
    table = build(name, 4, 8)
    for rank, row in enumerate(table.actions):
        split = next(a for a in reversed(row) if isinstance(a, Compute) and a.op is Op.I)

        def swap(row: Row, i: Compute = split) -> None:
            here, there = row.index(i), row.index(replace(i, op=Op.W))
            row[here], row[there] = row[there], row[here]

        assert refused(mutate(table, rank, swap), Reason.QUEUE).rank == rank


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_receive_posted_ahead_of_every_schedule(name: str, ranks: int) -> None:
    """Rank 0 posts all receives up to its first gradient before anything else: its first send never leaves."""

    def hoist(row: Row) -> Row:
        receives = [t for action in row if isinstance(action, Post) for t in action.transfers if not t.send]
        first = next(i for i, t in enumerate(receives) if t.payload is Payload.GRADIENT)
        ahead = receives[: first + 1]
        rest = [Post(tuple(t for t in a.transfers if t not in ahead)) if isinstance(a, Post) else a for a in row]
        return [Post(tuple(ahead)), *(action for action in rest if action != Post(()))]

    table = mutate(build(name, ranks, 2 * ranks), 0, hoist)
    simulate(table, mode="gloo")
    refused(table, Reason.DEADLOCK_NCCL)


def test_receive_posted_ahead_blocks_nccl_only() -> None:
    """Rank 0 posts the receive of its first gradient before its first send: the send stays behind it for ever."""

    def hoist(row: Row) -> Row:
        gradient = Transfer(False, Payload.GRADIENT, 0, 0, 0, 1)
        rest = [
            Post(tuple(t for t in action.transfers if t != gradient)) if isinstance(action, Post) else action
            for action in row
        ]
        return [Post((gradient,)), *(action for action in rest if action != Post(()))]

    table = mutate(one_f_one_b(2, 4), 0, hoist)
    simulate(table, mode="gloo")
    error = refused(table, Reason.DEADLOCK_NCCL)
    assert error.rank == 0
    assert "[g0.0@0<-1]" in str(error)


def test_circular_wait_blocks_both_modes() -> None:
    """Rank 0 wants its first gradient before it makes the second activation; rank 1 wants both activations first."""
    f, b = (lambda s, c: Compute(Op.F, 0, s, c)), (lambda s, c: Compute(Op.B, 0, s, c))
    a = lambda send, c: Post((Transfer(send, Payload.ACTIVATION, 0, 1, c, 1 if send else 0),))  # noqa: E731
    g = lambda send, c: Post((Transfer(send, Payload.GRADIENT, 0, 0, c, 0 if send else 1),))  # noqa: E731
    zero = (f(0, 0), a(True, 0), g(False, 0), b(0, 0), f(0, 1), a(True, 1), g(False, 1), b(0, 1))
    one = (a(False, 0), f(1, 0), a(False, 1), f(1, 1), b(1, 0), g(True, 0), b(1, 1), g(True, 1))
    error = refused(Table("circular", 2, 2, 2, ((0, 1),), (zero, one)), Reason.DEADLOCK_GLOO)
    assert "rank 0 at B0.0@0, rank 1 at F0.1@1" in str(error)
    computes = [[x for x in row if not isinstance(x, Post)] for row in (zero, one)]
    with pytest.raises(Deadlock):
        with_transfers("circular", 2, ((0, 1),), computes)


def test_other_refusals() -> None:
    table = dualpipe(4, 8)

    def repeat(row: Row) -> None:
        row.append(row[place(row, "F0.0")])

    refused(mutate(table, 0, repeat), Reason.REPEATED)
    refused(mutate(table, 0, lambda row: row.insert(0, Compute(Op.F, 0, 2, 0))), Reason.PLACEMENT)
    refused(mutate(table, 0, lambda row: row.append(Compute(Op.I, 0, 0, 0))), Reason.REPEATED)
    refused(mutate(table, 0, lambda row: row.pop(place(row, "[")) and None), Reason.UNMATCHED)
    refused(mutate(table, 0, lambda row: row.insert(0, row.pop(place(row, "I1")))), Reason.ORDER)
    refused(mutate(table, 0, lambda row: row.insert(0, row.pop(place(row, "->")))), Reason.SEND_EARLY)
    refused(mutate(table, 0, lambda row: row.append(row.pop(place(row, "<-")))), Reason.RECEIVE_LATE)
    refused(replace(table, micro_batches=10), Reason.SHAPE)
    refused(replace(table, actions=table.actions[:3]), Reason.SHAPE)

    def never(row: Row) -> Row:
        kept = [
            Post(tuple(t for t in action.transfers if str(t)[:6] != "a0.3@1")) if isinstance(action, Post) else action
            for action in row
        ]
        return [action for action in kept if action != Post(())]

    assert refused(mutate(mutate(table, 0, never), 1, never), Reason.UNMATCHED).rank == 1

    def wrong_peer(row: Row) -> None:
        i = place(row, "->1")
        post = row[i]
        assert isinstance(post, Post)
        row[i] = Post(tuple(replace(t, peer=2) if t.send else t for t in post.transfers))

    refused(mutate(table, 0, wrong_peer), Reason.PEER)

    def pair_of_one_chunk(row: Row) -> None:
        i = next(i for i, action in enumerate(row) if isinstance(action, Pair))
        pair = row[i]
        assert isinstance(pair, Pair)
        row[i] = Pair(pair.forward, replace(pair.forward, op=Op.B))

    refused(mutate(table, 0, pair_of_one_chunk), Reason.PAIR)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_only(name: str) -> None:
    for ranks, micro_batches in ((2, 2), (4, 6), (4, 10)):
        table = forward_only(build(name, ranks, micro_batches))
        report = check(table, forward_only=True)
        assert report.peak_chunks == (1,) * ranks
        span = {mode: simulate(table, mode=mode).makespan for mode in ("dependencies", "gloo", "nccl")}
        assert len(set(span.values())) == 1
        refused(table, Reason.MISSING)
        with pytest.raises(ScheduleError):
            check(build(name, ranks, micro_batches), forward_only=True)

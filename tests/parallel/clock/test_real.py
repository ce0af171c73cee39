"""Real sleeps: the host is held by compute and by waits, not by transfers."""

from __future__ import annotations

from itertools import pairwise

from parallel.clock.contract import COMPUTE, HOST
from parallel.clock.real import RealClock
from parallel.device import EXPERT


def test_transfers_run_one_after_another_beside_compute() -> None:
    with RealClock(counts_late=10) as clock:
        clock.transfer("free", 1000, []).wait()  # before the start
        clock.start()
        first = clock.transfer("x", 60, [])
        second = clock.transfer("y", 60, [])
        assert not second.is_completed()
        clock.compute("a", 10)
        first.wait()
        clock.counts([]).block()  # behind y, and 10 ms late
        assert second.is_completed()
        second.wait()
        record = clock.record()
    x, y = record.lane(EXPERT)
    (a,) = record.lane(COMPUTE)
    waits = {interval.name: interval for interval in record.lane(HOST)}
    assert (x.name, y.name, a.name) == ("x", "y", "a")
    assert x.end - x.start >= 60 and y.end - y.start >= 60 and y.start >= x.end
    assert a.start < x.end  # issuing two transfers held the host for neither
    assert waits["wait for x"].end >= x.end
    assert waits["counts"].end >= y.end + 10
    assert record.issued == ("x", "y", "a") and record.waited == ("x", "y")
    assert record.span >= 130
    assert all(before.end <= after.start for before, after in pairwise(record.lane(EXPERT)))

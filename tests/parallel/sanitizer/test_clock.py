"""Vector clocks of streams and host."""

from __future__ import annotations

from parallel.sanitizer.clock import HOST, Clocks


def test_order_comes_from_events_alone() -> None:
    clocks = Clocks()
    a, b = clocks.stream("a"), clocks.stream("b")
    first = clocks.launch(a)
    event = clocks.record(a)
    second = clocks.launch(a)
    assert clocks.before(a, first, a) and not clocks.before(a, first, b)
    clocks.wait(b, event)
    assert clocks.before(a, first, b) and not clocks.before(a, second, b)


def test_order_is_transitive() -> None:
    clocks = Clocks()
    a, b, c = (clocks.stream(name) for name in "abc")
    tick = clocks.launch(a)
    clocks.wait(b, clocks.record(a))
    assert not clocks.before(a, tick, c)
    clocks.wait(c, clocks.record(b))
    assert clocks.before(a, tick, c) and not clocks.before(b, clocks.launch(b), c)


def test_what_the_host_has_seen_comes_before_all_it_issues() -> None:
    clocks = Clocks()
    a, b = clocks.stream("a"), clocks.stream("b")
    tick, event = clocks.launch(a), clocks.record(a)
    assert not clocks.over(event)
    clocks.wait(HOST, event)
    assert clocks.over(event) and clocks.before(a, tick, b) and clocks.before(a, tick, clocks.stream("later"))
    # an event recorded on b from now on carries it along
    clocks.launch(b)
    assert clocks.record(b)[a] == tick


def test_an_event_is_a_moment_not_a_stream() -> None:
    clocks = Clocks()
    a, b = clocks.stream("a"), clocks.stream("b")
    event = clocks.record(a)
    tick = clocks.launch(a)
    clocks.wait(b, event)
    assert not clocks.before(a, tick, b)

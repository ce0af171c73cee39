"""What one rank did and when: a list of spans, appended while running and turned into text only when written.

A span costs one reading of the clock at each end and one list append; names and arguments are kept as the objects they
are. Who is handed `NO_RECORDER` (None) records nothing, at the price of one `is None`.

All times are nanoseconds on the machine's monotonic clock (`Recorder.now`), which is the same for every process of one
machine; `clock.clock_offset` relates the clocks of different machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter_ns
from typing import Any

from parallel.schedule.actions import Action, Transfer


class Kind(StrEnum):
    """What a span is."""

    ACTION = "action"  # a compute action of the table: F, B, I, W or an F&B pair
    STEP = "step"  # a step of a program: attn(F), mlp(W), ...
    COMMUNICATION = "communication"  # from issue to completion, as far as the host knows
    WAIT = "wait"  # the host is blocked
    RUN = "run"  # one pass through the table; time between runs (optimizer, data) stays out of the analysis


class Channel(StrEnum):
    """What a communication, or a wait for it, belongs to."""

    PIPELINE = "pipeline"  # send or receive between stages
    ALL_TO_ALL = "all_to_all"  # rows of dispatch and combine, either direction
    COUNTS = "counts"  # the exchange of receive counts before the rows
    REDUCTION = "reduction"  # gradients over replicas


@dataclass(slots=True)
class Event:
    """One span. `name` and the values of `args` are written with `str` where JSON has no type for them. end: None while
    the span is open."""

    kind: Kind
    name: object
    start: int
    end: int | None
    args: dict[str, Any]


_Closed = tuple[Kind, object, int, int, dict[str, Any]]


class Recorder:
    """Spans of one rank (`rank`: its global rank, the process id of the merged trace).

    step: the program step under way, set by whoever drives programs; an all-to-all issued in it is called after it.
    """

    __slots__ = ("_kept", "rank", "step")
    now = staticmethod(perf_counter_ns)

    def __init__(self, rank: int) -> None:
        self.rank = rank
        # Spans that are over are kept as plain tuples: half the cost of an object.
        self._kept: list[Event | _Closed] = []
        self.step: str | None = None

    def add(self, kind: Kind, name: object, start: int, end: int, **args: Any) -> None:
        """A span that is over."""
        self._kept.append((kind, name, start, end, args))

    def issue(self, kind: Kind, name: object, **args: Any) -> Event:
        """A span that begins now; `complete` ends it. One that never ends is written as unfinished."""
        if self.step is not None:
            args["step"] = self.step
        event = Event(kind, name, perf_counter_ns(), None, args)
        self._kept.append(event)
        return event

    def complete(self, event: Event) -> None:
        """The span ends now. A second completion changes nothing: the first is when the host knew."""
        if event.end is None:
            event.end = perf_counter_ns()

    def action(self, action: Action, start: int, end: int) -> None:
        """A compute action of the table. Both halves of a pair get the pair's interval."""
        self._kept.append((Kind.ACTION, action, start, end, {}))

    def transfer(self, transfer: Transfer, peer: int, size: int) -> Event:
        """A send or receive between stages begins now. peer: global rank. size: bytes."""
        event = Event(Kind.COMMUNICATION, transfer, perf_counter_ns(), None, {"peer": peer, "bytes": size})
        self._kept.append(event)
        return event

    @property
    def events(self) -> list[Event]:
        """All spans in the order they were handed in or issued."""
        return [kept if isinstance(kept, Event) else Event(*kept) for kept in self._kept]

    def clear(self) -> None:
        """Forget all spans, as after writing them."""
        self._kept = []
        self.step = None


NO_RECORDER: Recorder | None = None

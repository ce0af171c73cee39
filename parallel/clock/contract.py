"""What a clock is, and what it records.

A clock stands for one rank's device: a compute stream, a link for each channel of transfers, and the host that issues
both. Segments and transfers are names and durations; the programs that issue them are the real ones. Times are in
milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel.device import EXPERT, Channel, Event, Ticket

COMPUTE, HOST = "compute", "host"


@dataclass(frozen=True)
class Interval:
    """Something that took time. lane: COMPUTE, HOST, or the channel of a transfer. start, end: since the clock's
    start."""

    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Record:
    """What ran between a clock's start and now. issued: segments and transfers as the host issued them; waited:
    transfers in the order in which compute was put behind them."""

    intervals: tuple[Interval, ...]
    span: float
    issued: tuple[str, ...]
    waited: tuple[str, ...]

    def lane(self, name: str) -> tuple[Interval, ...]:
        return tuple(interval for interval in self.intervals if interval.lane == name)

    @property
    def compute_busy(self) -> float:
        return sum(interval.end - interval.start for interval in self.lane(COMPUTE))

    @property
    def transfer_time(self) -> float:
        return sum(i.end - i.start for i in self.intervals if i.lane not in (COMPUTE, HOST))

    @property
    def exposed_share(self) -> float:
        """(span - compute busy) / transfer time: the part of the transfers that no compute hides; every stall of the
        compute stream counts, whatever its cause. 0 without transfers."""
        return (self.span - self.compute_busy) / self.transfer_time if self.transfer_time else 0.0


class Counts(Protocol):
    """Receive counts on their way to the host."""

    def block(self) -> None:
        """The host does nothing until they are there."""
        ...


class Clock(Protocol):
    """What timed segments and the timed dispatcher need. Before `start` nothing takes time and nothing is recorded."""

    def start(self) -> None: ...

    def step(self, name: str) -> None:
        """The host begins to issue a program step."""
        ...

    def compute(self, name: str, duration: float) -> None:
        """Issue a segment on the compute stream."""
        ...

    def mark(self) -> Event:
        """The present end of the compute stream."""
        ...

    def transfer(self, name: str, duration: float, after: Sequence[Event], channel: Channel = EXPERT) -> Ticket:
        """Issue a transfer: it begins after the marks in `after` and after earlier transfers of its channel. Waiting
        for its ticket puts the compute stream behind it."""
        ...

    def counts(self, after: Sequence[Event], channel: Channel = EXPERT) -> Counts:
        """Start an exchange of receive counts: it comes after what a transfer would come after, takes no link time,
        and reaches the host late by as much as the clock says."""
        ...

    def record(self) -> Record: ...

"""A model of one GPU: nothing sleeps, every start is computed."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.clock.contract import COMPUTE, HOST, Interval, Record
from parallel.device import EXPERT, Channel


class VirtualTicket:
    """A transfer that ends at a known time."""

    def __init__(self, clock: VirtualClock, name: str, end: float) -> None:
        self.clock, self.name, self.end = clock, name, end

    def wait(self) -> None:
        self.clock.put_behind(self)

    def is_completed(self) -> bool:
        return self.end <= self.clock.host


class VirtualCounts:
    """Receive counts that reach the host at a known time."""

    def __init__(self, clock: VirtualClock, at: float) -> None:
        self.clock, self.at = clock, at

    def block(self) -> None:
        self.clock.block(self.at)


class VirtualClock:
    """The host runs ahead of the device and pays `launch_cost` for every step; a segment begins once it is issued and
    the segments and waits before it are over; a transfer once it is issued, its marks have passed and its link is free.
    Receive counts reach the host `counts_late` after their exchange could begin. Both in milliseconds.
    """

    def __init__(self, launch_cost: float = 0.0, counts_late: float = 0.0) -> None:
        self.launch_cost, self.counts_late = launch_cost, counts_late
        self._running = False
        self._reset()

    def _reset(self) -> None:
        self.host = self._compute = 0.0
        self._links: dict[Channel, float] = {}
        self._intervals: list[Interval] = []
        self._issued: list[str] = []
        self._waited: list[str] = []

    def start(self) -> None:
        self._reset()
        self._running = True

    def _keep(self, lane: str, name: str, start: float, end: float) -> None:
        if end > start:
            self._intervals.append(Interval(lane, name, start, end))

    def step(self, name: str) -> None:
        if self._running:
            start, self.host = self.host, self.host + self.launch_cost
            self._keep(HOST, name, start, self.host)

    def compute(self, name: str, duration: float) -> None:
        if not self._running:
            return
        start = max(self._compute, self.host)
        self._compute = start + duration
        self._issued.append(name)
        self._keep(COMPUTE, name, start, self._compute)

    def mark(self) -> float:
        return self._compute

    def transfer(self, name: str, duration: float, after: Sequence[float], channel: Channel = EXPERT) -> VirtualTicket:
        if not self._running:
            return VirtualTicket(self, name, 0.0)
        start = max(self.host, self._links.get(channel, 0.0), *after)
        self._links[channel] = start + duration
        self._issued.append(name)
        self._keep(channel, name, start, start + duration)
        return VirtualTicket(self, name, start + duration)

    def put_behind(self, ticket: VirtualTicket) -> None:
        """Order what is computed next after a transfer."""
        if self._running:
            self._compute = max(self._compute, ticket.end)
            self._waited.append(ticket.name)

    def counts(self, after: Sequence[float], channel: Channel = EXPERT) -> VirtualCounts:
        begun = max(self.host, self._links.get(channel, 0.0), *after)
        return VirtualCounts(self, begun + self.counts_late if self._running else 0.0)

    def block(self, until: float) -> None:
        """The host waits for something."""
        start, self.host = self.host, max(self.host, until)
        self._keep(HOST, "counts", start, self.host)

    def record(self) -> Record:
        span = max((interval.end for interval in self._intervals), default=0.0)
        return Record(tuple(self._intervals), span, tuple(self._issued), tuple(self._waited))

"""Real sleeps: compute holds the host, as on a CPU, while transfers run one after another in the background."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from parallel.clock.contract import COMPUTE, HOST, Interval, Record
from parallel.device import EXPERT, Channel


class RealTicket:
    """A transfer under way on its link; waiting holds the host."""

    def __init__(self, clock: RealClock, name: str, moving: Future[None] | None) -> None:
        self.clock, self.name, self.moving = clock, name, moving

    def wait(self) -> None:
        if self.moving is not None:
            self.clock.hold(self.name, self.moving)

    def is_completed(self) -> bool:
        return self.moving is None or self.moving.done()


class RealCounts:
    """Receive counts behind earlier transfers of their link."""

    def __init__(self, clock: RealClock, exchanged: Future[float] | None) -> None:
        self.clock, self.exchanged = clock, exchanged

    def block(self) -> None:
        if self.exchanged is not None:
            self.clock.receive(self.exchanged)


class RealClock:
    """A context; its links stop with it. Marks are of no use here: a segment is over once the host has issued it.
    counts_late: milliseconds."""

    def __init__(self, counts_late: float = 0.0) -> None:
        self.counts_late = counts_late
        self._running = False
        self._links: dict[Channel, ThreadPoolExecutor] = {}
        self._reset()

    def _reset(self) -> None:
        self._origin = time.perf_counter()
        self._intervals: list[Interval] = []
        self._issued: list[str] = []
        self._waited: list[str] = []

    def __enter__(self) -> RealClock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for link in self._links.values():
            link.shutdown(cancel_futures=True)

    def start(self) -> None:
        self._reset()
        self._running = True

    def _now(self) -> float:
        return 1e3 * (time.perf_counter() - self._origin)

    def _link(self, channel: Channel) -> ThreadPoolExecutor:
        if channel not in self._links:
            self._links[channel] = ThreadPoolExecutor(1, channel)
        return self._links[channel]

    def _sleep(self, lane: str, name: str, duration: float) -> None:
        start = self._now()
        time.sleep(duration / 1e3)
        self._intervals.append(Interval(lane, name, start, self._now()))

    def step(self, name: str) -> None:
        pass

    def compute(self, name: str, duration: float) -> None:
        if self._running:
            self._issued.append(name)
            self._sleep(COMPUTE, name, duration)

    def mark(self) -> None:
        return None

    def transfer(self, name: str, duration: float, after: Sequence[None], channel: Channel = EXPERT) -> RealTicket:
        if not self._running:
            return RealTicket(self, name, None)
        self._issued.append(name)
        return RealTicket(self, name, self._link(channel).submit(self._sleep, channel, name, duration))

    def hold(self, name: str, moving: Future[None]) -> None:
        """The host waits for a transfer."""
        self._waited.append(name)
        start = self._now()
        moving.result()
        self._intervals.append(Interval(HOST, f"wait for {name}", start, self._now()))

    def counts(self, after: Sequence[None], channel: Channel = EXPERT) -> RealCounts:
        return RealCounts(self, self._link(channel).submit(self._now) if self._running else None)

    def receive(self, exchanged: Future[float]) -> None:
        """The host waits for receive counts."""
        start = self._now()
        time.sleep(max(0.0, exchanged.result() + self.counts_late - self._now()) / 1e3)
        self._intervals.append(Interval(HOST, "counts", start, self._now()))

    def record(self) -> Record:
        return Record(tuple(self._intervals), self._now(), tuple(self._issued), tuple(self._waited))

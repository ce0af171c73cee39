"""Vector clocks over streams and the host (Lamport 1978; Mattern 1988; as in torch.cuda._sanitizer and FastTrack).

A stream is a line of operations, each with a number on that stream (its tick, from 1). `now[s][q]` is the last
operation of stream q that is known to be over when the next operation of stream s starts. The host is a stream too: it
issues all others, so what it has seen end lies before whatever it issues from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

Stream = int
Moment = tuple[int, ...]

HOST = 0


class Clocks:
    """The clocks of one device. A `Moment` is what an event recorded on a stream stands for."""

    def __init__(self) -> None:
        self.names = ["host"]
        self._streams = {"host": HOST}
        self._now: list[list[int]] = [[0]]
        self._host_version = 0
        self._seen_version = [0]

    def stream(self, name: str) -> Stream:
        """The stream of that name; made on first use, after all that the host has seen."""
        if name not in self._streams:
            self._streams[name] = len(self.names)
            self.names.append(name)
            for clock in self._now:
                clock.append(0)
            self._now.append(list(self._now[HOST]))
            self._seen_version.append(self._host_version)
        return self._streams[name]

    def launch(self, stream: Stream) -> int:
        """One more operation on `stream`, issued by the host now; its tick."""
        clock = self._issued(stream)
        clock[stream] += 1
        return clock[stream]

    def tick(self, stream: Stream) -> int:
        """The last operation issued on `stream`."""
        return self._now[stream][stream]

    def record(self, stream: Stream) -> Moment:
        """An event at the present end of `stream`."""
        return tuple(self._issued(stream))

    def wait(self, stream: Stream, moment: Sequence[int]) -> None:
        """What comes next on `stream` (or on the host) comes after `moment`."""
        clock, changed = self._now[stream], False
        for other, tick in enumerate(moment):
            if tick > clock[other]:
                clock[other], changed = tick, True
        if stream == HOST and changed:
            self._host_version += 1

    def before(self, other: Stream, tick: int, stream: Stream) -> bool:
        """Whether operation `tick` of `other` is over before the next operation of `stream` starts."""
        return tick <= self._now[stream][other] or tick <= self._now[HOST][other]

    def over(self, moment: Sequence[int]) -> bool:
        """Whether the host has seen `moment` pass."""
        return all(tick <= seen for tick, seen in zip(moment, self._now[HOST], strict=False))

    def _issued(self, stream: Stream) -> list[int]:
        clock = self._now[stream]
        if self._seen_version[stream] != self._host_version:
            self._seen_version[stream] = self._host_version
            for other, tick in enumerate(self._now[HOST]):
                if tick > clock[other]:
                    clock[other] = tick
        return clock

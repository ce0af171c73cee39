"""A communication that writes down how long it took and how long the host waited for it."""

from __future__ import annotations

from typing import Any, Protocol

from parallel.trace.recorder import Channel, Event, Kind, Recorder


class _Ticket(Protocol):
    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


class TracedTicket:
    """`ticket`, whose span `event` began when it was issued. It ends when the host first sees that it is over."""

    __slots__ = ("channel", "event", "recorder", "ticket")

    def __init__(self, ticket: _Ticket, recorder: Recorder, event: Event, channel: Channel) -> None:
        self.ticket, self.recorder, self.event, self.channel = ticket, recorder, event, channel

    def wait(self) -> None:
        start = self.recorder.now()
        try:
            self.ticket.wait()
        finally:
            self.recorder.add(Kind.WAIT, self.event.name, start, self.recorder.now(), channel=self.channel)
            self.recorder.complete(self.event)

    def is_completed(self) -> bool:
        over = self.ticket.is_completed()
        if over:
            self.recorder.complete(self.event)
        return over

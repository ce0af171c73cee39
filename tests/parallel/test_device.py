"""The devices: the host's passes everything on; CUDA's makes its calls in the order that streams demand, seen on
pretended streams that write down what they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.device import EXPERT, HOST, PIPELINE, CudaDevice


class Streams:
    """What torch.cuda would be asked, in order: (who, what, with what)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, str]] = []
        self.made = 0
        self.events = 0
        self.compute = Stream(self, "compute")
        self.current = self.compute

    def make(self, where: torch.device, priority: int) -> Stream:
        assert priority == -1
        self.made += 1
        return Stream(self, f"side{self.made}")

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def record_event(self) -> Event:
        self.streams.events += 1
        event = Event(self.streams, f"event{self.streams.events}")
        self.streams.log.append((self.name, "records", event.name))
        return event

    def wait_event(self, event: Event) -> None:
        self.streams.log.append((self.name, "waits for", event.name))


class Event:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def synchronize(self) -> None:
        self.streams.log.append(("host", "waits for", self.name))

    def query(self) -> bool:
        return False


class Work:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def wait(self) -> None:
        self.streams.log.append((self.streams.current.name, "waits for", self.name))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch.cuda, "set_device", lambda where: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where=None: found.current)
    monkeypatch.setattr(torch.cuda, "Stream", found.make)
    monkeypatch.setattr(torch.cuda, "stream", found.use)

    def all_to_all(*args: Any, **given: Any) -> Work:
        assert given["async_op"] is True
        found.log.append((found.current.name, "issues", "all-to-all"))
        return Work(found, "all-to-all")

    def batch(operations: list[Any]) -> list[Work]:
        found.log.append((found.current.name, "issues", "batch"))
        return [Work(found, "batch")]

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(dist, "batch_isend_irecv", batch)
    return found


def test_a_transfer_waits_for_its_events_and_its_side_stream_for_the_transfer(streams: Streams) -> None:
    device, x = CudaDevice(0), torch.zeros(1)
    first = device.mark()
    second = device.mark()
    with device.side(EXPERT, [first, second]):
        ticket = device.all_to_all(x, x, [1], [1], group=None)  # type: ignore[arg-type]
    ticket.wait()
    assert streams.log == [
        ("compute", "records", "event1"),
        ("compute", "records", "event2"),
        ("side1", "waits for", "event1"),
        ("side1", "waits for", "event2"),
        ("side1", "issues", "all-to-all"),
        ("side1", "waits for", "all-to-all"),
        ("side1", "records", "event3"),
        ("compute", "waits for", "event3"),
    ]
    assert streams.current is streams.compute
    assert not ticket.is_completed()


def test_each_channel_has_one_stream(streams: Streams) -> None:
    device, x = CudaDevice(0), torch.zeros(1)
    for channel in (EXPERT, PIPELINE, EXPERT):
        with device.side(channel, ()):
            if channel == EXPERT:
                device.all_to_all(x, x, [1], [1], group=None)  # type: ignore[arg-type]
            else:
                assert len(device.transfer([])) == 1
    issued = [who for who, what, _ in streams.log if what == "issues"]
    assert issued == ["side1", "side2", "side1"]


def test_compute_adopts_what_a_side_stream_made(streams: Streams) -> None:
    class Tensor:
        used: Any = None

        def record_stream(self, stream: Stream) -> None:
            self.used = stream

    tensors = Tensor(), Tensor()
    CudaDevice(0).adopt(*tensors)  # type: ignore[arg-type]
    assert all(tensor.used is streams.compute for tensor in tensors)


def test_reading_blocks_the_host_on_the_side_stream_alone(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, pinned = torch.empty, []

    def pinnable(*shape: Any, pin_memory: bool = False, **given: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*shape, **given)

    monkeypatch.setattr(torch, "empty", pinnable)
    values = CudaDevice(0).read(EXPERT, None, torch.tensor([3, 1]), torch.tensor([[2]]))
    assert values == [[3, 1], [[2]]] and pinned == [True, True]
    assert streams.log == [("side1", "records", "event1"), ("host", "waits for", "event1")]


def test_the_host_has_one_order() -> None:
    class Ticket:
        waited = 0

        def wait(self) -> None:
            self.waited += 1

        def is_completed(self) -> bool:
            return True

    ticket = Ticket()
    assert HOST.mark() is None
    with HOST.side(EXPERT, [HOST.mark()]):
        assert HOST.read(EXPERT, ticket, torch.tensor([4])) == [[4]]
    assert ticket.waited == 1
    assert HOST.read(EXPERT, None, torch.tensor([5])) == [[5]]

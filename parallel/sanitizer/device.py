"""`SanitizerDevice`: a `parallel.device.Device` on the host that behaves as `CudaDevice` would, and takes notes.

Everything runs at once, in program order, on CPU tensors; gloo moves the data. What is recorded is the order that the
same calls would have on a GPU: a compute stream, a side stream for each channel, and a stream of its own for each NCCL
communicator, which waits for the stream that issues an operation and works them off one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from parallel.device import Channel, Event, PointToPoint, Ticket
from parallel.sanitizer.clock import HOST, Clocks, Moment, Stream
from parallel.sanitizer.collectives import Issued, Log, form_of
from parallel.sanitizer.findings import Findings, Rule
from parallel.sanitizer.memory import Memory
from parallel.sanitizer.recorder import Calls, Recorder
from parallel.sanitizer.transport import Landing, Works, exchange, post

POLLS = 2  # an operation is seen to be over when it is asked about for the second time


class SanitizerTicket:
    """As `CudaTicket`: waiting orders the compute stream after `over`, an event on the side stream.

    operations: how many waits it must get (a batch of transfers has one ticket for all of them).
    """

    def __init__(self, device: SanitizerDevice, name: str, over: Moment, operations: int) -> None:
        self.device, self.name, self.over, self.operations = device, name, over, operations
        self.waits = self.polls = 0

    def wait(self) -> None:
        self._waited()
        if self.device.reading:
            return
        self.device.clocks.wait(self.device.compute, self.over)
        self.device.memory.settle()

    def _waited(self) -> None:
        self.waits += 1
        if self.waits == self.operations:
            self.device.owed.pop(id(self), None)
        if self.waits > self.operations:
            self.device.findings.add(
                Rule.TICKET,
                f"{self.name} is waited for {self.waits} times, last in {self.device.at}; it stands for "
                f"{self.operations} operation(s)",
            )

    def is_completed(self) -> bool:
        """True from the second time on, or when the host knows already. The host has then seen it end."""
        self.polls += 1
        if self.polls < POLLS and not self.device.clocks.over(self.over):
            return False
        self.device.clocks.wait(HOST, self.over)
        self.device.memory.settle()
        return True

    def __del__(self) -> None:
        if self.device.owed.pop(id(self), None):
            state = "over" if self.device.clocks.over(self.over) else "under way"
            self.device.never_waited(self.name, self.operations - self.waits, f"dropped while {state}")


class SanitizerDevice:
    """One rank's device. Findings gather in `findings`; `log` is what `check_collectives` compares.

    at: the program step, and transfers: names of the next batch's operations; both set by whoever drives
    (`WatchedExecutor`). Outside `watch` nothing is recorded.
    """

    where = torch.device("cpu")

    def __init__(self) -> None:
        self.clocks, self.findings = Clocks(), Findings()
        self.compute = self.clocks.stream("compute")
        self.at, self.quiet, self.reading = "the program", False, False
        self.transfers: Sequence[str] = ()
        self.memory = Memory(self.clocks, self.findings, self.compute, lambda: self.at)
        self.log: Log = {}
        self.owed: dict[int, str] = {}
        self._streams: list[Stream] = [self.compute]
        self._last: dict[str, tuple[Stream, int, str]] = {}
        self._names: Counter[str] = Counter()
        self._landings: dict[int, Landing] = {}
        self._sends: Works = []

    @property
    def current(self) -> Stream:
        """The stream that operations are issued on."""
        return self._streams[-1]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record what runs inside: one step. What came before counts as done on the compute stream."""
        for stream in range(1, len(self.clocks.names)):
            self.clocks.wait(self.compute, self.clocks.record(stream))
        self.memory.start()
        with Calls(self), Recorder(self):
            yield
            self.memory.poll()
        for name in self.owed.values():
            self.findings.add(Rule.TICKET, f"{name} was never waited for in the step; missing: the ticket's wait")
        self.owed.clear()
        self._land(list(self._landings.values()))
        for work in self._sends:
            work.wait()
        self._sends = []

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The sanitizer's own operations are not the program's."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    # Device -----------------------------------------------------------------------------------------------------------

    def mark(self) -> Event:
        self.memory.poll()
        return self.clocks.record(self.compute)

    @contextmanager
    def side(self, channel: Channel, after: Sequence[Event]) -> Iterator[None]:
        self.memory.poll()
        stream = self._side(channel)
        for event in after:
            self.clocks.wait(stream, event)
        self._streams.append(stream)
        try:
            yield
        finally:
            self._streams.pop()

    def all_to_all(
        self, out: torch.Tensor, sent: torch.Tensor, take: list[int], give: list[int], group: dist.ProcessGroup
    ) -> Ticket:
        operation = f"all-to-all in {self.at}"
        issued = Issued("all-to-all", operation, form_of(sent, 1), give=tuple(give), take=tuple(take))
        stream, tick = self._issue(group, [issued], operation)
        self._use(sent, stream, tick, operation, writes=False)
        self._use(out, stream, tick, operation, writes=True)
        self._names[operation] += 1
        with self._working():
            self.deliver([sent])
            self._move(*exchange(out, sent, take, give, group, f"{operation} {self._names[operation]}"))
        return self._ticket(operation, stream, 1)

    def transfer(self, operations: Sequence[PointToPoint]) -> Sequence[Ticket]:
        named = len(self.transfers) == len(operations)
        issued = []
        for index, operation in enumerate(operations):
            kind = "send" if operation.send else "receive"
            name = self.transfers[index] if named else f"{kind} {index + 1} with rank {operation.peer} in {self.at}"
            issued.append(Issued(kind, name, form_of(operation.tensor), operation.peer, operation.tag))
        whole = f"batch [{', '.join(one.name for one in issued)}]"
        stream, tick = self._issue(dist.group.WORLD, issued, whole)
        for one, operation in zip(issued, operations, strict=True):
            self._use(operation.tensor, stream, tick, one.name, writes=one.kind == "receive")
        with self._working():
            self.deliver([operation.tensor for operation in operations if operation.send])
            self._move(*post(operations))
        return [self._ticket(whole, stream, len(operations))]

    def adopt(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.memory.adopt(tensor, self.compute)

    def read(self, channel: Channel, ticket: Ticket | None, *tensors: torch.Tensor) -> list[Any]:
        self.memory.poll()
        stream = self._side(channel)
        tick = self.clocks.launch(stream)
        for tensor in tensors:
            self._use(tensor, stream, tick, "Device.read", writes=False)
        if ticket is not None:
            self.reading = True  # the host waits, not compute
            ticket.wait()
            self.reading = False
        self.clocks.wait(HOST, self.clocks.record(stream))
        self.memory.settle()
        with self._working():
            self.deliver(list(tensors))
            return [tensor.tolist() for tensor in tensors]

    # Notes ------------------------------------------------------------------------------------------------------------

    def deliver(self, tensors: list[torch.Tensor]) -> None:
        """Put data that were sent into `tensors` in place, waiting for them if need be."""
        if self._landings:
            keys = [tensor.untyped_storage()._cdata for tensor in tensors]
            self._land([self._landings[key] for key in dict.fromkeys(keys) if key in self._landings])

    def outside(self, name: str, group: dist.ProcessGroup | None, touched: list[tuple[torch.Tensor, str]]) -> None:
        """A collective issued past the device, such as a gradient reduction of the optimizer: its tensors are taken as
        written, and its own wait is not seen."""
        operation = f"{name} in {self.at}"
        form = ", ".join(form_of(tensor) for tensor, _ in touched)
        stream, tick = self._issue(group or dist.group.WORLD, [Issued(name, name, form)], operation, True)
        for tensor, _ in touched:
            self._use(tensor, stream, tick, operation, writes=True)

    def never_waited(self, name: str, operations: int, how: str) -> None:
        """A ticket died."""
        self.findings.add(
            Rule.TICKET,
            f"{name}: {operations} operation(s) never waited for, {how} in {self.at}; missing: the ticket's wait",
        )

    def _side(self, channel: Channel) -> Stream:
        return self.clocks.stream(f"{channel} side stream")

    def _issue(
        self, group: dist.ProcessGroup | None, issued: list[Issued], operation: str, on_compute: bool = False
    ) -> tuple[Stream, int]:
        """Launch on the communicator's stream, as torch's NCCL does: after the stream that is current now."""
        assert group is not None
        self.memory.poll()
        here, names = self.current, self.clocks.names
        members = tuple(dist.get_process_group_ranks(group))
        communicator = f"communicator {group.group_name} of ranks {','.join(map(str, members))}"
        if here == self.compute and not on_compute:
            self.findings.add(
                Rule.COLLECTIVE, f"{operation} is issued on compute, behind all of it; missing: Device.side"
            )
        if communicator in self._last:
            stream, tick, earlier = self._last[communicator]
            if not self.clocks.before(stream, tick, here):
                self.findings.add(
                    Rule.COLLECTIVE,
                    f"{operation} on {names[here]} and {earlier} on {names[stream]}, both of {communicator}; missing: "
                    f"{names[here]} does not wait for {names[stream]} in between",
                )
        self._last[communicator] = here, self.clocks.launch(here), operation
        self.log.setdefault(communicator, (members, []))[1].extend(issued)
        stream = self.clocks.stream(communicator)
        self.clocks.wait(stream, self.clocks.record(here))
        return stream, self.clocks.launch(stream)

    def _use(self, tensor: torch.Tensor, stream: Stream, tick: int, operation: str, writes: bool) -> None:
        block = self.memory.block(tensor)
        if block is not None:
            use = self.memory.write if writes else self.memory.read
            use(block, stream, tick, operation)

    def _ticket(self, name: str, stream: Stream, operations: int) -> SanitizerTicket:
        """The current stream waits for the communication at once; so does whoever waits for the ticket."""
        self.clocks.wait(self.current, self.clocks.record(stream))
        self.memory.settle()
        ticket = SanitizerTicket(self, name, self.clocks.record(self.current), operations)
        self.owed[id(ticket)] = name
        return ticket

    def _move(self, landings: list[Landing], sends: Works) -> None:
        for landing in landings:
            self._land([self._landings[landing.key]] if landing.key in self._landings else [])
            self._landings[landing.key] = landing
        self._sends += sends

    def _land(self, landings: list[Landing]) -> None:
        with self._working():
            for landing in landings:
                self._landings.pop(landing.key).finish()

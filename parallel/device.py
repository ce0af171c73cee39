"""Where work runs, and what it is ordered after: one compute stream, and one side stream for each kind of transfer.

The rules that the pipeline and the dispatcher follow, whatever the device:

- All compute runs on one stream. `mark()` names a point of it: the end of the segment that just ran.
- A transfer is issued inside `side(channel, after)`: its packing, its buffers and its communication are ordered after
  the marks in `after` and after earlier transfers of that channel, and after nothing else (DeepEP's `previous_event`;
  torch's NCCL collectives order themselves after the *current* stream, hence the side stream).
- `Ticket.wait()` orders the compute stream after a communication. Buffers made inside `side` are then shown to the
  allocator by `adopt` before compute reads them; what the transfer reads is kept alive until the ticket was waited for.
- The host blocks in `read` only (receive counts), or where it asks a ticket.

On the host there is one order, that of the program, so nothing but the communication itself is asynchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator

Event = Any
Channel = str

EXPERT = "expert"
PIPELINE = "pipeline"


class PointToPoint(NamedTuple):
    """A send or a receive of a contiguous tensor. peer: global rank. tag: tells operations of one pair of ranks apart
    where the transport can (gloo); NCCL goes by their order."""

    send: bool
    tensor: torch.Tensor
    peer: int
    tag: int


class Ticket(Protocol):
    """A communication under way (gloo's own Work is one)."""

    def wait(self) -> Any:
        """Order what is computed next after the communication; raises when it failed."""
        ...

    def is_completed(self) -> bool:
        """Whether the host can see that it is over."""
        ...


class Device(Protocol):
    """What the pipeline, the dispatcher and the segments need of the machine they run on."""

    where: torch.device

    def mark(self) -> Event:
        """The present end of the compute stream."""
        ...

    def side(self, channel: Channel, after: Sequence[Event]) -> AbstractContextManager[Any]:
        """Run what is inside on the channel's stream, after `after`. Entered and left between two program steps."""
        ...

    def all_to_all(
        self, out: torch.Tensor, sent: torch.Tensor, take: list[int], give: list[int], group: dist.ProcessGroup
    ) -> Ticket:
        """Rows by rank: `give[r]` rows of `sent` to rank r, `take[r]` rows of `out` from it. Inside `side` only."""
        ...

    def transfer(self, operations: Sequence[PointToPoint]) -> Sequence[Ticket]:
        """One batch of sends and receives; one ticket for each, or one for all. Inside `side` only."""
        ...

    def adopt(self, *tensors: torch.Tensor) -> None:
        """Tensors made inside `side` that compute reads from now on."""
        ...

    def read(self, channel: Channel, ticket: Ticket | None, *tensors: torch.Tensor) -> list[Any]:
        """Values of tensors made inside `side(channel)`, once `ticket` is over. The one place where the host blocks."""
        ...


class HostDevice:
    """CPU tensors and a blocking transport (gloo)."""

    where = torch.device("cpu")

    def mark(self) -> Event:
        return None

    def side(self, channel: Channel, after: Sequence[Event]) -> AbstractContextManager[Any]:
        return _NOTHING

    def all_to_all(
        self, out: torch.Tensor, sent: torch.Tensor, take: list[int], give: list[int], group: dist.ProcessGroup
    ) -> Ticket:
        return dist.all_to_all_single(out, sent, take, give, group=group, async_op=True)

    def transfer(self, operations: Sequence[PointToPoint]) -> Sequence[Ticket]:
        # `batch_isend_irecv` checks and wraps each operation, which takes as long as handing 1 MB to a socket. Receives
        # go first: gloo writes to a peer only once it has heard that the peer wants to read.
        world = dist.group.WORLD
        assert world is not None
        tickets: list[Ticket | None] = [
            None if send else world.recv([tensor], peer, tag) for send, tensor, peer, tag in operations
        ]
        for i, (send, tensor, peer, tag) in enumerate(operations):
            if send:
                tickets[i] = world.send([tensor], peer, tag)
        return tickets  # type: ignore[return-value]

    def adopt(self, *tensors: torch.Tensor) -> None:
        pass

    def read(self, channel: Channel, ticket: Ticket | None, *tensors: torch.Tensor) -> list[Any]:
        if ticket is not None:
            ticket.wait()
        return [tensor.tolist() for tensor in tensors]


class CudaTicket:
    """A communication that its side stream already waits for; `over` is recorded on that stream behind it."""

    def __init__(self, over: torch.cuda.Event, compute: torch.cuda.Stream, works: Sequence[dist.Work]) -> None:
        self.over, self.compute, self.works = over, compute, works

    def wait(self) -> None:
        self.compute.wait_event(self.over)

    def is_completed(self) -> bool:
        return self.over.query()


class CudaDevice:
    """CUDA streams and NCCL. The stream that is current when it is made is the compute stream.

    A side stream waits for its own communication at once. So whatever is issued on it later, and every block its
    allocations hand back, comes after that communication; on one communicator they would queue up anyway.
    Never run on a GPU: its calls are tested against the order they must come in.
    """

    def __init__(self, index: int) -> None:
        self.where = torch.device("cuda", index)
        # Triton launches on the current device, wherever the tensors are.
        torch.cuda.set_device(self.where)
        self.compute = torch.cuda.current_stream(self.where)
        self._sides: dict[Channel, torch.cuda.Stream] = {}

    def _stream(self, channel: Channel) -> torch.cuda.Stream:
        if channel not in self._sides:
            self._sides[channel] = torch.cuda.Stream(self.where, priority=-1)
        return self._sides[channel]

    def mark(self) -> Event:
        return self.compute.record_event()

    @contextmanager
    def side(self, channel: Channel, after: Sequence[Event]) -> Iterator[None]:
        stream = self._stream(channel)
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield

    def _ticket(self, works: Sequence[dist.Work]) -> CudaTicket:
        for work in works:
            work.wait()
        return CudaTicket(torch.cuda.current_stream(self.where).record_event(), self.compute, works)

    def all_to_all(
        self, out: torch.Tensor, sent: torch.Tensor, take: list[int], give: list[int], group: dist.ProcessGroup
    ) -> Ticket:
        return self._ticket([dist.all_to_all_single(out, sent, take, give, group=group, async_op=True)])

    def transfer(self, operations: Sequence[PointToPoint]) -> Sequence[Ticket]:
        batch = [dist.P2POp(dist.isend if send else dist.irecv, tensor, peer) for send, tensor, peer, _ in operations]
        return [self._ticket(dist.batch_isend_irecv(batch))]

    def adopt(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self.compute)

    def read(self, channel: Channel, ticket: Ticket | None, *tensors: torch.Tensor) -> list[Any]:
        stream = self._stream(channel)
        with torch.cuda.stream(stream):
            copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            arrived = stream.record_event()
        arrived.synchronize()
        return [copy.tolist() for copy in copies]


_NOTHING = nullcontext()
HOST = HostDevice()

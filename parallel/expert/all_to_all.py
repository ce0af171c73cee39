"""Expert dispatch by all-to-all: scatter and gather, each the transpose of the other; one rank needs no communication.

Every movement is one all-to-all of bytes: FP8 codes, scales, expert ids and router weights of a row travel together.
Picking and packing rows is part of the movement and runs on its side stream; laying received rows out by expert, and
summing them, is compute.

Shape letters: T tokens, K experts per token, D width, S rows sent, V rows received, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from kernels import permute as definition
from kernels.contract import Permute
from kernels.quantize import Quantized
from parallel.device import EXPERT, HOST, Device, Event, Ticket
from parallel.expert.contract import Pending
from parallel.expert.layout import ReceiveLayout, SendLayout, receive_layout, send_layout
from parallel.trace.recorder import NO_RECORDER, Channel, Kind, Recorder
from parallel.trace.tickets import TracedTicket

Rows = torch.Tensor | Quantized


@dataclass
class Route:
    """Where the tokens of one layer and chunk go; made by `plan`, used by dispatch, combine and both backwards.

    give, take: rows to and from every rank. expert_counts: expanded rows of every local expert. All three are known
    once the counts have arrived.
    """

    tokens: int
    expert_index_TK: torch.Tensor
    sending: SendLayout | None
    counts: Callable[[], tuple[list[int], list[int], list[int]]] | None
    give: list[int] = field(default_factory=list)
    take: list[int] = field(default_factory=list)
    expert_counts: list[int] = field(default_factory=list)
    rows_S: torch.Tensor | None = None
    received: ReceiveLayout | None = None

    def resolve(self) -> None:
        """The one place where the host blocks on other ranks."""
        if self.counts is not None:
            self.give, self.take, self.expert_counts = self.counts()
            self.counts = None

    @property
    def layout(self) -> ReceiveLayout:
        if self.received is None:
            raise RuntimeError("a route was used before its first scatter was waited for")
        return self.received


@dataclass(frozen=True)
class Received:
    """Expanded rows by local expert. rows: [X, D] tensor or FP8 rows; weights_X: their router weights, when sent
    along."""

    rows: Rows
    weights_X: torch.Tensor | None
    counts: list[int]


@dataclass(frozen=True)
class Reduced:
    """A rank's sums over its own experts, one row per received row, ready to go back."""

    columns: list[torch.Tensor]


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).flatten(1)


class _Packer:
    """Columns of several tensors as one byte matrix, and back."""

    def __init__(self, columns: Sequence[torch.Tensor]) -> None:
        self.forms = [(c.dtype, c.shape[1:]) for c in columns]
        self.packed = torch.cat([_bytes(c) for c in columns], 1) if len(columns) > 1 else _bytes(columns[0])

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        out, at = [], 0
        for dtype, shape in self.forms:
            width = shape.numel() * dtype.itemsize
            column = packed[:, at : at + width]
            # One row, or none, is contiguous where it lies, but may lie off its dtype's alignment: always copied.
            column = column.clone(memory_format=torch.contiguous_format) if at else column.contiguous()
            out.append(column.view(dtype).reshape(len(packed), *shape))
            at += width
        return out


class AllToAllDispatcher:
    """Flat all-to-all over one expert-parallel group (`group` None: this rank alone holds every expert). permute: the
    back end that lays received rows out by expert and sums them."""

    def __init__(
        self, experts: int, group: dist.ProcessGroup | None, device: Device = HOST, permute: Permute = definition
    ) -> None:
        self.group, self.device, self.permute = group, device, permute
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if experts % self.ranks:
            raise ValueError(f"{experts} experts do not divide over {self.ranks} expert-parallel ranks")
        self.experts = experts
        self.local_experts = experts // self.ranks
        self.recorder: Recorder | None = NO_RECORDER

    def mark(self) -> Event:
        """The end of what was computed so far: what a movement issued later is `after`."""
        return self.device.mark()

    def _side(self, after: Sequence[Event]) -> AbstractContextManager[Any]:
        """Where rows are picked and packed. A lone rank has no ticket for compute to wait for: all is compute."""
        return nullcontext() if self.group is None else self.device.side(EXPERT, after)

    def _exchange(
        self, sent: torch.Tensor, give: list[int], take: list[int], channel: Channel = Channel.ALL_TO_ALL
    ) -> tuple[torch.Tensor, list[Ticket]]:
        if self.group is None:
            return sent, []
        out = sent.new_empty(sum(take), *sent.shape[1:])
        event = None
        if self.recorder:
            size = sent.nbytes + out.nbytes
            event = self.recorder.issue(Kind.COMMUNICATION, channel.value, channel=channel, bytes=size)
        ticket = self.device.all_to_all(out, sent.contiguous(), take, give, self.group)
        if self.recorder and event:
            ticket = TracedTicket(ticket, self.recorder, event, channel)
        return out, [ticket]

    def plan(self, expert_index_TK: torch.Tensor, after: Sequence[Event] = ()) -> Route:
        """Start the exchange of counts for [T, K] expert ids; resolved by the first scatter."""
        with self._side(after):
            sending = send_layout(expert_index_TK, self.local_experts, self.ranks)
            ones = [1] * self.ranks
            received_RC, tickets = self._exchange(sending.counts_RC, ones, ones, Channel.COUNTS)
        made = (self.mark(),) if self.group is None else ()

        def counts() -> tuple[list[int], list[int], list[int]]:
            ticket = tickets[0] if tickets else None
            with self.device.side(EXPERT, made):  # so that `read` comes after them
                pass
            given, taken = self.device.read(EXPERT, ticket, sending.counts_RC, received_RC)
            experts = [sum(column) for column in zip(*(row[1:] for row in taken), strict=True)]
            return [row[0] for row in given], [row[0] for row in taken], experts

        return Route(len(expert_index_TK), expert_index_TK, sending, counts)

    def scatter(
        self, route: Route, rows: Rows, weights_TK: torch.Tensor | None = None, after: Sequence[Event] = ()
    ) -> Pending[Received]:
        """[T, D] rows -> expanded rows by local expert. The first scatter of a route carries ids and router weights."""
        route.resolve()
        quantized = isinstance(rows, Quantized)
        columns = [rows.data.view(torch.uint8), rows.scale] if isinstance(rows, Quantized) else [rows]
        if weights_TK is not None:
            columns += [route.expert_index_TK, weights_TK]

        def lay_out(parts: list[torch.Tensor]) -> Received:
            weights_X = None
            if weights_TK is not None:
                index_VK, weights_VK = parts[-2:]
                first = self.rank * self.local_experts
                route.received = receive_layout(index_VK, first, route.expert_counts)
                weights_X = weights_VK[route.received.rows_X, route.received.slots_X]
            layout = route.layout
            if quantized:
                rows = Quantized(parts[0].view(torch.float8_e4m3fn), parts[1])
                return Received(self.permute.take_rows(rows, layout.rows_X), weights_X, layout.counts)
            return Received(self.permute.take_rows(parts[0], layout.rows_X), weights_X, layout.counts)

        if self.group is None:
            # Every token goes to this rank, in its own order: nothing to pick or to pack.
            route.sending = None
            return Pending((), lambda: lay_out(columns))
        with self._side(after):
            if route.rows_S is None:
                assert route.sending is not None
                route.rows_S, route.sending = route.sending.rows(sum(route.give)), None
            packer = _Packer([column[route.rows_S] for column in columns])
            packed_V, tickets = self._exchange(packer.packed, route.give, route.take)

        def finish() -> Received:
            # The transfer reads what it was given until here.
            columns.clear()
            self.device.adopt(packed_V)
            return lay_out(packer.unpack(packed_V))

        return Pending(tickets, finish)

    def reduce(self, route: Route, rows: torch.Tensor, weight_grads: torch.Tensor | None = None) -> Reduced:
        """Expanded [X, D] rows (and [X] gradients of their router weights) summed over this rank's experts."""
        layout = route.layout
        received = sum(route.take)
        columns = [self.permute.sum_rows(rows, layout.rows_X, received)]
        if weight_grads is not None:
            dense_VK = weight_grads.new_zeros(received, route.expert_index_TK.shape[1])
            columns.append(dense_VK.index_put_((layout.rows_X, layout.slots_X), weight_grads))
        return Reduced(columns)

    def gather(
        self, route: Route, reduced: Reduced, after: Sequence[Event] = ()
    ) -> Pending[tuple[torch.Tensor, torch.Tensor | None]]:
        """What `reduce` made -> ([T, D] sums over all ranks, [T, K] gradients of the router weights if they were
        given)."""
        if self.group is None:
            return Pending((), lambda: (reduced.columns[0], reduced.columns[1] if len(reduced.columns) > 1 else None))
        with self._side(after):
            packer = _Packer(reduced.columns)
            packed_S, tickets = self._exchange(packer.packed, route.take, route.give)
        kept = [reduced]

        def place(x: torch.Tensor) -> torch.Tensor:
            assert route.rows_S is not None
            return self.permute.sum_rows(x, route.rows_S, route.tokens)

        def finish() -> tuple[torch.Tensor, torch.Tensor | None]:
            kept.clear()
            assert route.rows_S is not None
            self.device.adopt(packed_S, route.rows_S)
            parts = packer.unpack(packed_S)
            return place(parts[0]), place(parts[1]) if len(parts) > 1 else None

        return Pending(tickets, finish)

"""The executor: runs exactly one rank's list of actions on real processes. It owns no schedule knowledge."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import DistError

from parallel.device import HOST, PIPELINE, Device, Event, PointToPoint, Ticket
from parallel.expert.contract import Pending
from parallel.pipeline.contract import PipelineStage
from parallel.pipeline.interleave import Running, overlap
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Action, Compute, Op, Payload, Post, Table, Transfer
from parallel.schedule.boundary import Boundary, boundary_of, consumed, ends_of, parts, produced
from parallel.trace.recorder import NO_RECORDER, Channel, Kind, Recorder
from parallel.trace.recorder import Event as Span
from parallel.trace.tickets import TracedTicket


class PeerLost(RuntimeError):
    """A peer failed or fell silent; the message names action, stage, chunk and peer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One action as it ran: seconds on the machine's monotonic clock. waited: seconds spent waiting for receives."""

    rank: int
    op: str
    direction: int
    stage: int
    chunk: int
    start: float
    end: float
    waited: float


@dataclass(frozen=True, slots=True)
class _Move:
    """A transfer with all that posting it needs. shape: of what is received for a chunk; None for a send."""

    transfer: Transfer
    boundary: Boundary
    peer: int  # global rank
    tag: int
    shape: Callable[[int], tuple[int, ...]] | None


@dataclass(frozen=True, slots=True)
class _Batch:
    post: Post
    moves: tuple[_Move, ...]
    sends: tuple[Boundary, ...]


class _Part:
    """One half of a pair, or a compute action: what it takes and hands on, and the batches that directly follow."""

    __slots__ = ("compute", "following", "makes", "stays", "takes")

    def __init__(self, compute: Compute, table: Table) -> None:
        self.compute = compute
        self.takes = consumed(compute, table.stages)
        self.makes = produced(compute, table.stages)
        source, target = ends_of(self.makes, table.rank_of) if self.makes else (0, 1)
        self.stays = source == target
        self.following: Sequence[_Batch] = ()


def _tag(t: Transfer, table: Table) -> int:
    chunk = t.chunk * 2 + (t.payload is Payload.GRADIENT)
    return (chunk * table.stages + t.stage) * table.directions + t.direction


class Executor:
    """Runs `table.actions[rank]` with this rank's stages, one step at each `run`.

    stages: {(direction, stage): PipelineStage}. global_rank: pipeline rank -> global rank. dtype: of what crosses
    stages. order: the step order of F&B pairs. recorder: set to trace the steps that follow. A step whose table has no
    backward runs under `torch.no_grad`.
    """

    def __init__(
        self,
        table: Table,
        rank: int,
        stages: dict[tuple[int, int], PipelineStage],
        store: WeightGradStore,
        dtype: torch.dtype,
        order: Sequence[str],
        global_rank: Callable[[int], int] = lambda rank: rank,
        device: Device = HOST,
    ) -> None:
        self.table, self.rank, self.stages, self.store = table, rank, stages, store
        self.dtype, self.order, self.device = dtype, order, device
        self.measured: list[Measured] = []
        self.recorder: Recorder | None = NO_RECORDER
        self._program(table.actions[rank], global_rank)
        self._reset()

    def _program(self, actions: Sequence[Action], global_rank: Callable[[int], int]) -> None:
        """The rank's list with everything looked up that does not change from step to step."""
        self._list: list[_Batch | tuple[_Part, ...]] = []
        following: list[_Batch] = []
        for action in actions:
            if isinstance(action, Post):
                moves = tuple(self._move(t, global_rank) for t in action.transfers)
                batch = _Batch(action, moves, tuple(m.boundary for m in moves if m.transfer.send))
                self._list.append(batch)
                following.append(batch)
                continue
            computes = tuple(_Part(part, self.table) for part in parts(action))
            following = []
            for part in computes:
                part.following = following
            self._list.append(computes)
        self._trains = any(part.compute.op is not Op.F for e in self._list if isinstance(e, tuple) for part in e)

    def _move(self, t: Transfer, global_rank: Callable[[int], int]) -> _Move:
        shape = None
        if not t.send:
            stage = self.stages[t.direction, t.stage]
            shape = stage.boundary_shape if t.payload is Payload.ACTIVATION else stage.output_shape
        return _Move(t, boundary_of(t), global_rank(t.peer), _tag(t, self.table), shape)

    def _reset(self) -> None:
        self._inbox: dict[Boundary, Pending[torch.Tensor]] = {}
        self._outbox: dict[Boundary, tuple[torch.Tensor, Event]] = {}
        self._sending: deque[tuple[Transfer, Ticket, torch.Tensor]] = deque()
        self._posted: set[int] = set()
        self._waited = 0.0

    def run(self) -> None:
        """One step: all actions, then wait until every send is complete."""
        self._reset()
        self.measured = []
        began = self.recorder.now() if self.recorder else 0
        with torch.set_grad_enabled(self._trains):
            for entry in self._list:
                if isinstance(entry, _Batch):
                    self._post_listed(entry)
                else:
                    self._guarded(entry)
        for transfer, ticket, _ in self._sending:
            self._guard(transfer, ticket)
        self._sending.clear()
        if self.recorder:
            self.recorder.add(Kind.RUN, self.table.name, began, self.recorder.now())
        if self._inbox or self._outbox or self.store.depth:
            raise RuntimeError(
                f"pipeline rank {self.rank}: the table left behind {len(self._inbox)} receives, {len(self._outbox)} "
                f"outputs and {self.store.depth} weight-gradient entries"
            )

    def _guarded(self, part_list: tuple[_Part, ...]) -> None:
        try:
            self._compute(part_list)
        except PeerLost:
            raise
        except Exception as error:
            where = " beside ".join(_describe(part.compute) for part in part_list)
            if is_communication(error):
                raise PeerLost(f"pipeline rank {self.rank}: {where} lost a peer: {_first_line(error)}") from error
            error.add_note(f"pipeline rank {self.rank}, {where}")
            raise

    # Communication ----------------------------------------------------------------------------------------------------

    def _guard(self, transfer: Transfer, ticket: Ticket) -> None:
        try:
            ticket.wait()
        except RuntimeError as error:
            raise self._lost([transfer], error) from error

    def _lost(self, transfers: Sequence[Transfer], error: BaseException) -> PeerLost:
        what = " with ".join(f"{t} (stage {t.stage}, chunk {t.chunk}, peer {t.peer})" for t in transfers)
        return PeerLost(f"pipeline rank {self.rank}: {what} did not complete: {_first_line(error)}")

    def _post(self, batch: _Batch) -> None:
        self._posted.add(id(batch))
        outbox, device = self._outbox, self.device
        sent = {boundary: outbox.pop(boundary) for boundary in batch.sends}
        with device.side(PIPELINE, [event for _, event in sent.values()]):
            operations, tensors = [], []
            for move in batch.moves:
                if move.shape is None:
                    tensor = sent[move.boundary][0].contiguous()
                else:
                    tensor = torch.empty(move.shape(move.transfer.chunk), dtype=self.dtype, device=device.where)
                operations.append(PointToPoint(move.shape is None, tensor, move.peer, move.tag))
                tensors.append(tensor)
            events = self._issued(batch, tensors, self.recorder) if self.recorder else []
            try:
                tickets = device.transfer(operations)
            except Exception as error:
                if not is_communication(error):
                    raise
                raise self._lost([move.transfer for move in batch.moves], error) from error
        one = len(tickets) != len(tensors)  # NCCL has one for the batch, gloo one for each operation
        for i, (move, tensor) in enumerate(zip(batch.moves, tensors, strict=True)):
            ticket = tickets[0 if one else i]
            if self.recorder:
                ticket = TracedTicket(ticket, self.recorder, events[i], Channel.PIPELINE)
            if move.shape is None:
                self._sending.append((move.transfer, ticket, tensor))
            else:
                receive = _Receive(self, move.transfer, ticket, tensor)
                self._inbox[move.boundary] = Pending((receive,), receive.arrived)

    def _issued(self, batch: _Batch, tensors: list[torch.Tensor], recorder: Recorder) -> list[Span]:
        return [recorder.transfer(m.transfer, m.peer, t.nbytes) for m, t in zip(batch.moves, tensors, strict=True)]

    def _post_listed(self, batch: _Batch) -> None:
        """Post a batch where the list has it, unless that was done as soon as its data existed."""
        if id(batch) not in self._posted:
            if not all(boundary in self._outbox for boundary in batch.sends):
                raise RuntimeError(f"pipeline rank {self.rank}: {batch.post} is posted before its data exists")
            self._post(batch)
        # Oldest first: asking all of them at every post costs more than it frees, since gloo's sends, done or not, say
        # that they are under way until somebody waits. Complete is not the same as succeeded: only waiting tells, and
        # here it does not block.
        sending = self._sending
        while sending and sending[0][1].is_completed():
            transfer, ticket, _ = sending.popleft()
            self._guard(transfer, ticket)

    def _hand_on(self, part: _Part, tensor: torch.Tensor) -> None:
        """An output exists: post the batches right after its action that miss nothing any more, in order."""
        if part.makes is None:
            return
        if part.stays:
            self._inbox[part.makes] = Pending((), lambda: tensor)
            return
        self._outbox[part.makes] = tensor, self.device.mark()
        for batch in part.following:
            if id(batch) in self._posted:
                continue
            if not all(boundary in self._outbox for boundary in batch.sends):
                break
            self._post(batch)

    # Compute ----------------------------------------------------------------------------------------------------------

    def _start(self, part: _Part) -> Running:
        c = part.compute
        stage = self.stages[c.direction, c.stage]
        received = self._inbox.pop(part.takes) if part.takes is not None else None
        if c.op is Op.F:
            return Running(stage.forward_program(c.chunk, received), recorder=self.recorder)
        program = stage.backward_program(c.chunk, received, c.op is Op.I, lambda grad: self._hand_on(part, grad))
        return Running(program, recorder=self.recorder)

    def _compute(self, part_list: tuple[_Part, ...]) -> None:
        start, self._waited = time.perf_counter(), 0.0
        first = part_list[0]
        if len(part_list) == 2:
            output, _ = overlap(self._start(first), self._start(part_list[1]), self.order)
            self._hand_on(first, output)
        elif first.compute.op is Op.W:
            self.store.run_oldest((first.compute.direction, first.compute.stage, first.compute.chunk))
        else:
            result = self._start(first).drain()
            if first.compute.op is Op.F:
                self._hand_on(first, result)
        end = time.perf_counter()
        for part in part_list:
            c = part.compute
            measured = Measured(self.rank, c.op.value, c.direction, c.stage, c.chunk, start, end, self._waited)
            self.measured.append(measured)
            if self.recorder:
                self.recorder.action(c, round(start * 1e9), round(end * 1e9))


class _Receive:
    """A receive that says what it was when it fails, books the time waited for it, and hands its tensor to compute."""

    __slots__ = ("executor", "tensor", "ticket", "transfer")

    def __init__(self, executor: Executor, transfer: Transfer, ticket: Ticket, tensor: torch.Tensor) -> None:
        self.executor, self.transfer, self.ticket, self.tensor = executor, transfer, ticket, tensor

    def wait(self) -> None:
        start = time.perf_counter()
        self.executor._guard(self.transfer, self.ticket)
        self.executor._waited += time.perf_counter() - start

    def is_completed(self) -> bool:
        return self.ticket.is_completed()

    def arrived(self) -> torch.Tensor:
        self.executor.device.adopt(self.tensor)
        return self.tensor


def _describe(c: Compute) -> str:
    return f"{c} (stage {c.stage}, chunk {c.chunk})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_communication(error: BaseException) -> bool:
    """Whether an error comes from the network or a peer. gloo raises plain RuntimeError whose text begins with a source
    file of its own; everything else that torch.distributed raises is a DistError."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())

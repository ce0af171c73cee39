"""The executor: runs exactly one rank's list of actions on real processes. It owns no schedule knowledge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistError

from parallel.expert.contract import Pending
from parallel.pipeline.contract import PipelineStage
from parallel.pipeline.interleave import Running, overlap
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Action, Compute, Op, Pair, Payload, Post, Table, Transfer

Key = tuple[Payload, int, int, int]


class PeerLost(RuntimeError):
    """A peer failed or fell silent; the message names action, stage, chunk and peer."""


@dataclass(frozen=True)
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


def _key(t: Transfer) -> Key:
    return t.payload, t.direction, t.stage, t.chunk


def _tag(t: Transfer, table: Table) -> int:
    chunk = t.chunk * 2 + (t.payload is Payload.GRADIENT)
    return (chunk * table.stages + t.stage) * table.directions + t.direction


class Executor:
    """Runs `table.actions[rank]` with this rank's stages.

    stages: {(direction, stage): PipelineStage}. global_rank: pipeline rank -> global rank. dtype: of what crosses
    stages. order: the step order of F&B pairs. One instance runs one step.
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
    ) -> None:
        self.table, self.rank, self.stages, self.store = table, rank, stages, store
        self.dtype, self.order, self.global_rank = dtype, order, global_rank
        self.actions: tuple[Action, ...] = table.actions[rank]
        self.measured: list[Measured] = []
        self._reset()

    def _reset(self) -> None:
        self._inbox: dict[Key, Pending[torch.Tensor]] = {}
        self._outbox: dict[Key, torch.Tensor] = {}
        self._sending: list[tuple[Transfer, dist.Work, torch.Tensor]] = []
        self._posts: list[tuple[int, Post]] = []
        self._waited = 0.0

    def run(self) -> None:
        """One step: all actions, then wait until every send is complete."""
        self._reset()
        self.measured = []
        self._posts = [(i, action) for i, action in enumerate(self.actions) if isinstance(action, Post)]
        self._posts.reverse()
        for index, action in enumerate(self.actions):
            if isinstance(action, Post):
                self._post_through(index)
                continue
            try:
                self._compute(index, action)
            except RuntimeError as error:
                if isinstance(error, PeerLost) or not is_communication(error):
                    raise
                raise PeerLost(f"pipeline rank {self.rank}: {action} lost a peer: {_first_line(error)}") from error
        for transfer, work, _ in self._sending:
            self._guard(transfer, work)
        self._sending = []
        if self._inbox or self._outbox or self.store.depth:
            raise RuntimeError(
                f"pipeline rank {self.rank}: the table left behind {len(self._inbox)} receives, {len(self._outbox)} "
                f"outputs and {self.store.depth} weight-gradient entries"
            )

    # Communication ----------------------------------------------------------------------------------------------------

    def _guard(self, transfer: Transfer, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerLost(
                f"pipeline rank {self.rank}: {transfer} (stage {transfer.stage}, chunk {transfer.chunk}, peer "
                f"{transfer.peer}) did not complete: {_first_line(error)}"
            ) from error

    def _ready(self, post: Post) -> bool:
        return all(not t.send or _key(t) in self._outbox for t in post.transfers)

    def _post(self, post: Post) -> None:
        operations, buffers = [], []
        for t in post.transfers:
            if t.send:
                tensor = self._outbox.pop(_key(t)).contiguous()
            else:
                shape = self.stages[(t.direction, t.stage)]
                rows = shape.boundary_shape(t.chunk) if t.payload is Payload.ACTIVATION else shape.output_shape(t.chunk)
                tensor = torch.empty(rows, dtype=self.dtype)
            kind = dist.isend if t.send else dist.irecv
            operations.append(dist.P2POp(kind, tensor, self.global_rank(t.peer), tag=_tag(t, self.table)))
            buffers.append(tensor)
        works = dist.batch_isend_irecv(operations)
        # NCCL returns one work for the batch, gloo one per operation.
        per_transfer = works if len(works) == len(operations) else [works[0]] * len(operations)
        for t, work, tensor in zip(post.transfers, per_transfer, buffers, strict=True):
            if t.send:
                self._sending.append((t, work, tensor))
            else:
                self._inbox[_key(t)] = Pending([_Guarded(self, t, work)], partial(_same, tensor))

    def _post_through(self, index: int) -> None:
        """Post every batch up to list position `index`, in order."""
        while self._posts and self._posts[-1][0] <= index:
            _, post = self._posts.pop()
            if not self._ready(post):
                raise RuntimeError(f"pipeline rank {self.rank}: {post} is posted before its data exists")
            self._post(post)
        under_way = []
        for transfer, work, tensor in self._sending:
            # Complete is not the same as succeeded: only waiting tells, and here it does not block.
            if work.is_completed():
                self._guard(transfer, work)
            else:
                under_way.append((transfer, work, tensor))
        self._sending = under_way

    def _emit(self, index: int, key: Key, tensor: torch.Tensor) -> None:
        """An output exists: post the batch right after list position `index` if nothing it sends is missing."""
        self._outbox[key] = tensor
        if self._posts and self._posts[-1][0] == index + 1 and self._ready(self._posts[-1][1]):
            self._post(self._posts.pop()[1])

    # Compute ----------------------------------------------------------------------------------------------------------

    def _program(self, index: int, action: Compute) -> Running:
        stage = self.stages[(action.direction, action.stage)]
        last = self.table.stages - 1
        d, s, c = action.direction, action.stage, action.chunk
        if action.op is Op.F:
            received = self._inbox.pop((Payload.ACTIVATION, d, s, c)) if s > 0 else None
            return Running(stage.forward_program(c, received))
        received = self._inbox.pop((Payload.GRADIENT, d, s, c)) if s < last else None

        def emit(grad: torch.Tensor) -> None:
            if s > 0:
                self._emit(index, (Payload.GRADIENT, d, s - 1, c), grad)

        return Running(stage.backward_program(c, received, action.op is Op.I, emit))

    def _finish(self, index: int, action: Compute, result: Any) -> None:
        if action.op is Op.F and action.stage < self.table.stages - 1:
            d, s, c = action.direction, action.stage, action.chunk
            self._emit(index, (Payload.ACTIVATION, d, s + 1, c), result)

    def _compute(self, index: int, action: Compute | Pair) -> None:
        start, self._waited = time.perf_counter(), 0.0
        if isinstance(action, Pair):
            parts: tuple[Compute, ...] = (action.forward, action.backward)
            forward, backward = (self._program(index, part) for part in parts)
            output, _ = overlap(forward, backward, self.order)
            self._finish(index, action.forward, output)
        elif action.op is Op.W:
            parts = (action,)
            self.store.run_oldest((action.direction, action.stage, action.chunk))
        else:
            parts = (action,)
            self._finish(index, action, self._program(index, action).drain())
        end = time.perf_counter()
        for part in parts:
            op = str(part.op)
            self.measured.append(
                Measured(self.rank, op, part.direction, part.stage, part.chunk, start, end, self._waited)
            )


class _Guarded:
    """A receive that says what it was when it fails, and books the time waited for it."""

    def __init__(self, executor: Executor, transfer: Transfer, work: dist.Work) -> None:
        self.executor, self.transfer, self.work = executor, transfer, work

    def wait(self) -> None:
        start = time.perf_counter()
        self.executor._guard(self.transfer, self.work)
        self.executor._waited += time.perf_counter() - start


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_communication(error: BaseException) -> bool:
    """Whether an error comes from the network or a peer. gloo raises plain RuntimeError whose text begins with a source
    file of its own; everything else that torch.distributed raises is a DistError."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())

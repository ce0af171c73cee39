"""The action table: a pipeline schedule as data.

A schedule is a pure function `(stages, micro_batches) -> Table`. Four things read a table and nothing else knows how
schedules work: the checker, the simulator, the drawing and the executor.

Names follow DeepSeek's DualPipe: F forward, B full backward, I input gradient only (the weight-gradient closures are
queued), W run the oldest queued weight gradients, `F&B` an overlapped pair. A *chunk* is one micro-batch of one
direction; direction 0 enters at pipeline rank 0, direction 1 at the last rank. Stage s of direction d lives on
pipeline rank `table.rank_of[d][s]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """What a compute action does to its chunk."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741  (DeepSeek's and zero-bubble's own letter)
    W = "W"


@dataclass(frozen=True)
class Compute:
    """One chunk through one stage. `W` names the chunk whose weight gradients it must find at the queue's head."""

    op: Op
    direction: int
    stage: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.op}{self.direction}.{self.chunk}@{self.stage}"


@dataclass(frozen=True)
class Pair:
    """A forward and a full backward of different chunks, advanced together (`F&B`)."""

    forward: Compute
    backward: Compute

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


class Payload(StrEnum):
    """What crosses between stages: a stage's output, or the gradient of a stage's input."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class Transfer:
    """One tensor from or to `peer` (a pipeline rank).

    `stage` is the stage that *consumes* the tensor: F(stage) consumes an activation, B/I(stage) a gradient. A transfer
    and its counterpart on the peer agree in everything but `send` and `peer`.
    """

    send: bool
    payload: Payload
    direction: int
    stage: int
    chunk: int
    peer: int

    def __str__(self) -> str:
        arrow = f"->{self.peer}" if self.send else f"<-{self.peer}"
        return f"{self.payload[0]}{self.direction}.{self.chunk}@{self.stage}{arrow}"


@dataclass(frozen=True)
class Post:
    """Transfers posted together, in this order, as one batch (`batch_isend_irecv`).

    Sends come from compute actions earlier in the rank's list. The executor may post the batch that directly follows a
    compute action as soon as all its send data exists (dX before the attention weight gradient runs); the order of
    batches never changes. A compute action waits for the receives that feed it; nothing else waits but the end of the
    step, which waits for sends.
    """

    transfers: tuple[Transfer, ...]

    def __str__(self) -> str:
        return "[" + " ".join(map(str, self.transfers)) + "]"


Action = Compute | Pair | Post


@dataclass(frozen=True)
class Table:
    """A schedule for one pipeline.

    ranks: pipeline ranks. stages: pipeline stages of each direction. micro_batches: over all directions together.
    rank_of[direction][stage] -> pipeline rank. actions[rank] -> that rank's list.
    """

    name: str
    ranks: int
    stages: int
    micro_batches: int
    rank_of: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def directions(self) -> int:
        return len(self.rank_of)

    def stages_of(self, rank: int) -> list[tuple[int, int]]:
        """[(direction, stage)] held by a pipeline rank, direction-major."""
        return [(d, s) for d, row in enumerate(self.rank_of) for s, r in enumerate(row) if r == rank]

    def chunks(self, direction: int) -> int:
        """Chunks (micro-batches) that travel in `direction`."""
        found = {a.chunk for row in self.actions for a in flatten(row) if a.op is Op.F and a.direction == direction}
        return len(found)


def flatten(actions: tuple[Action, ...]) -> list[Compute]:
    """The compute actions of one rank in order, pairs opened (forward first)."""
    out: list[Compute] = []
    for action in actions:
        if isinstance(action, Pair):
            out += [action.forward, action.backward]
        elif isinstance(action, Compute):
            out.append(action)
    return out

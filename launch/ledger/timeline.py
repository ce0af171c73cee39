"""What a rank holds at every compute action of a simulated schedule: chunks by stage and state, queue, boundaries."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from parallel.schedule.actions import Compute, Op, Payload, Post, Table
from parallel.schedule.boundary import Boundary, boundary_of, consumed, parts, produced, stays
from parallel.schedule.simulator import Simulation

LIVE, QUEUED, TURNING = "after F", "after I", "during I"


@dataclass(frozen=True)
class Situation:
    """What memory depends on. held: ((stage, state), chunks), sorted; a chunk is live from the start of its F to the
    end of its B or W, and `during I` it may have the size of either state. running: (op, stage) of the action.
    boundaries: tensors between stages that are received and unused, or made and not yet sent."""

    held: tuple[tuple[tuple[int, str], int], ...]
    running: tuple[tuple[Op, int], ...]
    boundaries: int


@dataclass(frozen=True)
class Moment:
    """A situation from `start` to `end`, in the unit of the simulation's costs."""

    start: float
    end: float
    situation: Situation


def walk(simulation: Simulation, rank: int) -> list[Moment]:
    """One moment for each compute action of `rank`.

    A receive buffer exists from its post on: an activation until its F (which keeps it), a gradient to the end of its
    B or I. What is sent exists until the compute action after its post has ended.
    """
    table = simulation.table
    waiting: set[Boundary] = set()
    unsent: set[Boundary] = set()
    flying: set[Boundary] = set()
    held: Counter[tuple[int, str]] = Counter()
    timed = iter(simulation.timed[rank])
    found = []
    for action in table.actions[rank]:
        if isinstance(action, Post):
            for transfer in action.transfers:
                boundary = boundary_of(transfer)
                if transfer.send:
                    unsent.discard(boundary)
                    flying.add(boundary)
                else:
                    waiting.add(boundary)
            continue
        at = next(timed)
        both = parts(action)
        for part in both:
            _begin(part, held, waiting, table)
        running = tuple((part.op, part.stage) for part in both)
        situation = Situation(
            tuple(sorted((key, count) for key, count in held.items() if count)),
            running,
            len(waiting) + len(unsent) + len(flying),
        )
        found.append(Moment(at.start, at.end, situation))
        flying.clear()
        for part in both:
            _end(part, held, waiting, unsent, table)
    return found


def _begin(part: Compute, held: Counter[tuple[int, str]], waiting: set[Boundary], table: Table) -> None:
    if part.op is Op.F:
        held[part.stage, LIVE] += 1
        needed = consumed(part, table.stages)
        if needed is not None:
            waiting.discard(needed)
    elif part.op is Op.I:
        held[part.stage, LIVE] -= 1
        held[part.stage, TURNING] += 1


def _end(
    part: Compute, held: Counter[tuple[int, str]], waiting: set[Boundary], unsent: set[Boundary], table: Table
) -> None:
    if part.op is Op.B:
        held[part.stage, LIVE] -= 1
    elif part.op is Op.I:
        held[part.stage, TURNING] -= 1
        held[part.stage, QUEUED] += 1
    elif part.op is Op.W:
        held[part.stage, QUEUED] -= 1
    needed = consumed(part, table.stages)
    if needed is not None and needed.payload is Payload.GRADIENT:
        waiting.discard(needed)
    made = produced(part, table.stages)
    if made is not None:
        (waiting if stays(made, table) else unsent).add(made)

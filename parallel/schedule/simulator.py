"""When every action of a table starts and ends, given what each kind of action costs.

Three ways to run a table:

- `dependencies`: no transfers at all; an action waits only for the actions that make its inputs.
- `gloo`: transfers start when both sides have posted them and are matched by name, in any order.
- `nccl`: the batches of a rank run one after another in the order posted. A batch begins when the one before it is
  complete; a member moves when the batches of both sides have begun; the batch is complete when all its members have
  moved, and only then may an action use what the batch received.

A rank's own actions run in list order and a post takes no time. Links are not shared: transfers never slow each other.
The order of everything is fixed by the table, so whether a run gets stuck does not depend on the costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from parallel.schedule.actions import Action, Compute, Op, Pair, Post, Table
from parallel.schedule.boundary import Boundary, boundary_of, consumed, parts, produced, stays

Mode = Literal["dependencies", "gloo", "nccl"]


@dataclass(frozen=True)
class Costs:
    """Durations in any one unit: of each kind of action, and of a transfer once both sides are there.

    The defaults are the unit costs of the DualPipe figure: a full backward is twice a forward, and an overlapped pair
    takes as long as its two halves. Override `of` for costs that differ by stage or chunk.

    all_to_all_forward, all_to_all_backward: dispatch and combine of a chunk's experts, which the times above leave out.
    They are added in full to an F, and to a B or I; a pair hides them behind its other half, all but `exposed_share` of
    their sum. The default share is DeepSeek's published trace of such a pair (profile-data, train.json: 4.2 ms exposed
    of 114.5 ms).
    """

    forward: float = 1.0
    backward: float = 2.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    pair: float = 3.0
    send: float = 0.0
    all_to_all_forward: float = 0.0
    all_to_all_backward: float = 0.0
    exposed_share: float = 0.037

    def of(self, action: Compute | Pair) -> float:
        if isinstance(action, Pair):
            return self.pair + self.exposed_share * (self.all_to_all_forward + self.all_to_all_backward)
        match action.op:
            case Op.F:
                return self.forward + self.all_to_all_forward
            case Op.B:
                return self.backward + self.all_to_all_backward
            case Op.I:
                return self.input_grad + self.all_to_all_backward
            case Op.W:
                return self.weight_grad

    def divided(self, parts: int) -> Costs:
        """Costs of a stage with one `parts`-th of the layers; a transfer still carries the same tensor."""
        return replace(
            self,
            forward=self.forward / parts,
            backward=self.backward / parts,
            input_grad=self.input_grad / parts,
            weight_grad=self.weight_grad / parts,
            pair=self.pair / parts,
            all_to_all_forward=self.all_to_all_forward / parts,
            all_to_all_backward=self.all_to_all_backward / parts,
        )


@dataclass(frozen=True)
class Timed:
    """One compute action with its start and end, in the unit of the costs."""

    rank: int
    action: Compute | Pair
    start: float
    end: float


@dataclass(frozen=True)
class Held:
    """From `time` on: chunks whose activations a rank holds (from the start of F to the end of B or W), and how many
    of them only wait for their W."""

    time: float
    live: int
    queued: int


@dataclass(frozen=True)
class Simulation:
    """`timed[rank]`: that rank's compute actions in order."""

    table: Table
    mode: Mode
    timed: tuple[tuple[Timed, ...], ...]

    @property
    def makespan(self) -> float:
        return max(t.end for row in self.timed for t in row)

    def bubble(self, rank: int) -> float:
        """Time within the makespan in which `rank` computes nothing."""
        return self.makespan - sum(t.end - t.start for t in self.timed[rank])

    def held(self, rank: int) -> list[Held]:
        """What `rank` holds over time: one entry for each moment at which something changes, in order of time."""
        changes: dict[float, list[int]] = {}

        def change(time: float, live: int, queued: int) -> None:
            entry = changes.setdefault(time, [0, 0])
            entry[0] += live
            entry[1] += queued

        for timed in self.timed[rank]:
            for part in parts(timed.action):
                if part.op is Op.F:
                    change(timed.start, 1, 0)
                elif part.op is Op.B:
                    change(timed.end, -1, 0)
                elif part.op is Op.I:
                    change(timed.end, 0, 1)
                else:
                    change(timed.end, -1, -1)
        out, live, queued = [], 0, 0
        for time in sorted(changes):
            live += changes[time][0]
            queued += changes[time][1]
            out.append(Held(time, live, queued))
        return out


class Deadlock(RuntimeError):
    """Nothing can move. `waiting[rank]` is the compute action at which each stuck rank stands, None where its list is
    done but a batch it posted never completes; `blocked[rank]` (nccl) is the batch at the head of its communicator."""

    def __init__(self, mode: Mode, waiting: dict[int, Action | None], blocked: dict[int, Post]) -> None:
        self.mode, self.waiting, self.blocked = mode, waiting, blocked
        stuck = [f"rank {rank} at {action or 'the end of the step'}" for rank, action in waiting.items()]
        super().__init__(f"deadlock in {mode} mode: " + ", ".join(stuck))


def simulate(table: Table, costs: Costs | None = None, mode: Mode = "gloo") -> Simulation:
    """Start and end of every compute action; raises `Deadlock` when the table gets stuck."""
    player = _Player(table, costs or Costs(), mode)
    player.run()
    return Simulation(table, mode, tuple(tuple(row) for row in player.timed))


@dataclass
class _Communicator:
    """One rank's batches in nccl mode: those before `head` are complete; the one at `head` began at `began`."""

    batches: list[tuple[float, Post]] = field(default_factory=list)
    head: int = 0
    began: float | None = None
    free_at: float = 0.0
    moved: dict[Boundary, float] = field(default_factory=dict)  # members of the head batch that have moved


class _Player:
    def __init__(self, table: Table, costs: Costs, mode: Mode) -> None:
        self.table, self.costs, self.mode = table, costs, mode
        self.clock = [0.0] * table.ranks
        self.cursor = [0] * table.ranks
        self.timed: list[list[Timed]] = [[] for _ in range(table.ranks)]
        self.made: dict[Boundary, float] = {}
        self.arrived: dict[Boundary, float] = {}
        self.posted: dict[tuple[Boundary, bool], float] = {}
        self.communicators = [_Communicator() for _ in range(table.ranks)]

    def run(self) -> None:
        progress = True
        while progress:
            progress = False
            for rank in range(self.table.ranks):
                progress |= self._advance(rank)
        stuck = {r: row[self.cursor[r]] for r, row in enumerate(self.table.actions) if self.cursor[r] < len(row)}
        blocked = {r: c.batches[c.head][1] for r, c in enumerate(self.communicators) if c.head < len(c.batches)}
        if stuck or blocked:
            raise Deadlock(self.mode, {r: stuck.get(r) for r in sorted(stuck.keys() | blocked.keys())}, blocked)

    def _advance(self, rank: int) -> bool:
        row, before = self.table.actions[rank], self.cursor[rank]
        while self.cursor[rank] < len(row):
            action = row[self.cursor[rank]]
            if isinstance(action, Post):
                self._post(rank, action)
            elif not self._compute(rank, action):
                break
            self.cursor[rank] += 1
        return self.cursor[rank] > before

    def _compute(self, rank: int, action: Compute | Pair) -> bool:
        start = self.clock[rank]
        for part in parts(action):
            needed = consumed(part, self.table.stages)
            if needed is None:
                continue
            time = self._ready(needed)
            if time is None:
                return False
            start = max(start, time)
        end = start + self.costs.of(action)
        for part in parts(action):
            made = produced(part, self.table.stages)
            if made is not None:
                self.made[made] = end
        self.timed[rank].append(Timed(rank, action, start, end))
        self.clock[rank] = end
        return True

    def _ready(self, needed: Boundary) -> float | None:
        if stays(needed, self.table):
            return self.made.get(needed)
        if self.mode == "dependencies":
            made = self.made.get(needed)
            return None if made is None else made + self.costs.send
        return self.arrived.get(needed)

    def _post(self, rank: int, post: Post) -> None:
        now = self.clock[rank]
        if self.mode == "gloo":
            for transfer in post.transfers:
                boundary = boundary_of(transfer)
                self.posted[boundary, transfer.send] = now
                counterpart = self.posted.get((boundary, not transfer.send))
                if counterpart is not None:
                    self.arrived[boundary] = max(now, counterpart) + self.costs.send
        elif self.mode == "nccl":
            self.communicators[rank].batches.append((now, post))
            self._pump(rank)

    def _pump(self, first: int) -> None:
        """Begin, match and complete batches, starting from what changed at rank `first`, until nothing moves."""
        awake = [first]
        while awake:
            rank = awake.pop()
            mine = self.communicators[rank]
            while mine.head < len(mine.batches):
                posted_at, post = mine.batches[mine.head]
                if mine.began is None:
                    mine.began = max(posted_at, mine.free_at)
                for transfer in post.transfers:
                    boundary = boundary_of(transfer)
                    theirs = self.communicators[transfer.peer]
                    if boundary in mine.moved or theirs.began is None:
                        continue
                    members = theirs.batches[theirs.head][1].transfers
                    if any(boundary_of(t) == boundary and t.send != transfer.send and t.peer == rank for t in members):
                        moved_at = max(mine.began, theirs.began) + self.costs.send
                        mine.moved[boundary] = theirs.moved[boundary] = moved_at
                        awake.append(transfer.peer)
                if len(mine.moved) < len(post.transfers):
                    break
                mine.free_at = max(mine.moved.values(), default=mine.began)
                for transfer in post.transfers:
                    if not transfer.send:
                        self.arrived[boundary_of(transfer)] = mine.free_at
                mine.head += 1
                mine.began = None
                mine.moved = {}

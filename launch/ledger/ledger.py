"""The ledger itself: bytes of every rank by kind at its fullest moment, over the simulated timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from launch.ledger.caches import BF16, INT64, stage_after_forward, stage_after_input_gradient
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents, stage_contents
from launch.ledger.load import Load, balanced_load
from launch.ledger.state import Bucket, held_state, optimizer_transient, rank_buckets
from launch.ledger.timeline import LIVE, QUEUED, TURNING, Moment, Situation, walk
from launch.ledger.working import all_to_all, working_set
from model.config import ModelConfig
from model.partition import stage_layout
from parallel.schedule.actions import Op
from parallel.schedule.registry import build
from parallel.schedule.simulator import simulate

# Bytes that no tensor of the run explains: CUDA context and loaded kernels, NCCL's buffers of every communicator, the
# allocator's rounding. An assumption, not a measurement: set it with reserve=.
RESERVE = 2_000_000_000
BUDGET = 80_000_000_000
KINDS = (
    "BF16 weights",
    "FP8 weights",
    "gradient accumulators",
    "FP32 masters",
    "BF16 moments",
    "batches",
    "caches",
    "weight-gradient queue",
    "working set",
    "all-to-all",
    "boundaries",
    "publishing",
    "reserve",
)
Lines = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """A run as the ledger sees it. data: copies of the whole pipeline x expert grid."""

    model: ModelConfig
    schedule: str
    pipeline: int
    expert: int
    data: int
    sequences: int = 1
    length: int = 4096
    layout: str = ""
    reserve: int = RESERVE

    @cached_property
    def contents(self) -> list[Contents]:
        """The stages. ValueError: a layout that does not fit."""
        table = build(self.schedule, self.pipeline, 2 * self.pipeline)
        return stage_contents(self.model, stage_layout(self.model, table, self.layout))

    @cached_property
    def load(self) -> Load:
        return balanced_load(self.model, self.sequences, self.length, self.expert)


@dataclass
class RankTimeline:
    """One pipeline rank of a schedule: what it holds, and when. None of it depends on the choices."""

    plan: Plan
    rank: int
    micro_batches: int
    stages: tuple[int, ...]
    buckets: list[Bucket]
    moments: list[Moment]
    situations: list[Situation] = field(init=False)

    def __post_init__(self) -> None:
        self.situations = list(dict.fromkeys(moment.situation for moment in self.moments))


def timelines(plan: Plan, micro_batches: int) -> list[RankTimeline]:
    """All pipeline ranks. ValueError: numbers for which the schedule has no table."""
    table = build(plan.schedule, plan.pipeline, micro_batches)
    simulation = simulate(table)
    return [
        RankTimeline(
            plan,
            rank,
            micro_batches,
            tuple(sorted({stage for _, stage in table.stages_of(rank)})),
            rank_buckets(plan.model, plan.contents, table, rank, plan.expert, plan.data),
            walk(simulation, rank),
        )
        for rank in range(table.ranks)
    ]


class Sizes:
    """Bytes of a chunk in every state, and of what runs, for one set of choices."""

    def __init__(self, plan: Plan, choices: Choices) -> None:
        self.plan, self.choices = plan, choices
        config, load = plan.model, plan.load
        self.boundary = BF16 * load.tokens * config.hidden_size
        # Token ids, labels, both for each MTP depth, and the mask of real tokens: of every micro-batch, all step long.
        self.batch = load.tokens * (INT64 * (2 + 2 * config.mtp_depth) + 1)
        self.held: dict[tuple[int, str], int] = {}
        self.working: dict[tuple[Op, int], int] = {}
        self.flying: dict[tuple[Op, int], int] = {}
        for stage, contents in enumerate(plan.contents):
            live = sum(stage_after_forward(config, contents, load, choices).values())
            queued = sum(stage_after_input_gradient(config, contents, load, choices).values())
            self.held |= {(stage, LIVE): live, (stage, QUEUED): queued, (stage, TURNING): max(live, queued)}
            for op in Op:
                backward = op is not Op.F
                self.working[op, stage] = working_set(config, contents, load, plan.expert, choices, backward)
                # W moves nothing.
                moving = 0 if op is Op.W else all_to_all(config, contents, load, choices, backward)
                self.flying[op, stage] = moving

    def lines(self, situation: Situation) -> Lines:
        """Bytes that come and go: chunks, queue, working set of what runs, transfers in flight."""
        caches = sum(self.held[key] * count for key, count in situation.held if key[1] != QUEUED)
        queue = sum(self.held[key] * count for key, count in situation.held if key[1] == QUEUED)
        # One step computes at a time; both halves of a pair may have a transfer in flight.
        return {
            "caches": caches,
            "weight-gradient queue": queue,
            "working set": max(self.working[part] for part in situation.running),
            "all-to-all": sum(self.flying[part] for part in situation.running),
            "boundaries": self.boundary * situation.boundaries,
        }

    def permanent(self, timeline: RankTimeline) -> Lines:
        """Bytes held all step long."""
        batches = self.batch * timeline.micro_batches
        return held_state(timeline.buckets, self.choices) | {"batches": batches, "reserve": self.plan.reserve}


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a rank: bytes by kind, and what ran. `optimizer`: the total while weights are published,
    after the last chunk is gone."""

    rank: int
    micro_batches: int
    lines: Lines
    running: str
    chunks: int
    queued: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(self.lines.values())


def peak(timeline: RankTimeline, sizes: Sizes) -> Peak:
    """Where `timeline` holds most."""
    permanent = sizes.permanent(timeline)
    found = [(sizes.lines(situation), situation) for situation in timeline.situations]
    lines, situation = max(found, key=lambda entry: sum(entry[0].values()))
    publishing = optimizer_transient(timeline.buckets, sizes.choices)
    optimizer = sum(permanent.values()) + publishing
    running = "&".join(f"{op}@{stage}" for op, stage in situation.running)
    chunks = sum(count for _, count in situation.held)
    queued = sum(count for (_, state), count in situation.held if state == QUEUED)
    total = permanent | lines
    if sum(total.values()) < optimizer:
        total, running, chunks, queued = permanent | {"publishing": publishing}, "publishing weights", 0, 0
    ordered = {kind: total[kind] for kind in KINDS if kind in total}
    return Peak(timeline.rank, timeline.micro_batches, ordered, running, chunks, queued, optimizer)


@dataclass(frozen=True)
class RankClass:
    """Ranks whose stages have the same contents."""

    name: str
    ranks: tuple[int, ...]
    parameters: int


def rank_classes(plan: Plan, ranks: Sequence[RankTimeline]) -> list[RankClass]:
    """In order of their first rank."""
    found: dict[str, list[RankTimeline]] = {}
    for timeline in ranks:
        names = sorted((plan.contents[stage].describe() for stage in timeline.stages), reverse=True)
        found.setdefault(" / ".join(names), []).append(timeline)
    return [
        RankClass(name, tuple(t.rank for t in members), sum(b.elements for b in members[0].buckets))
        for name, members in found.items()
    ]

"""Where the parts of a model live in a layout, as `RankModel` places them: read off it, on meta."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.count import part_flops
from model.partition import RankModel, stage_layout
from parallel.layout import Layout, describe, edges
from parallel.schedule.actions import Table
from parallel.schedule.registry import build
from parallel.topology import Topology


@dataclass(frozen=True)
class StagePlace:
    """One pipeline stage. ranks: the pipeline ranks that hold it, by direction. flops: per token, with MTP."""

    stage: int
    contents: str
    layers: tuple[int, int]
    embedding: bool
    output: bool
    ranks: tuple[int, ...]
    flops: float


@dataclass(frozen=True)
class RankPlace:
    """What every rank of one pipeline rank holds. stages: (direction, stage). mirrors: pipeline ranks of the same
    stages. first, last: its global ranks in the first data replica. parameters: of one rank, `expert_parameters` of
    them in routed experts. replicas: how many ranks hold the same, by kind of parameters. flops: per token of the
    batch, both directions sharing it.
    """

    rank: int
    stages: tuple[tuple[int, int], ...]
    mirrors: tuple[int, ...]
    first: int
    last: int
    parameters: int
    expert_parameters: int
    replicas: dict[str, tuple[int, ...]]
    flops: float


@dataclass(frozen=True)
class Placement:
    """A model over data x pipeline x expert ranks. experts_per_rank: of a layer, on each expert rank.
    embedding_at_output: the last stage uses the embedding too (MTP, or a tied head).
    """

    schedule: str
    layout: str
    data: int
    pipeline: int
    expert: int
    experts_per_rank: int
    embedding_at_output: bool
    stages: list[StagePlace]
    ranks: list[RankPlace]


def place(
    config: ModelConfig, schedule: str, pipeline: int, expert: int, ranks: int, text: str, length: int
) -> Placement:
    """Raises ValueError, one line, for numbers that do not fit one another or the model."""
    if ranks % (pipeline * expert):
        raise ValueError(f"ranks={ranks}: must be a multiple of pipeline x expert = {pipeline * expert}")
    table = build(schedule, pipeline, 2 * pipeline)
    layout = stage_layout(config, table, text)
    data = ranks // (pipeline * expert)
    stages = _stages(config, table, layout, length)
    found = []
    for rank in range(pipeline):
        topology = Topology(data, pipeline, expert, rank * expert)
        model = RankModel(config, topology, table, layout, torch.bfloat16, device="meta")
        found.append(_rank(model, stages))
    local = config.num_routed_experts // expert
    again = config.tie_embeddings or config.mtp_depth > 0
    return Placement(schedule, describe(layout), data, pipeline, expert, local, again, stages, found)


def _stages(config: ModelConfig, table: Table, layout: Layout, length: int) -> list[StagePlace]:
    flops = part_flops(config, length)
    layers = flops.layers(config)
    found = []
    for stage, (at, (first, last)) in enumerate(zip(layout, edges(layout), strict=True)):
        words = ["embed"] if at.embedding else []
        words += [f"layers.{first}" if last - first == 1 else f"layers.{first}-{last - 1}"] if last > first else []
        words += ["norm, head"] if at.output else []
        words += [f"mtp.{k}" for k in range(at.mtp)]
        cost = sum(layers[first:last]) + at.embedding * flops.embedding
        cost += at.output * flops.output(config)
        held = tuple(row[stage] for row in table.rank_of)
        contents = ", ".join(words) or "nothing"
        found.append(StagePlace(stage, contents, (first, last), at.embedding, at.output, held, cost))
    return found


def _rank(model: RankModel, stages: list[StagePlace]) -> RankPlace:
    table, topology = model.table, model.topology
    rank = topology.pipeline_rank
    held = tuple(table.stages_of(rank))
    same = {stage for _, stage in held}
    mirrors = [r for r in range(table.ranks) if r != rank and {stage for _, stage in table.stages_of(r)} == same]
    replicas: dict[str, set[int]] = {}
    parameters = experts = 0
    for spec in model.specs():
        parameters += spec.parameter.numel()
        routed = spec.bucket.endswith(".experts")
        experts += spec.parameter.numel() * routed
        kind = "experts" if routed else spec.bucket if spec.bucket in ("embed", "output") else "layers"
        replicas.setdefault(kind, set()).add(len(spec.replicas))
    return RankPlace(
        rank,
        held,
        tuple(mirrors),
        topology.rank,
        topology.rank + topology.expert - 1,
        parameters,
        experts,
        {kind: tuple(sorted(sizes)) for kind, sizes in replicas.items()},
        sum(stages[stage].flops for _, stage in held) / len(table.rank_of),
    )

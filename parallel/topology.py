"""Who is where: rank coordinates read off one grid, and process groups made from sets of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """Coordinates of `rank` in the grid data x pipeline x expert."""

    data: int
    pipeline: int
    expert: int
    rank: int

    @staticmethod
    def of(config: ParallelConfig, rank: int) -> Topology:
        return Topology(config.data, config.pipeline, config.expert, rank)

    @property
    def grid(self) -> torch.Tensor:
        return torch.arange(self.data * self.pipeline * self.expert).view(self.data, self.pipeline, self.expert)

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.expert

    @property
    def data_rank(self) -> int:
        return self.rank // (self.pipeline * self.expert)

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.expert % self.pipeline

    @property
    def expert_rank(self) -> int:
        return self.rank % self.expert

    @property
    def replicas(self) -> int:
        """Pipelines that read different sequences: expert ranks are taken out of the data-parallel ranks."""
        return self.data * self.expert

    @property
    def replica(self) -> int:
        """Which of them this rank belongs to."""
        return self.data_rank * self.expert + self.expert_rank

    def pipeline_peer(self, pipeline_rank: int) -> int:
        """Global rank of a pipeline rank of this rank's own pipeline."""
        return int(self.grid[self.data_rank, pipeline_rank, self.expert_rank])

    def expert_groups(self) -> list[tuple[int, ...]]:
        """All expert-parallel groups of the world."""
        return [tuple(row.tolist()) for row in self.grid.reshape(-1, self.expert)]


class Groups:
    """Process groups by their tuple of global ranks. Every rank makes every group, in one order; groups of one have
    none."""

    def __init__(self, rank: int, members: Iterable[tuple[int, ...]], timeout_seconds: float) -> None:
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for ranks in sorted(set(members)):
            if len(ranks) == 1:
                self._groups[ranks] = None
                continue
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_seconds))
            if rank in ranks:
                self._groups[ranks] = group

    def __getitem__(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        return self._groups[ranks]

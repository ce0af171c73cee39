"""How a run is laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ParallelConfig:
    """world size = pipeline x expert x data. Rank = (data * pipeline + pipeline_rank) * expert + expert_rank, so that
    an expert group is contiguous (one node).

    layers_per_stage: layers of each pipeline stage; empty means as even as possible, earlier stages first (the last
    one also carries head and MTP). order: `default` or `published` (see parallel/pipeline/contract.py).
    timeout_seconds: of every collective.
    """

    pipeline: int = 1
    expert: int = 1
    data: int = 1
    schedule: str = "1f1b"
    order: str = "default"
    layers_per_stage: list[int] = field(default_factory=list)
    timeout_seconds: float = 300.0

    @property
    def world_size(self) -> int:
        return self.pipeline * self.expert * self.data

"""How a run is laid out over ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    """world size = pipeline x expert x data. Rank = (data * pipeline + pipeline_rank) * expert + expert_rank, so that
    an expert group is contiguous (one node).

    layout: layers of each pipeline stage (see parallel/layout.py), such as `Ett|(ttt|)*2tmL`; empty means the split
    whose largest rank load is smallest. stages_per_rank: pipeline stages of each rank under `interleaved`; 0 means
    the schedule's own. order: of the steps of an F&B pair, `default`, `published` or `ready_first` (see
    parallel/pipeline/contract.py). timeout_seconds: of every collective.
    """

    pipeline: int = 1
    expert: int = 1
    data: int = 1
    schedule: str = "1f1b"
    order: str = "default"
    stages_per_rank: int = 0
    layout: str = ""
    timeout_seconds: float = 300.0

    @property
    def world_size(self) -> int:
        return self.pipeline * self.expert * self.data

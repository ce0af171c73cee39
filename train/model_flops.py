"""The model FLOPs of a run by stage, for its report: what a utilisation would be a share of."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from model.config import ModelConfig, RopeScaling, config_problems
from model.count import training_flops_per_token
from train.record import RunRecord


@dataclass(frozen=True)
class StageFlops:
    """One stage. per_token: forward and backward, causal, without MTP and recomputation. per_second: at the stage's
    median throughput, of all ranks together; None where none was logged.
    """

    name: str
    length: int
    per_token: float
    per_second: float | None


def stage_flops(run: RunRecord) -> list[StageFlops]:
    """Every stage of the configuration; empty where it does not name all of the model's numbers."""
    config = _model(run.config.get("model"))
    stages = run.config.get("stages")
    if config is None or not isinstance(stages, list):
        return []
    found = []
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict) or not isinstance(stage.get("length"), int):
            return []
        per_token = training_flops_per_token(config, stage["length"])["total"]
        speed = _median_speed(run, index)
        name = str(stage.get("name", index + 1))
        found.append(StageFlops(name, stage["length"], per_token, None if speed is None else speed * per_token))
    return found


def engineering(flops: float) -> str:
    """`8.57 M`, `250.4 G`."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.4g} {letter}"
    return f"{flops:.4g} "


def _model(values: Any) -> ModelConfig | None:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(ModelConfig)}:
        return None
    try:
        config = ModelConfig(**values | {"rope_scaling": RopeScaling(**values["rope_scaling"])})
        return None if config_problems(config) else config
    except TypeError:
        return None


def _median_speed(run: RunRecord, stage: int) -> float | None:
    if not (run.has("perf/tokens_per_s") and run.has("train/stage")):
        return None
    speed = run.series["perf/tokens_per_s"][run.series["train/stage"] == stage]
    return float(np.nanmedian(speed)) if np.isfinite(speed).any() else None

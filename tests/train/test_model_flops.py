"""The report's model FLOPs are those of the counting function at the stage's length and speed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from model.count import training_flops_per_token
from tests.model.models import model_config
from tests.train.synthetic_run import write_run
from train.model_flops import engineering, stage_flops
from train.page import page
from train.record import read_run
from train.report import summary
from train.verdict import judge


def test_flops_of_every_stage(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    assert stage_flops(run) == []  # its configuration does not name all numbers
    config = model_config("demo_v2")
    stages = [{"name": "pretrain", "length": 128}, {"name": "extend_8x", "length": 1024}]
    run = replace(run, config=run.config | {"model": asdict(config), "stages": stages})
    first, second = stage_flops(run)
    assert first.per_token == training_flops_per_token(config, 128)["total"]
    assert second.per_token == training_flops_per_token(config, 1024)["total"] > first.per_token
    speed = np.median(run.series["perf/tokens_per_s"][run.series["train/stage"] == 1])
    assert second.per_second == pytest.approx(speed * second.per_token)
    verdict = judge(run)
    assert f"{engineering(first.per_token)}FLOPs per token at 128" in page(run, verdict, [], [])
    assert summary(run, verdict, tmp_path)["model_flops"]["extend_8x"]["per_token"] == second.per_token
    broken = run.config["model"] | {"num_layers": "many"}
    assert stage_flops(replace(run, config=run.config | {"model": broken})) == []


def test_engineering() -> None:
    assert [engineering(x) for x in (250.45e9, 8.57e6, 1.5e13, 123.0)] == ["250.4 G", "8.57 M", "15 T", "123 "]

"""What a run says when it starts: settings without effect and exports that will be refused, and nothing else."""

from __future__ import annotations

import pytest

from kernels.backends import OPS
from train.compose import compose_run
from train.notes import notes

TORCH = dict.fromkeys(OPS, "torch")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], []),
        (
            ["precision.fp8=false", "kernels.gemm=scaled_mm", "kernels.norm=torch"],
            ["no effect of kernels.gemm=scaled_mm: precision.fp8 is off"],
        ),
        (
            ["kernels.measured=tiles.json", "kernels.num_sms=112"],
            [
                "no effect of kernels.measured=tiles.json: no product runs on triton",
                "no effect of kernels.num_sms=112: no product and no norm runs on triton",
            ],
        ),
        (["model=demo_v2"], ["stages.0: no effect of bias_update: the model's routers have no bias"]),
        (["model=demo_v2"], ["stages.0: no effect of mtp_weight: the model has no MTP"]),
        (
            ["model=demo_v2", "stages.0.balance.sequence=0"],
            ["stages.0: nothing balances the experts: every balance weight is 0 and routers have no bias"],
        ),
        (
            ["model=demo_llm", "parallel.expert=1", "stages.1.balance.expert=0.1"],
            ["stages.1: no effect of balance.expert: the model has no experts"],
        ),
        (
            ["model.num_expert_groups=1", "model.groups_per_token=1", "stages.0.balance.device=0.1"],
            ["stages.0: no effect of balance.device: a constant with one group of experts"],
        ),
        (
            ["model=proxy_1b", "precision.fp8=false", "stages.0.length=128"],
            ["no Hugging Face export: export as deepseek: model.score_function: found sigmoid, deepseek has softmax"],
        ),
    ],
)
def test_notes(overrides: list[str], said: list[str]) -> None:
    found = notes(compose_run(["experiment=demo", *overrides]), TORCH)
    assert all(line in found for line in said), found
    assert bool(found) == bool(said)
    assert len(set(found)) == len(found)


def test_settings_of_our_kernels_have_an_effect_where_they_run() -> None:
    config = compose_run(["experiment=demo", "kernels.measured=tiles.json", "kernels.num_sms=112"])
    assert notes(config, TORCH | {"gemm": "triton"}) == []
    assert [line.split("=")[0] for line in notes(config, TORCH | {"norm": "triton"})] == [
        "no effect of kernels.measured"
    ]
    config = compose_run(["experiment=demo", "precision.fp8=false", "kernels.num_sms=112"])
    assert len(notes(config, TORCH | {"gemm": "triton"})) == 1

"""Values by tokens: piece by piece, at the borders, and DeepSeek-V3's own schedule (V3 section 4.2)."""

from __future__ import annotations

import math

import pytest

from train.compose import compose_run
from train.config import Ramp, StepValue
from train.schedules import ramp_value, step_value

T = 10**12


def test_linear_then_constant() -> None:
    pieces = [Ramp(100, "linear", 0.0, 8.0), Ramp(200, "constant", 8.0)]
    found = [ramp_value(pieces, tokens) for tokens in (0, 25, 50, 99, 100, 199, 200, 10**9)]
    assert found == pytest.approx([0.0, 2.0, 4.0, 7.92, 8.0, 8.0, 8.0, 8.0], rel=1e-12)


def test_a_piece_is_measured_from_the_end_of_the_one_before() -> None:
    pieces = [Ramp(100, "constant", 3.0), Ramp(300, "linear", 10.0, 20.0)]
    assert [ramp_value(pieces, tokens) for tokens in (99, 100, 150, 200)] == [3.0, 10.0, 12.5, 15.0]


def test_cosine_and_its_end() -> None:
    """Half a cosine from start to end: a quarter of the way it has fallen by (1 - cos 45 degrees) / 2."""
    pieces = [Ramp(400, "cosine", 10.0, 2.0)]
    quarter = 10.0 - 8.0 * (1 - math.sqrt(0.5)) / 2
    found = [ramp_value(pieces, tokens) for tokens in (0, 100, 200, 300, 400, 500)]
    assert found == pytest.approx([10.0, quarter, 6.0, 12.0 - quarter, 2.0, 2.0], rel=1e-12)


def test_the_last_piece_holds_at_its_end() -> None:
    assert ramp_value([Ramp(10, "linear", 1.0, 5.0)], 10) == 5.0
    assert ramp_value([Ramp(10, "constant", 1.0)], 10) == 1.0  # not at the `end` that a constant has no use for


def test_steps() -> None:
    pieces = [StepValue(10, 1.0), StepValue(30, 2.0), StepValue(40, 3.0)]
    assert [step_value(pieces, tokens) for tokens in (0, 9, 10, 29, 30, 39, 40, 10**9)] == [1, 1, 2, 2, 3, 3, 3, 3]


def test_deepseek_v3() -> None:
    """The shipped v3 experiment against the report's text."""
    (stage,) = compose_run(["experiment=v3"]).stages
    warm_up = 2000 * 3072 * 4096  # 2K steps at the first batch size
    rates = {
        0: 0.0,
        warm_up // 2: 1.1e-4,
        warm_up: 2.2e-4,
        10 * T - 1: 2.2e-4,
        10 * T: 2.2e-4,
        12_150 * 10**9: (2.2e-4 + 2.2e-5) / 2,  # the middle of a cosine over 4.3T tokens
        14_300 * 10**9 - 1: 2.2e-5,
        14_300 * 10**9: 2.2e-5,
        14_633 * 10**9 - 1: 2.2e-5,  # 333B tokens
        14_633 * 10**9: 7.3e-6,  # the last 167B
        14_800 * 10**9: 7.3e-6,
    }
    for tokens, rate in rates.items():
        assert ramp_value(stage.learning_rate, tokens) == pytest.approx(rate, rel=1e-6), tokens
    assert [step_value(stage.mtp_weight, t) for t in (0, 10 * T - 1, 10 * T, 14 * T)] == [0.3, 0.3, 0.1, 0.1]
    gammas = [step_value(stage.bias_update, t) for t in (0, 14_300 * 10**9 - 1, 14_300 * 10**9)]
    assert gammas == [0.001, 0.001, 0.0]
    batches = [step_value(stage.sequences, t) for t in (0, 469 * 10**9, 14 * T)]
    assert batches == [3072, 15360, 15360]
    ramp = [step_value(stage.sequences, t * 10**9) for t in range(470)]
    assert ramp == sorted(ramp)

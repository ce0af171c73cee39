"""Routing against a brute force in plain Python; the bias update."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.router import (
    Router,
    expert_load,
    expert_weights,
    select_experts,
    update_bias,
)


def small(groups: int, per_group: int, kept: int, k: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=8,
        num_routed_experts=groups * per_group,
        num_expert_groups=groups,
        groups_per_token=kept,
        experts_per_token=k,
    )


def brute_force(scores: list[float], bias: list[float], config: ModelConfig) -> list[int]:
    """Ties go to the lower id everywhere."""
    biased = [score + b for score, b in zip(scores, bias)]
    size = config.num_routed_experts // config.num_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_expert_groups)]
    rank = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: (-rank[g], g))[: config.groups_per_token]
    allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: (-biased[e], e))[: config.experts_per_token]


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelConfig, list[float], list[float]]:
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * per_group))
    experts = groups * per_group
    # Multiples of 1/8 are exact, and tie often.
    scores = [x / 8 for x in draw(st.lists(st.integers(0, 8), min_size=experts, max_size=experts))]
    bias = [x / 8 for x in draw(st.lists(st.integers(-24, 8), min_size=experts, max_size=experts))]
    return small(groups, per_group, kept, k), scores, bias


@given(cases())
def test_selection_is_the_brute_force_with_ties_and_negative_biases(
    case: tuple[ModelConfig, list[float], list[float]],
) -> None:
    config, scores, bias = case
    index_TK = select_experts(torch.tensor([scores]), torch.tensor(bias), config)
    assert index_TK[0].tolist() == brute_force(scores, bias, config)


def test_negative_biases_do_not_open_a_masked_group() -> None:
    config = small(groups=2, per_group=2, kept=1, k=2)
    index_TK = select_experts(torch.tensor([[0.9, 0.8, 0.1, 0.1]]), torch.tensor([-2.0, -2.0, -2.0, -2.0]), config)
    assert sorted(index_TK[0].tolist()) == [0, 1]


def test_bias_changes_the_selection_and_never_a_weight() -> None:
    config = small(groups=1, per_group=4, kept=1, k=2)
    score_TE = torch.tensor([[0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
    index_TK = select_experts(score_TE, torch.tensor([0.0, 0.0, 0.0, 9.0]), config)
    assert sorted(index_TK[0].tolist()) == [0, 3]
    weight = dict(zip(index_TK[0].tolist(), expert_weights(score_TE, index_TK, config)[0].tolist()))
    assert abs(weight[0] - 2.5 * 0.5 / 0.7) < 1e-15 and abs(weight[3] - 2.5 * 0.2 / 0.7) < 1e-15


def test_router_is_precise_in_every_dtype() -> None:
    config = small(groups=2, per_group=4, kept=1, k=2)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        router = Router(config, dtype)
        with torch.no_grad():
            router.weight.copy_(torch.randn(8, 8, generator=generator))
        x_BTd = torch.randn(2, 3, 8, generator=generator).to(dtype)
        routing = router(x_BTd)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert routing.score_TE.dtype == routing.weight_TK.dtype == router.bias.dtype == wide
        torch.testing.assert_close(routing.weight_TK.sum(-1), torch.full((2, 3), 2.5, dtype=wide))
        logits = x_BTd.to(wide) @ router.weight.to(wide).T
        torch.testing.assert_close(routing.score_TE, logits.sigmoid(), rtol=0, atol=0)


def test_load_counts_real_tokens_once_per_expert() -> None:
    index = torch.tensor([[[0, 1], [1, 2]], [[2, 1], [3, 0]]])
    assert expert_load(index, 5).tolist() == [2, 3, 2, 1, 0]
    assert expert_load(index, 5, torch.tensor([[True, False], [True, False]])).tolist() == [1, 2, 1, 0, 0]


@given(st.lists(st.integers(0, 2**40), min_size=3, max_size=3))
def test_bias_update_is_the_sign_of_mean_minus_load(load: list[int]) -> None:
    bias = torch.zeros(3, dtype=torch.float64)
    update_bias(bias, torch.tensor(load), 0.001)
    mean_times_three = sum(load)
    sign = [(3 * x < mean_times_three) - (3 * x > mean_times_three) for x in load]
    assert bias.tolist() == [0.001 * s for s in sign]

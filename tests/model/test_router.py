"""Routing against a brute force in plain Python, whatever the family; the bias update, MTP layers included."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.contract import MicroBatch, StepCounts
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.names import moe_layers
from model.router import (
    Router,
    affinities,
    expert_load,
    expert_weights,
    select_experts,
    update_bias,
)
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig
from tests.model.models import model_config
from train.engine import Engine, StepPlan, StepResult

V2: dict[str, Any] = {"score_function": "softmax", "group_rule": "max", "renormalise": False, "router_bias": False}


def small(groups: int, per_group: int, kept: int, k: int, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "hidden_size": 8,
        "num_routed_experts": groups * per_group,
        "num_expert_groups": groups,
        "groups_per_token": kept,
        "experts_per_token": k,
    }
    return ModelConfig(**fields | changes)


def brute_force(scores: list[float], bias: list[float], config: ModelConfig) -> list[int]:
    """Ties go to the lower id everywhere."""
    biased = [score + b for score, b in zip(scores, bias)]
    size = config.num_routed_experts // config.num_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_expert_groups)]
    best = {"max": 1, "top2_sum": 2}[config.group_rule]
    rank = [sum(sorted((biased[e] for e in group), reverse=True)[:best]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: (-rank[g], g))[: config.groups_per_token]
    allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: (-biased[e], e))[: config.experts_per_token]


@st.composite
def cases(draw: st.DrawFn, highest_bias: int = 8) -> tuple[ModelConfig, list[float], list[float]]:
    rule = draw(st.sampled_from(["top2_sum", "max"]))
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(1 if rule == "max" else 2, 4))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * per_group))
    experts = groups * per_group
    # Multiples of 1/8 are exact, and tie often.
    scores = [x / 8 for x in draw(st.lists(st.integers(0, 8), min_size=experts, max_size=experts))]
    bias = [x / 8 for x in draw(st.lists(st.integers(-24, highest_bias), min_size=experts, max_size=experts))]
    return small(groups, per_group, kept, k, group_rule=rule), scores, bias


@given(cases())
def test_selection_is_the_brute_force_with_ties_and_negative_biases(
    case: tuple[ModelConfig, list[float], list[float]],
) -> None:
    config, scores, bias = case
    index_TK = select_experts(torch.tensor([scores]), torch.tensor(bias), config)
    assert index_TK[0].tolist() == brute_force(scores, bias, config)


@given(cases())
def test_without_a_bias_the_scores_themselves_select(case: tuple[ModelConfig, list[float], list[float]]) -> None:
    config, scores, _ = case
    index_TK = select_experts(torch.tensor([scores]), None, config)
    assert index_TK[0].tolist() == brute_force(scores, [0.0] * len(scores), config)


@given(cases(highest_bias=-9))
def test_no_expert_of_a_masked_group_when_every_biased_score_is_negative(
    case: tuple[ModelConfig, list[float], list[float]],
) -> None:
    config, scores, bias = case
    assert max(score + b for score, b in zip(scores, bias)) < 0
    chosen = select_experts(torch.tensor([scores]), torch.tensor(bias), config)[0].tolist()
    size = config.num_routed_experts // config.num_expert_groups
    assert len(set(chosen)) == config.experts_per_token
    assert len({expert // size for expert in chosen}) <= config.groups_per_token
    assert chosen == brute_force(scores, bias, config)


@pytest.mark.parametrize("rule", ["top2_sum", "max"])
def test_negative_biases_do_not_open_a_masked_group(rule: str) -> None:
    config = small(groups=2, per_group=2, kept=1, k=2, group_rule=rule)
    index_TK = select_experts(torch.tensor([[0.9, 0.8, 0.1, 0.1]]), torch.tensor([-2.0, -2.0, -2.0, -2.0]), config)
    assert sorted(index_TK[0].tolist()) == [0, 1]


def test_the_two_group_rules_choose_differently() -> None:
    score_TE = torch.tensor([[0.6, 0.5, 0.9, 0.1]])
    chosen = {
        rule: select_experts(score_TE, None, small(2, 2, 1, 2, group_rule=rule))[0].tolist()
        for rule in ("top2_sum", "max")
    }
    assert chosen == {"top2_sum": [0, 1], "max": [2, 3]}


@pytest.mark.parametrize("rule", ["top2_sum", "max"])
def test_ties_go_to_the_lowest_group_and_expert(rule: str) -> None:
    config = small(groups=8, per_group=32, kept=4, k=8, group_rule=rule)
    assert select_experts(torch.full((3, 256), 0.5), None, config).tolist() == [list(range(8))] * 3
    score_TE = torch.full((1, 256), 0.5)
    score_TE[0, [64, 65, 128, 129]] = 0.75
    assert select_experts(score_TE, None, config).tolist() == [[64, 65, 128, 129, 0, 1, 2, 3]]


def test_bias_changes_the_selection_and_never_a_weight() -> None:
    config = small(groups=1, per_group=4, kept=1, k=2)
    score_TE = torch.tensor([[0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
    index_TK = select_experts(score_TE, torch.tensor([0.0, 0.0, 0.0, 9.0]), config)
    assert sorted(index_TK[0].tolist()) == [0, 3]
    weight = dict(zip(index_TK[0].tolist(), expert_weights(score_TE, index_TK, config)[0].tolist()))
    assert abs(weight[0] - 2.5 * 0.5 / 0.7) < 1e-15 and abs(weight[3] - 2.5 * 0.2 / 0.7) < 1e-15


@pytest.mark.parametrize("name", ["v3", "v2", "v2_lite", "moe_16b", "proxy_1b"])
def test_weights_of_the_families(name: str) -> None:
    """They sum to the scaling factor where the family renormalises, and are the scores times it where not."""
    config = model_config(name)
    factor, sums_to_it = {
        "v3": (2.5, True),
        "v2": (16.0, False),
        "v2_lite": (1.0, False),
        "moe_16b": (1.0, False),
        "proxy_1b": (1.0, True),
    }[name]
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(50, config.num_routed_experts, dtype=torch.float64, generator=generator)
    bias_E = torch.randn(config.num_routed_experts, dtype=torch.float64, generator=generator)
    score_TE = affinities(logits_TE, config)
    plain = select_experts(score_TE, None, config)
    biased = select_experts(score_TE, bias_E, config)
    assert (plain != biased).any()
    for index_TK in (plain, biased):
        weight_TK = expert_weights(score_TE, index_TK, config)
        for weights, ids, logits in zip(weight_TK.tolist(), index_TK.tolist(), logits_TE.tolist(), strict=True):
            if sums_to_it:
                score = [1 / (1 + np.exp(-x)) for x in logits]
                expected = [factor * score[e] / sum(score[i] for i in ids) for e in ids]
                assert abs(sum(weights) - factor) < 1e-13
            else:
                powers = np.exp(logits)
                expected = [factor * powers[e] / powers.sum() for e in ids]
                assert sum(weights) < 0.9 * factor
            np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_the_bias_is_in_no_gradient() -> None:
    config = small(groups=2, per_group=4, kept=1, k=3)
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(20, 8, dtype=torch.float64, generator=generator).requires_grad_()
    bias_E = torch.randn(8, dtype=torch.float64, generator=generator).requires_grad_()
    score_TE = affinities(logits_TE, config)
    index_TK = select_experts(score_TE, bias_E, config)
    probe = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    (expert_weights(score_TE, index_TK, config) * probe).sum().backward()
    assert bias_E.grad is None and logits_TE.grad is not None
    again_TE = logits_TE.detach().clone().requires_grad_()
    chosen = again_TE.sigmoid().gather(-1, index_TK)
    (2.5 * chosen / chosen.sum(-1, keepdim=True) * probe).sum().backward()
    torch.testing.assert_close(logits_TE.grad, again_TE.grad, rtol=1e-12, atol=1e-15)


def random_router(config: ModelConfig) -> tuple[Router, torch.Tensor, list[list[float]]]:
    """A float64 router, tokens [30, 8] and their logits."""
    router = Router(config, torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (router.weight, router.bias):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=generator) - 0.5)
    x_Td = torch.randn(30, 8, dtype=torch.float64, generator=generator)
    return router, x_Td, (x_Td @ router.weight.T).tolist()


def test_softmax_router_has_no_bias() -> None:
    config = small(2, 4, 1, 2, **V2, routed_scaling_factor=16.0)
    router, x_Td, logits = random_router(config)
    assert router.bias is None and "bias" not in router.state_dict()
    routing = router(x_Td)
    for ids, weights, logit in zip(routing.index_TK.tolist(), routing.weight_TK.tolist(), logits, strict=True):
        scores = [np.exp(x) / np.exp(logit).sum() for x in logit]
        assert ids == brute_force(scores, [0.0] * 8, config)
        np.testing.assert_allclose(weights, [16 * scores[e] for e in ids], rtol=1e-12)


def test_sigmoid_router_selects_with_its_bias_and_weighs_without() -> None:
    config = small(2, 4, 1, 2)
    router, x_Td, logits = random_router(config)
    assert router.bias is not None and not router.bias.requires_grad
    bias = router.bias.tolist()
    routing = router(x_Td)
    for ids, weights, logit in zip(routing.index_TK.tolist(), routing.weight_TK.tolist(), logits, strict=True):
        scores = [1 / (1 + np.exp(-x)) for x in logit]
        assert ids == brute_force(scores, bias, config)
        np.testing.assert_allclose(weights, [2.5 * scores[e] / sum(scores[i] for i in ids) for e in ids], rtol=1e-12)


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


@given(st.lists(st.one_of(st.integers(0, 6), st.integers(0, 2**40)), min_size=1, max_size=9))
def test_bias_update_is_the_sign_of_mean_minus_load(load: list[int]) -> None:
    bias = torch.zeros(len(load), dtype=torch.float64)
    update_bias(bias, torch.tensor(load), 0.001)
    mean = Fraction(sum(load), len(load))
    sign = [(mean > x) - (mean < x) for x in load]
    assert bias.tolist() == [0.001 * s for s in sign]


def test_one_token_more_than_the_mean_is_seen() -> None:
    """A mean in floating point would not see it."""
    load = torch.full((256,), 2**53)
    load[3] += 1
    bias = torch.zeros(256)
    update_bias(bias, load, 0.5)
    assert bias[3] == -0.5 and (bias[:3] == 0.5).all() and (bias[4:] == 0.5).all()


SEQUENCES, LENGTH, GAMMA = 2, 12, 0.01


def one_step(engine: Engine, bias_update: float) -> tuple[StepResult, int]:
    """A training step over random tokens, some of them padding; its result and the number of real tokens."""
    generator = np.random.default_rng(0)
    depths, shape = engine.config.mtp_depth, (SEQUENCES, LENGTH)
    tokens, labels = generator.integers(0, engine.config.vocab_size, (2, *shape))
    mtp_tokens, mtp_labels = generator.integers(0, engine.config.vocab_size, (2, depths, *shape))
    real = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 5]])
    whole = [tokens, labels, np.broadcast_to(np.arange(LENGTH), shape).copy(), np.zeros(shape, np.int64)]
    batches = {
        key: MicroBatch(*(x[i] for x in whole), mtp_tokens[:, i], mtp_labels[:, i], real[i], np.zeros(len(i), np.int64))
        for key, i in engine.sample_order(0, SEQUENCES, micro_batch=1).items()
    }
    counts = StepCounts(tokens.size, (tokens.size,) * depths, SEQUENCES, int(real.sum()))
    plan = StepPlan(counts, 1e-3, 0.3, BalanceWeights(sequence=1e-4), bias_update)
    return engine.step(batches, SEQUENCES, plan), int(real.sum())


def test_a_training_step_moves_the_biases_of_every_layer_with_experts() -> None:
    """Two experts of each layer, others in each, are made to take all tokens: their biases fall, the others rise."""
    config = model_config("tiny", num_layers=3, mtp_depth=2)
    wide = OptimizerConfig(master_dtype="float64", moment_dtype="float64", accumulate_dtype="float64")
    engine = Engine(config, ParallelConfig(), wide, torch.float64, False, 0, sources=1)
    engine.initialize(seed=3)
    layers = moe_layers(config)
    assert list(layers.values()) == ["layers.1", "layers.2", "mtp.0.layer", "mtp.1.layer"]
    busy = {f"{name}.router.bias": {i, (i + 3) % 8} for i, name in layers.items()}
    before = {
        name: torch.tensor([10.0 if e in experts else 0.0 for e in range(8)], dtype=torch.float64)
        for name, experts in busy.items()
    }
    engine.load_biases(before.__getitem__)

    result, real = one_step(engine, GAMMA)
    assert real == 2 * LENGTH - 5
    assert result.load_LE.tolist() == [[real if e in experts else 0 for e in range(8)] for experts in busy.values()]
    after = {name: bias.clone() for name, bias in engine.owned_biases()}
    assert after.keys() == busy.keys()
    for name, experts in busy.items():
        assert after[name].tolist() == [10.0 - GAMMA if e in experts else GAMMA for e in range(8)], name

    one_step(engine, 0.0)
    assert all(torch.equal(bias, after[name]) for name, bias in engine.owned_biases())

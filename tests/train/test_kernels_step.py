"""A training step of a small model with our Triton kernels (interpreted) beside the same with the definitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.contract import MicroBatch, StepCounts
from kernels.backends import OPS, Kernels, KernelsConfig, resolve
from model.balance import BalanceWeights
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig
from tests.kernels.interpreter import repaired
from tests.kernels.oracles import calc_diff
from train.engine import Engine, StepPlan, StepResult

SEQUENCES, LENGTH = 2, 24
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with repaired():
        yield


def small() -> ModelConfig:
    """Widths with edge tiles: 48, 144, 272."""
    path = Path(__file__).parents[2] / "conf/model/tiny.yaml"
    widths = {
        "hidden_size": 272, "num_layers": 2, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 144, "moe_intermediate_size": 48,
        "num_routed_experts": 4, "num_expert_groups": 1, "groups_per_token": 1, "mtp_depth": 0, "init_std": 0.05,
    }  # fmt: skip
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path), widths)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def batch(vocabulary: int) -> MicroBatch:
    draws = np.random.default_rng(0).integers(0, vocabulary, (2, SEQUENCES, LENGTH))
    positions = np.broadcast_to(np.arange(LENGTH), draws[0].shape).copy()
    zeros = np.zeros((0, SEQUENCES, LENGTH), np.int64)
    real, source = np.ones(positions.shape, bool), np.zeros(SEQUENCES, np.int64)
    return MicroBatch(draws[0], draws[1], positions, np.zeros_like(positions), zeros, zeros, real, source)


def step(kernels: Kernels | None, fp8: bool = True) -> tuple[StepResult, dict[int, torch.Tensor]]:
    """The step's figures, and each parameter's gradient in the order in which they are first handed in."""
    torch.manual_seed(0)
    config = small()
    optimizer = OptimizerConfig(clip=0.0)
    engine = Engine(config, ParallelConfig(), optimizer, torch.bfloat16, fp8, 0, sources=1, kernels=kernels)
    engine.initialize(seed=3)
    place = {id(spec.parameter): number for number, spec in enumerate(engine.model.specs())}
    gradients: dict[int, torch.Tensor] = {}
    accumulate = engine.optimizer.accumulate

    def watched(parameter: torch.nn.Parameter, grad: torch.Tensor) -> None:
        number = place[id(parameter)]
        gradients[number] = gradients.get(number, 0) + grad.double()
        accumulate(parameter, grad)

    engine.optimizer.accumulate = watched  # type: ignore[method-assign]
    order = engine.sample_order(0, 2 * SEQUENCES, SEQUENCES)
    batches = {key: batch(config.vocab_size) for key in order}
    labels = 2 * SEQUENCES * LENGTH
    counts = StepCounts(labels, (), 2 * SEQUENCES, labels)
    return engine.step(batches, 2, StepPlan(counts, 1e-3, 0.0, BalanceWeights(sequence=1e-4), 1e-3)), gradients


@pytest.fixture(scope="module")
def expected() -> tuple[StepResult, dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """The step by the definitions, and its gradients without FP8."""
    return *step(None), step(None, fp8=False)[1]


@pytest.mark.parametrize("ops", [OPS, *((op,) for op in OPS if op not in ("gemm", "grouped_gemm"))], ids=" ".join)
def test_a_step_with_our_kernels_is_the_defined_step(
    ops: tuple[str, ...], expected: tuple[StepResult, dict[int, torch.Tensor], dict[int, torch.Tensor]]
) -> None:
    """All ops at once, and each of those alone that work with operands of the definition."""
    named: dict[str, str] = dict.fromkeys(ops, "triton")
    result, gradients = step(resolve(replace(KernelsConfig(num_sms=4), **named), CPU))
    main, wanted, unquantised = expected
    assert result.main == pytest.approx(main.main, rel=1e-3)
    assert result.optimizer.grad_norm == pytest.approx(main.optimizer.grad_norm, rel=2e-2)
    assert gradients.keys() == wanted.keys()
    # Sums in another order move some numbers of BF16 by one place, and with them codes of FP8, layer after layer: far
    # less, for every tensor, than the recipe itself moves its gradient.
    distance = {n: calc_diff(gradients[n], wanted[n]) / calc_diff(unquantised[n], wanted[n]) for n in wanted}
    assert max(distance.values()) < 0.15, distance

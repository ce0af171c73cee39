"""In float64 every layout gives the losses, norms and gradients of plain autograd on one process, at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from data.contract import IGNORE, MicroBatch, StepCounts
from model.balance import BalanceWeights
from model.initialize import initialize
from model.names import canonical_tensors, is_norm
from model.rope import Rotary
from model.router import update_bias
from model.transformer import Transformer, loss
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig
from tests.distributed_helper import run_distributed
from tests.model.models import model_config
from train.engine import Engine, StepPlan

STEPS, SEQUENCES, LENGTH, RATE = 5, 8, 12, 3e-3
FLOAT64 = OptimizerConfig(master_dtype="float64", moment_dtype="float64", accumulate_dtype="float64", clip=0.5)
LAYOUTS = {
    "dualpipe_pp2_ep2": ParallelConfig(pipeline=2, expert=2, schedule="dualpipe"),
    "dualpipe_pp2_ep2_published": ParallelConfig(pipeline=2, expert=2, schedule="dualpipe", order="published"),
    "dualpipe_pp4": ParallelConfig(pipeline=4, schedule="dualpipe"),
    "dualpipe_pp2": ParallelConfig(pipeline=2, schedule="dualpipe"),
    "ep2": ParallelConfig(expert=2),
    "1f1b_pp2_dp2": ParallelConfig(pipeline=2, data=2),
    "one": ParallelConfig(),
    "1f1b_pp4_ends_without_layers": ParallelConfig(pipeline=4, layout="E|tt|ttt|mL"),
    "dualpipe_pp4_stages_without_layers": ParallelConfig(pipeline=4, schedule="dualpipe", layout="E|t*5||mL"),
}


BALANCE = BalanceWeights(sequence=0.05, expert=0.03, device=0.04, communication=0.02)
GQA = {"attention": "gqa", "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_interleaved": False}
SOFTMAX = {"score_function": "softmax", "group_rule": "max", "renormalise": False, "router_bias": False}
FAMILIES: dict[str, tuple[dict[str, Any], ParallelConfig]] = {
    "v2": (SOFTMAX, ParallelConfig(pipeline=2, expert=2, schedule="dualpipe")),
    "moe": (
        {**GQA, **SOFTMAX, "num_expert_groups": 1, "groups_per_token": 1, "mtp_depth": 0},
        ParallelConfig(pipeline=2, expert=2),
    ),
    "v3 with two MTP depths": ({"mtp_depth": 2}, ParallelConfig(pipeline=2, expert=2, schedule="dualpipe")),
    "llm with MTP": (
        {**GQA, "num_routed_experts": 0, "router_bias": False},
        ParallelConfig(pipeline=2, data=2, schedule="dualpipe"),
    ),
}


def step_batch(step: int, vocabulary: int, depths: int) -> MicroBatch:
    """Random tokens; some labels ignored and some padding, so that denominators are not what a mean would give."""
    generator = np.random.default_rng(100 + step)
    shape = (SEQUENCES, LENGTH)
    tokens = generator.integers(0, vocabulary, shape)
    real = generator.random(shape) > 0.1
    labels = np.where(real & (generator.random(shape) > 0.1), generator.integers(0, vocabulary, shape), IGNORE)
    mtp_tokens = generator.integers(0, vocabulary, (depths, *shape))
    mtp_labels = np.where(real & (generator.random(shape) > 0.2), labels[None], IGNORE) * np.ones_like(mtp_tokens)
    positions = np.broadcast_to(np.arange(LENGTH), shape).copy()
    source = np.arange(SEQUENCES) % 2
    return MicroBatch(tokens, labels, positions, np.zeros(shape, np.int64), mtp_tokens, mtp_labels, real, source)


def rows(batch: MicroBatch, index: list[int]) -> MicroBatch:
    i = np.array(index)
    return MicroBatch(
        batch.tokens[i],
        batch.labels[i],
        batch.positions[i],
        batch.documents[i],
        batch.mtp_tokens[:, i],
        batch.mtp_labels[:, i],
        batch.real[i],
        batch.source[i],
    )


def step_plan(batch: MicroBatch) -> StepPlan:
    mtp = tuple(int((labels != IGNORE).sum()) for labels in batch.mtp_labels)
    counts = StepCounts(int((batch.labels != IGNORE).sum()), mtp, SEQUENCES, int(batch.real.sum()))
    return StepPlan(counts, RATE, mtp_weight=0.3, balance=BALANCE, bias_update=0.01)


@dataclass
class Step:
    """What one step gave: losses, norm, and the gradients (or pieces of them) by (name, first row, last row)."""

    main: float
    total: float
    norm: float
    load: list[list[int]]
    gradients: dict[tuple[str, int, int], torch.Tensor]


def run_layout(
    rank: int,
    world_size: int,
    parallel: ParallelConfig,
    dtype: torch.dtype = torch.float64,
    changes: dict[str, Any] | None = None,
) -> list[Step]:
    config = model_config("tiny", **(changes or {}))
    engine = Engine(config, parallel, FLOAT64, dtype, False, rank, sources=2)
    engine.initialize(seed=3)
    found = []
    for step in range(STEPS):
        batch = step_batch(step, config.vocab_size, config.mtp_depth)
        order = engine.sample_order(0, SEQUENCES, micro_batch=1)
        batches = {key: rows(batch, samples) for key, samples in order.items()}
        micro_batches = SEQUENCES // engine.topology.replicas
        result = engine.step(batches, micro_batches, step_plan(batch))
        gradients = {(r.name, r.first, r.last): g.clone() for r, g in engine.optimizer.named_gradients()}
        norm = result.optimizer.grad_norm
        found.append(Step(result.main, result.total, norm, result.load_LE.tolist(), gradients))
    return found


def run_families(rank: int, world_size: int) -> list[list[Step]]:
    return [run_layout(rank, world_size, p, changes=changes) for changes, p in FAMILIES.values()]


def oracle(changes: dict[str, Any] | None = None) -> list[Step]:
    """Plain autograd over all sequences at once, torch's AdamW and clipping."""
    config = model_config("tiny", **(changes or {}))
    model = Transformer(config, torch.float64)
    initialize(model, config, seed=3)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if not is_norm(n)], "weight_decay": FLOAT64.weight_decay},
        {"params": [p for n, p in named.items() if is_norm(n)], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=(FLOAT64.beta1, FLOAT64.beta2), eps=FLOAT64.eps)
    found = []
    for step in range(STEPS):
        batch = step_batch(step, config.vocab_size, config.mtp_depth)
        plan = step_plan(batch)
        real = torch.from_numpy(batch.real)
        output = model(
            torch.from_numpy(batch.tokens),
            torch.from_numpy(batch.mtp_tokens) if config.mtp_depth else None,
            rotary=Rotary(config, LENGTH),
            real_BT=real,
        )
        losses = loss(
            output,
            torch.from_numpy(batch.labels),
            torch.from_numpy(batch.mtp_labels),
            main_count=plan.counts.main,
            mtp_counts=plan.counts.mtp,
            sequences=SEQUENCES,
            mtp_weight=plan.mtp_weight,
            balance_weights=plan.balance,
        )
        adam.zero_grad()
        losses.total.backward()
        grads = {name: grad.clone() for name, grad in _canonical_gradients(model).items()}
        # torch's clip_grad_norm_ adds 1e-6 to the norm, which Adam's eps makes visible at 1e-10 after three steps.
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, FLOAT64.clip / norm.item()))
        adam.step()
        for name, statistics in output.moe.items() if config.router_bias else ():
            update_bias(model.get_submodule(name).router.bias, statistics.load_E, plan.bias_update)
        load = [statistics.load_E.tolist() for statistics in output.moe.values()]
        gradients = {(name, 0, 0): grad for name, grad in grads.items()}
        found.append(Step(losses.main.item(), losses.total.item(), norm.item(), load, gradients))
    return found


def _canonical_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """Gradients by canonical name: the parameters' views, with each parameter replaced by its gradient."""
    shadow = Transformer(model.config, torch.float64, device="meta").to_empty(device="cpu")
    for target, source in zip(shadow.parameters(), model.parameters(), strict=True):
        target.data = torch.zeros_like(source) if source.grad is None else source.grad
    return {name: value for name, value in canonical_tensors(shadow).items() if not name.endswith("router.bias")}


def compare(name: str, ranks: list[list[Step]], expected: list[Step]) -> float:
    """Worst |g - g'|max / |g|max over tensors and steps; losses, norms and loads checked on the way."""
    worst = 0.0
    for step, want in enumerate(expected):
        for got in (steps[step] for steps in ranks):
            assert abs(got.main - want.main) <= 1e-10 * abs(want.main), (name, step, got.main, want.main)
            assert abs(got.total - want.total) <= 1e-10 * abs(want.total), (name, step, got.total, want.total)
            assert abs(got.norm - want.norm) <= 1e-10 * want.norm, (name, step, got.norm, want.norm)
            assert got.load == want.load, (name, step)
        zero = 0
        for (tensor, _, _), grad in want.gradients.items():
            flat = grad.reshape(grad.shape[0], -1)
            covered = torch.zeros(len(flat), dtype=torch.int64)
            error = 0.0
            for steps in ranks:
                for (piece, first, last), value in steps[step].gradients.items():
                    if piece == tensor:
                        covered[first:last] += 1
                        error = max(error, (value.view(last - first, -1) - flat[first:last]).abs().max().item())
            assert (covered == 1).all(), f"{name}: {tensor} is not owned exactly once"
            size = flat.abs().max().item()
            zero += size == 0
            assert size > 0 or error == 0, (name, step, tensor)
            worst = max(worst, error / size if size else 0.0)
        assert zero < 0.1 * len(want.gradients), f"{zero} of {len(want.gradients)} gradients are zero"
    return worst


@pytest.fixture(scope="module")
def expected() -> list[Step]:
    return oracle()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, expected: list[Step]) -> None:
    parallel = LAYOUTS[name]
    ranks = run_distributed(run_layout, parallel.world_size, parallel, timeout=120)
    worst = compare(name, ranks, expected)
    print(f"{name}: worst gradient difference {worst:.1e}")
    assert worst <= 1e-10


def test_every_family_equals_one_process() -> None:
    ranks = run_distributed(run_families, 4, timeout=180)
    for i, (name, (changes, _)) in enumerate(FAMILIES.items()):
        worst = compare(name, [steps[i] for steps in ranks], oracle(changes))
        print(f"{name}: worst gradient difference {worst:.1e}")
        assert worst <= 1e-10

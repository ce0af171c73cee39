"""Groups of tensors with their own learning rate and weight decay, against torch's AdamW with parameter groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kernels.adamw import adamw
from parallel.optimizer.config import GROUPS, GroupConfig, GroupsConfig, OptimizerConfig, group_problems
from parallel.optimizer.contract import ParameterSpec, Part
from parallel.optimizer.zero1 import Zero1
from tests.distributed_helper import run_distributed
from tests.parallel.optimizer import toy

# name -> (shape, group, bucket); neighbours of one bucket are of different groups, and rows are split over two ranks.
TENSORS = {
    "embed": ((300, 6), "embedding", "embed"),
    "a.norm": ((40,), "norms", "layer"),
    "b.matrix": ((260, 5), "matrices", "layer"),
    "c.router": ((130, 8), "router", "layer"),
    "d.experts": ((140, 9), "experts", "layer"),
    "e.matrix": ((150, 4), "matrices", "layer"),
    "head": ((200, 6), "head", "output"),
    "norm": ((50,), "norms", "output"),
}
CHANGED = GroupsConfig(
    embedding=GroupConfig(0.25, 0.0),
    head=GroupConfig(0.0, 1.0),
    norms=GroupConfig(2.0, 0.5),
    router=GroupConfig(0.1, 3.0),
    experts=GroupConfig(3.0, 1.0),
    matrices=GroupConfig(1.0, 2.0),
)
RATES = (3e-2, 1e-2, 2e-2, 0.0, 3e-2)


def draw(*key: object) -> torch.Tensor:
    return toy.draw(*key, shape=TENSORS[str(key[-1])][0])


def specs(ranks: int, dtype: torch.dtype) -> list[ParameterSpec]:
    found = []
    for name, (shape, group, bucket) in TENSORS.items():
        part = Part(name, 0, shape[0], draw(name)[0].numel(), shape)
        replicas = tuple(range(ranks))
        found.append(
            ParameterSpec(nn.Parameter(torch.zeros(shape, dtype=dtype)), (part,), replicas, bucket, {0: 1}, group)
        )
    return found


def trained(rank: int, ranks: int, groups: GroupsConfig, dtype: torch.dtype) -> tuple[Zero1, list[ParameterSpec]]:
    name = str(dtype).removeprefix("torch.")
    config = OptimizerConfig(master_dtype=name, moment_dtype=name, accumulate_dtype=name, clip=0.0, groups=groups)
    mine = specs(ranks, dtype)
    everyone = {tuple(range(ranks)): dist.group.WORLD if ranks > 1 else None}
    optimizer = Zero1(mine, config, everyone, rank)
    optimizer.initialize(lambda name, first, last: draw("value", name).view(TENSORS[name][0][0], -1)[first:last])
    for step, rate in enumerate(RATES):
        optimizer.begin_step({0: 1})
        for spec in mine:
            optimizer.accumulate(spec.parameter, draw(step, rank, spec.parts[0].name).to(dtype))
        optimizer.step(rate)
    return optimizer, mine


def oracle(ranks: int, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    parameters = {name: nn.Parameter(draw("value", name).to(dtype)) for name in TENSORS}
    settings = [
        {"params": [parameters[name]], "weight_decay": 0.1 * getattr(CHANGED, group).weight_decay_factor}
        for name, (_, group, _) in TENSORS.items()
    ]
    optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate(RATES):
        for (name, (_, group, _)), found in zip(TENSORS.items(), optimizer.param_groups, strict=True):
            parameters[name].grad = sum(draw(step, rank, name).to(dtype) for rank in range(ranks))  # type: ignore[assignment]
            found["lr"] = rate * getattr(CHANGED, group).learning_rate_factor
        optimizer.step()
    return parameters, optimizer


def worst(optimizer: Zero1, mine: list[ParameterSpec], ranks: int, dtype: torch.dtype) -> float:
    """Largest relative difference to torch in masters, moments and parameters; what is frozen must be equal."""
    parameters, theirs = oracle(ranks, dtype)
    found = 0.0
    for rows, state in optimizer.shards():
        for kind, value in state.items():
            parameter = parameters[rows.name]
            expected = parameter.detach() if kind == "master" else theirs.state[parameter][kind]
            expected = expected.view(len(expected), -1)[rows.first : rows.last]
            if TENSORS[rows.name][1] == "head":
                expected = draw("value", rows.name).to(dtype)[rows.first : rows.last] if kind == "master" else 0 * value
                assert torch.equal(value, expected)
            else:
                found = max(found, relative(value, expected))
    for spec in mine:
        expected = parameters[spec.parts[0].name].detach()
        found = max(found, relative(spec.parameter.detach(), expected))
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def two_ranks(rank: int, world_size: int) -> dict[torch.dtype, float]:
    found = {}
    for dtype in (torch.float64, torch.float32):
        optimizer, mine = trained(rank, world_size, CHANGED, dtype)
        assert any(rows.first > 0 for rows, _ in optimizer.shards()) or rank == 0  # some tensor is cut
        found[dtype] = worst(optimizer, mine, world_size, dtype)
    return found


LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", LIMITS)
def test_one_rank_equals_torch_with_parameter_groups(dtype: torch.dtype) -> None:
    assert worst(*trained(0, 1, CHANGED, dtype), 1, dtype) < LIMITS[dtype]


def test_two_ranks_equal_torch_with_parameter_groups() -> None:
    for found in run_distributed(two_ranks, 2):
        assert all(found[dtype] < limit for dtype, limit in LIMITS.items()), found


def test_defaults_are_decay_for_all_but_norms_to_the_bit() -> None:
    """And neighbours with equal settings are one call, so that no group splits what was one run of elements."""
    dtype = torch.float32
    optimizer, _ = trained(0, 1, GroupsConfig(), dtype)
    for bucket in optimizer.buckets:
        runs = bucket.group_runs(GroupsConfig().of)
        assert all(one[1] == two[0] and one[2] != two[2] for one, two in pairwise(runs))
        names = [owned.rows.name for owned in bucket.owned]
        value = torch.cat([draw("value", name).to(dtype).flatten() for name in names])
        moments = torch.zeros_like(value), torch.zeros_like(value)
        for step, rate in enumerate(RATES):
            grad = torch.cat([draw(step, 0, name).to(dtype).flatten() for name in names])
            at = 0
            for first, last, _ in runs:
                assert first == at
                at = last
                inside = [o.group for o in bucket.owned if first <= o.offset < last]
                assert len({group == "norms" for group in inside}) == 1
                cut = slice(first, last)
                decay = 0.0 if inside[0] == "norms" else 0.1
                state = (value[cut], moments[0][cut], moments[1][cut])
                adamw(*state, grad[cut], rate, 0.9, 0.95, 1e-8, decay, step + 1)
        assert torch.equal(bucket.master[: len(value)], value)
        assert torch.equal(bucket.exp_avg_sq[: len(value)], moments[1])


def test_a_frozen_group_keeps_its_bits_whatever_comes() -> None:
    """A zero with a sign, and a division by nothing: a learning rate of 0 would change both."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    spec = ParameterSpec(parameter, (Part("w", 0, 2, 2, (2, 2)),), (0,), "b", {0: 1}, "router")
    config = OptimizerConfig(eps=0.0, groups=GroupsConfig(router=GroupConfig(learning_rate_factor=0.0)))
    optimizer = Zero1([spec], config, {}, 0)
    optimizer.initialize(lambda name, first, last: torch.full((2, 2), -0.0))
    optimizer.begin_step({0: 1})
    optimizer.accumulate(parameter, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    done = optimizer.step(0.1)
    assert done.grad_norm == pytest.approx(2**0.5)  # counts in the norm all the same
    assert torch.signbit(parameter).all() and parameter.eq(0).all()


def test_an_unknown_group_is_refused_by_name() -> None:
    spec = ParameterSpec(nn.Parameter(torch.zeros(1, 1)), (Part("w", 0, 1, 1, (1, 1)),), (0,), "b", {0: 1}, "biases")
    with pytest.raises(ValueError, match=f"found 'biases', allowed {', '.join(GROUPS)}"):
        Zero1([spec], OptimizerConfig(), {}, 0)


def test_factors_that_cannot_be_are_named_with_their_group() -> None:
    assert group_problems(CHANGED) == []
    bad = GroupsConfig(router=GroupConfig(-1.0, float("nan")), norms=GroupConfig(float("inf")))
    assert group_problems(bad) == [
        "optimizer.groups.norms.learning_rate_factor: found inf, allowed 0 or more",
        "optimizer.groups.router.learning_rate_factor: found -1.0, allowed 0 or more",
        "optimizer.groups.router.weight_decay_factor: found nan, allowed 0 or more",
    ]

"""ZeRO-1 against torch's AdamW in one process, and what must stop or skip a step."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.optimizer.bucket import ContributionError
from parallel.optimizer.config import OptimizerConfig
from parallel.optimizer.contract import ParameterSpec, Part
from parallel.optimizer.zero1 import Zero1
from tests.distributed_helper import run_distributed
from tests.parallel.optimizer import toy

RATES = (3e-3, 2e-3, 1e-3)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def whole_state(optimizer: Zero1) -> dict[tuple[str, int, int, str], torch.Tensor]:
    return {
        (rows.name, rows.first, rows.last, kind): value.clone()
        for rows, state in optimizer.shards()
        for kind, value in state.items()
    }


def float64_steps(rank: int, groups) -> dict:
    config = OptimizerConfig(clip=50.0, **toy.FLOAT64)
    oracle = toy.Oracle(config)
    specs = toy.make_specs(rank, torch.float64)
    optimizer = Zero1(specs, config, groups, rank)
    optimizer.initialize(toy.initial_rows)
    started: list[str] = []
    for bucket in optimizer.buckets:
        plain = bucket.start_reduction
        bucket.start_reduction = lambda b=bucket, f=plain: (started.append(f"{b.replicas} {b.name}"), f())
    worst, coefficients = 0.0, []
    for step, rate in enumerate(RATES):
        norm = oracle.step(step, rate)
        optimizer.begin_step(toy.chunks_of(rank))
        toy.feed(optimizer, specs, rank, step)
        done = optimizer.step(rate)
        assert not done.skipped
        coefficients.append(done.clip_coefficient)
        worst = max(worst, abs(done.grad_norm - norm) / norm)
        for rows, gradient in optimizer.named_gradients():
            whole = toy.total_gradient(step, rows.name)
            worst = max(worst, relative(gradient, whole.reshape(whole.shape[0], -1)[rows.first : rows.last]))
        for rows, state in optimizer.shards():
            for kind, value in state.items():
                worst = max(worst, relative(value, oracle.state(rows.name, kind)[rows.first : rows.last]))
        for spec in specs:
            expected = torch.cat([oracle.parameters[p.name].detach() for p in spec.parts]).view(spec.parameter.shape)
            worst = max(worst, relative(spec.parameter.detach(), expected))
    owned = [(rows.name, rows.first, rows.last) for rows, _ in optimizer.shards()]
    return {"worst": worst, "coefficients": coefficients, "owned": owned, "started": started}


def non_finite(rank: int, groups, value: float, sick: int) -> dict:
    """A bad value on one rank only, in a tensor that two ranks hold."""
    config = OptimizerConfig()
    specs = toy.make_specs(rank, torch.bfloat16)
    optimizer = Zero1(specs, config, groups, rank)
    optimizer.initialize(toy.initial_rows)
    optimizer.begin_step(toy.chunks_of(rank))
    toy.feed(optimizer, specs, rank, 0)
    optimizer.step(1e-3)
    before, weights = whole_state(optimizer), [s.parameter.detach().clone() for s in specs]

    def spoil(name: str, direction: int, chunk: int, grad: torch.Tensor) -> torch.Tensor:
        if rank == sick and "experts" in name and chunk == 0:
            grad.view(-1)[7] = value
        return grad

    optimizer.begin_step(toy.chunks_of(rank))
    toy.feed(optimizer, specs, rank, 1, spoil)
    done = optimizer.step(1e-3)
    after = whole_state(optimizer)
    same = all(torch.equal(before[key], after[key]) for key in before)
    same = same and all(torch.equal(w, s.parameter) for w, s in zip(weights, specs, strict=True))
    optimizer.begin_step(toy.chunks_of(rank))
    toy.feed(optimizer, specs, rank, 2)
    again = optimizer.step(1e-3)
    return {
        "skipped": done.skipped,
        "norm": done.grad_norm,
        "same": same,
        "updates": optimizer.updates,
        "next": (again.skipped, math.isfinite(again.grad_norm)),
        "dtypes": sorted({f"{key[3]} {value.dtype}" for key, value in after.items()}),
    }


def wrong_counts(rank: int, groups) -> list[str]:
    config = OptimizerConfig(**toy.FLOAT64)
    messages = []

    def attempt(skip: str, twice: str) -> None:
        specs = toy.make_specs(rank, torch.float64)
        optimizer = Zero1(specs, config, groups, rank)
        optimizer.begin_step(toy.chunks_of(rank))
        try:
            for spec in specs:
                for direction, count in toy.chunks_of(rank).items():
                    for _ in range(count * spec.uses.get(direction, 0)):
                        if spec.parts[0].name != skip:
                            optimizer.accumulate(spec.parameter, torch.zeros_like(spec.parameter))
                if spec.parts[0].name == twice:
                    optimizer.accumulate(spec.parameter, torch.zeros_like(spec.parameter))
            optimizer.step(1e-3)
        except ContributionError as error:
            messages.append(str(error))
        dist.barrier()

    attempt("layers.2.norm.weight", "")
    attempt("", "embed.weight")
    return messages


def swapped(rank: int, groups) -> str:
    """Two equal-sized parameters, listed under each other's bucket on two of the ranks."""
    names = ["a", "b"] if rank < 2 else ["b", "a"]
    specs = [
        ParameterSpec(
            nn.Parameter(torch.zeros(4, 4)), (Part(n, 0, 4, 4, (4, 4)),), toy.WORLD, f"b{i}", {0: 1}, "matrices"
        )
        for i, n in enumerate(names)
    ]
    try:
        Zero1(specs, OptimizerConfig(), groups, rank)
    except ValueError as error:
        return str(error)
    return "not noticed"


def body(rank: int, world_size: int) -> dict:
    groups = toy.groups()
    return {
        "float64": float64_steps(rank, groups),
        "nan": non_finite(rank, groups, math.nan, sick=2),
        "inf": non_finite(rank, groups, -math.inf, sick=0),
        "swapped": swapped(rank, groups),
        "counts": wrong_counts(rank, groups),  # last: it leaves reductions that no peer answers
    }


@pytest.fixture(scope="module")
def results():
    return run_distributed(body, 4, timeout=90)


def test_four_ranks_equal_one_process(results):
    worst = max(r["float64"]["worst"] for r in results)
    print("worst relative difference", worst)
    assert worst <= 1e-12
    coefficients = results[0]["float64"]["coefficients"]
    assert coefficients[0] < 1.0 and coefficients[1] == 1.0 and coefficients[2] < 1.0
    assert all(r["float64"]["coefficients"] == coefficients for r in results)


def test_every_row_is_owned_once_in_the_world_and_some_parameters_are_split(results):
    rows = [(name, row) for r in results for name, first, last in r["float64"]["owned"] for row in range(first, last)]
    assert sorted(rows) == sorted((n, row) for n, (shape, *_) in toy.TENSORS.items() for row in range(shape[0]))
    owners = {name: sum(name in {o[0] for o in r["float64"]["owned"]} for r in results) for name in toy.TENSORS}
    assert max(owners.values()) > 1


def test_members_of_a_group_reduce_their_buckets_in_one_order(results):
    """The mirrors fed their parameters in the opposite order."""
    orders = [r["float64"]["started"] for r in results]
    for replicas in {ranks for _, ranks, *_ in toy.TENSORS.values()}:
        found = {tuple(x for x in orders[rank] if x.startswith(str(replicas))) for rank in replicas}
        assert len(found) == 1
    everywhere = [x.split(") ")[1] for x in orders[0] if x.startswith(str(toy.WORLD))][:3]
    assert everywhere == ["layers.10.dense", "layers.2.dense", "embed"]


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_non_finite_gradient_on_one_rank_skips_everywhere_and_changes_nothing(results, kind):
    for result in results:
        found = result[kind]
        assert found["skipped"] and found["same"] and not math.isfinite(found["norm"])
        assert found["updates"] == 2 and found["next"] == (False, True)
        assert found["dtypes"] == ["exp_avg torch.bfloat16", "exp_avg_sq torch.bfloat16", "master torch.float32"]


def test_missing_and_surplus_contributions_name_the_parameter(results):
    for rank, result in enumerate(results):
        missing, surplus = result["counts"]
        assert f"layers.2.norm.weight: 0 of {4 if rank < 2 else 3}" in missing
        assert "embed.weight got one weight-gradient contribution more" in surplus


def test_replicas_that_list_equal_sizes_in_another_order_are_refused(results):
    assert all("ranks [2, 3] against 0" in r["swapped"] for r in results)


# ---- one process, no torch.distributed


def single(**changes) -> tuple[nn.Parameter, Zero1]:
    parameter = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    spec = ParameterSpec(parameter, (Part("w", 0, 3, 2, (3, 2)),), (0,), "b", {0: 1}, "matrices")
    optimizer = Zero1([spec], OptimizerConfig(**{**toy.FLOAT64, **changes}), {}, 0)
    optimizer.initialize(lambda name, first, last: torch.ones(last - first, 2, dtype=torch.float64))
    return parameter, optimizer


def test_one_process_needs_no_process_group():
    parameter, optimizer = single(clip=0.0, weight_decay=0.5)
    optimizer.begin_step({0: 1})
    optimizer.accumulate(parameter, torch.full((3, 2), 4.0, dtype=torch.float64))
    done = optimizer.step(0.1)
    assert done.grad_norm == pytest.approx(math.sqrt(6 * 16)) and done.clip_coefficient == 1.0
    # Adam's first step moves by the learning rate; decay takes lr * 0.5 of the weight.
    torch.testing.assert_close(parameter.detach(), torch.full((3, 2), 1 - 0.05 - 0.1, dtype=torch.float64))


def test_wrong_use_is_refused_by_name():
    parameter, optimizer = single()
    gradient = torch.zeros(3, 2)
    with pytest.raises(ContributionError, match="w got a weight gradient outside a step"):
        optimizer.accumulate(parameter, gradient)
    optimizer.begin_step({0: 1})
    with pytest.raises(ValueError, match=r"gradient of w has shape \(2, 3\)"):
        optimizer.accumulate(parameter, gradient.t())
    with pytest.raises(KeyError, match="has no spec"):
        optimizer.accumulate(nn.Parameter(torch.zeros(3, 2)), gradient)
    with pytest.raises(RuntimeError, match="again before step"):
        optimizer.begin_step({0: 1})
    with pytest.raises(ContributionError, match="w: 0 of 1"):
        optimizer.step(0.1)


def test_state_of_another_dtype_is_refused_not_cast():
    _, optimizer = single()
    with pytest.raises(ValueError, match=r"master of w rows 0 to 3: found torch\.float32"):
        optimizer.load_shards(lambda name, kind, first, last: torch.zeros(last - first, 2))


def test_specs_that_contradict_each_other_are_refused():
    def make(parts, replicas=(0,)):
        return ParameterSpec(nn.Parameter(torch.zeros(3, 2)), parts, replicas, "b", {0: 1}, "matrices")

    good = make((Part("w", 0, 3, 2, (3, 2)),))
    with pytest.raises(ValueError, match="w appears twice"):
        Zero1([good, make(good.parts)], OptimizerConfig(), {}, 0)
    with pytest.raises(ValueError, match="parts cover 2 x 2"):
        Zero1([make((Part("w", 0, 2, 2, (2, 2)),))], OptimizerConfig(), {}, 0)
    with pytest.raises(ValueError, match="shape \\(2, 2\\) is not 3 rows"):
        Zero1([make((Part("w", 0, 3, 2, (2, 2)),))], OptimizerConfig(), {}, 0)
    with pytest.raises(ValueError, match="hold rank 0"):
        Zero1([make(good.parts, (1,))], OptimizerConfig(), {}, 0)
    with pytest.raises(ValueError, match="float16"):
        Zero1([good], OptimizerConfig(moment_dtype="float16"), {}, 0)

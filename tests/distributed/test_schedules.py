"""Every schedule through the real executor, in float64 against plain autograd of one process, chunks of different
lengths: gradients, losses, norms, router loads; and forward only. In float32 the loss of each micro-batch bit for bit.

Cases: schedule x ranks x weight gradients with the table's own split or the other way x MTP x even or uneven layers x
tied embeddings x 2P micro-batches or two. The default tier runs a part that holds every pair of values, the slow one
all of them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from data.contract import IGNORE, MicroBatch, StepCounts
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.initialize import initialize
from model.names import canonical_tensors
from model.rope import Rotary
from model.transformer import Transformer, loss
from parallel.config import ParallelConfig
from parallel.layout import describe, make_layout
from parallel.optimizer.config import OptimizerConfig
from parallel.schedule.actions import Op, Table, flatten
from parallel.schedule.registry import SCHEDULES, build
from parallel.schedule.variants import with_split, without_split
from tests.distributed_helper import run_distributed
from tests.model.models import model_config
from train.engine import Engine, Evaluation, StepPlan

LENGTHS = (12, 7, 16, 9, 1, 14, 10, 5)
FLOAT64 = OptimizerConfig(master_dtype="float64", moment_dtype="float64", accumulate_dtype="float64")
FLOAT32 = OptimizerConfig(master_dtype="float32", moment_dtype="float32", accumulate_dtype="float32")
SEED, MTP_WEIGHT, BALANCE = 3, 0.3, BalanceWeights(sequence=0.05, expert=0.03, device=0.04, communication=0.02)


@dataclass(frozen=True)
class Case:
    """One way to run. other_split: the table's own backwards (False), or whole where it splits and split where not."""

    schedule: str
    ranks: int
    other_split: bool
    mtp: int
    uneven: bool
    tied: bool
    micro_batches: int

    def __str__(self) -> str:
        words = [self.schedule, f"p{self.ranks}", f"m{self.micro_batches}", f"mtp{self.mtp}"]
        flags = {"other_split": self.other_split, "uneven": self.uneven, "tied": self.tied}
        return "-".join(words + [name for name, on in flags.items() if on])


def every_case() -> list[Case]:
    flags = (False, True)
    return [
        Case(schedule, ranks, split, mtp, uneven, tied, micro_batches)
        for schedule, ranks, split, mtp, uneven, tied in itertools.product(
            SCHEDULES, (2, 4), flags, (0, 1), flags, flags
        )
        for micro_batches in (2 * ranks, 2)
    ]


def covering_cases() -> list[Case]:
    """Greedily few cases such that every pair of values of two properties is in one, and every triple of schedule,
    ranks and split."""
    left = {case: _pairs(case) for case in every_case()}
    missing = set().union(*left.values())
    found = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        found.append(best)
    return found


def _pairs(case: Case) -> set[tuple[object, ...]]:
    short = case.micro_batches < 2 * case.ranks
    values = list(enumerate((case.schedule, case.ranks, case.other_split, case.mtp, case.uneven, case.tied, short)))
    return {*itertools.combinations(values, 2), (case.schedule, case.ranks, case.other_split)}


def model_of(case: Case) -> ModelConfig:
    return model_config("tiny", mtp_depth=case.mtp, tie_embeddings=case.tied, vocab_size=64, hidden_size=16)


class VariedEngine(Engine):
    """An engine whose tables split their weight gradients off, or not, as the case says."""

    other_split = False

    def table(self, micro_batches: int) -> Table:
        if micro_batches not in self._tables:
            table = super().table(micro_batches)
            if self.other_split:
                splits = any(action.op is Op.W for row in table.actions for action in flatten(row))
                self._tables[micro_batches] = without_split(table) if splits else with_split(table)
        return self._tables[micro_batches]


def engine_of(case: Case, rank: int, dtype: torch.dtype, optimizer: OptimizerConfig) -> VariedEngine:
    config = model_of(case)
    parallel = ParallelConfig(pipeline=case.ranks, schedule=case.schedule, timeout_seconds=60)
    VariedEngine.other_split = case.other_split
    if case.uneven:
        sizes = uneven(config.num_layers, build(case.schedule, case.ranks, 2).stages)
        parallel = replace(parallel, layout=describe(make_layout(sizes, case.mtp)))
    engine = VariedEngine(config, parallel, optimizer, dtype, False, rank, sources=2)
    engine.initialize(SEED)
    return engine


def uneven(layers: int, stages: int) -> list[int]:
    """Most layers in the middle, none on the first stage."""
    sizes = [0] * stages
    for i in range(layers):
        sizes[1 + (0 if i < layers - 2 else (i * 3) % (stages - 1))] += 1
    return sizes


# Samples --------------------------------------------------------------------------------------------------------------


@functools.cache
def sample(index: int, vocabulary: int, depths: int) -> MicroBatch:
    """Sequence `index` as a micro-batch of its own length, with ignored labels and padding."""
    generator = np.random.default_rng(100 + index)
    shape = (1, LENGTHS[index])
    real = generator.random(shape) > 0.1
    labels = np.where(real & (generator.random(shape) > 0.1), generator.integers(0, vocabulary, shape), IGNORE)
    mtp_labels = np.where(generator.random(shape) > 0.2, labels, IGNORE)[None].repeat(depths, 0)
    return MicroBatch(
        tokens=generator.integers(0, vocabulary, shape),
        labels=labels,
        positions=np.arange(LENGTHS[index])[None],
        documents=np.zeros(shape, np.int64),
        mtp_tokens=generator.integers(0, vocabulary, (depths, *shape)),
        mtp_labels=mtp_labels,
        real=real,
        source=np.array([index % 2]),
    )


def samples_of(config: ModelConfig, count: int) -> list[MicroBatch]:
    return [sample(i, config.vocab_size, config.mtp_depth) for i in range(count)]


def plan_of(batches: list[MicroBatch], depths: int) -> StepPlan:
    mtp = tuple(sum(int((b.mtp_labels[k] != IGNORE).sum()) for b in batches) for k in range(depths))
    main = sum(int((b.labels != IGNORE).sum()) for b in batches)
    counts = StepCounts(main, mtp, len(batches), sum(int(b.real.sum()) for b in batches))
    return StepPlan(counts, 1e-3, MTP_WEIGHT, BALANCE, bias_update=0.01)


# What is compared -----------------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """One rank's share of a step, and of a forward-only step before it. micro: sample -> losses of that micro-batch."""

    main: float
    total: float
    norm: float
    load: list[list[int]]
    gradients: dict[tuple[str, int, int], torch.Tensor]
    micro: dict[int, torch.Tensor]
    evaluated: Evaluation
    evaluated_micro: dict[int, torch.Tensor]


def run_case(case: Case, rank: int, dtype: torch.dtype, optimizer: OptimizerConfig) -> Ran:
    engine = engine_of(case, rank, dtype, optimizer)
    given = samples_of(engine.config, case.micro_batches)
    order = engine.sample_order(0, case.micro_batches, micro_batch=1)
    batches = {key: given[index] for key, (index,) in order.items()}
    plan = plan_of(given, case.mtp)
    evaluated = engine.evaluate(batches, case.micro_batches, plan.counts)
    evaluated_micro = micro_losses(engine, order)
    result = engine.step(batches, case.micro_batches, plan)
    gradients = {(r.name, r.first, r.last): g.clone() for r, g in engine.optimizer.named_gradients()}
    return Ran(
        result.main,
        result.total,
        result.optimizer.grad_norm,
        result.load_LE.tolist(),
        gradients,
        micro_losses(engine, order),
        evaluated,
        evaluated_micro,
    )


def micro_losses(engine: Engine, order: dict[tuple[int, int], list[int]]) -> dict[int, torch.Tensor]:
    found = {}
    for (direction, _), stage in engine.stages.items():
        for chunk, losses in stage.losses.items():
            found[order[direction, chunk][0]] = torch.cat((losses.main_B, losses.mtp_D))
    return found


def run_cases(rank: int, world_size: int, cases: list[Case], single: bool) -> list[Ran]:
    dtype, optimizer = (torch.float32, FLOAT32) if single else (torch.float64, FLOAT64)
    return [run_case(case, rank, dtype, optimizer) for case in cases]


@dataclass
class Expected:
    main: float
    total: float
    norm: float
    load: list[list[int]]
    gradients: dict[str, torch.Tensor]


@functools.cache
def oracle(mtp: int, tied: bool, count: int) -> Expected:
    """Plain autograd, one sequence after another."""
    config = model_of(Case("", 0, False, mtp, False, tied, count))
    model = Transformer(config, torch.float64)
    initialize(model, config, seed=SEED)
    given = samples_of(config, count)
    plan = plan_of(given, mtp)
    main = total = 0.0
    load: list[torch.Tensor] = []
    for batch in given:
        real = torch.from_numpy(batch.real)
        rotary = Rotary(config, batch.tokens.shape[1])
        tokens, mtp_tokens = torch.from_numpy(batch.tokens), torch.from_numpy(batch.mtp_tokens)
        output = model(tokens, mtp_tokens, rotary=rotary, real_BT=real)
        losses = loss(
            output,
            torch.from_numpy(batch.labels),
            torch.from_numpy(batch.mtp_labels),
            main_count=plan.counts.main,
            mtp_counts=plan.counts.mtp,
            sequences=count,
            mtp_weight=MTP_WEIGHT,
            balance_weights=BALANCE,
        )
        losses.total.backward()
        main, total = main + losses.main.item(), total + losses.total.item()
        found = [statistics.load_E for statistics in output.moe.values()]
        load = [a + b for a, b in zip(load, found, strict=True)] if load else found
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    shadow = Transformer(config, torch.float64, device="meta").to_empty(device="cpu")
    for target, source in zip(shadow.parameters(), model.parameters(), strict=True):
        target.data = torch.zeros_like(source) if source.grad is None else source.grad
    named = {name: value for name, value in canonical_tensors(shadow).items() if not name.endswith("router.bias")}
    return Expected(main, total, norm, [row.tolist() for row in load], named)


def compare(case: Case, ranks: list[Ran]) -> float:
    """Worst |g - g'|max / |g|max over tensors; everything else checked on the way."""
    want, worst, zero = oracle(case.mtp, case.tied, case.micro_batches), 0.0, 0
    for got in ranks:
        assert abs(got.main - want.main) <= 1e-10 * abs(want.main), (case, got.main, want.main)
        assert abs(got.total - want.total) <= 1e-10 * abs(want.total), (case, got.total, want.total)
        assert abs(got.norm - want.norm) <= 1e-10 * want.norm, (case, got.norm, want.norm)
        assert got.load == want.load, case
        assert got.evaluated.main == pytest.approx(got.main, rel=1e-14), case
        assert got.micro.keys() == got.evaluated_micro.keys(), case
        assert all(torch.equal(got.micro[i], got.evaluated_micro[i]) for i in got.micro), case
    assert sorted(i for got in ranks for i in got.micro) == list(range(case.micro_batches)), case
    for tensor, grad in want.gradients.items():
        flat, error = grad.reshape(grad.shape[0], -1), 0.0
        covered = torch.zeros(len(flat), dtype=torch.int64)
        for got in ranks:
            for (piece, first, last), value in got.gradients.items():
                if piece == tensor:
                    covered[first:last] += 1
                    error = max(error, (value.view(last - first, -1) - flat[first:last]).abs().max().item())
        assert (covered == 1).all(), f"{case}: {tensor} is not owned exactly once"
        size = flat.abs().max().item()
        zero += size == 0
        assert size > 0 or error == 0, (case, tensor)
        worst = max(worst, error / size if size else 0.0)
    assert zero < 0.1 * len(want.gradients), f"{case}: {zero} of {len(want.gradients)} gradients are zero"
    return worst


def check_all(cases: list[Case]) -> None:
    worst: dict[str, float] = {}
    for ranks in (2, 4):
        chosen = [case for case in cases if case.ranks == ranks]
        found = run_distributed(run_cases, ranks, chosen, False, timeout=60 + 3 * len(chosen))
        for i, case in enumerate(chosen):
            worst[str(case)] = compare(case, [steps[i] for steps in found])
    name = max(worst, key=lambda key: worst[key])
    print(f"{len(worst)} cases, worst gradient difference {worst[name]:.1e} ({name})")
    assert worst[name] <= 1e-10


def test_the_covering_cases_cover() -> None:
    cases = covering_cases()
    assert set().union(*map(_pairs, cases)) == set().union(*map(_pairs, every_case()))
    assert len(every_case()) == len(SCHEDULES) * 2**6 and len(cases) < 60


def test_schedules_equal_one_process() -> None:
    check_all(covering_cases())


@pytest.mark.slow
def test_schedules_equal_one_process_in_every_case() -> None:
    check_all(every_case())


def test_micro_batch_losses_bit_for_bit() -> None:
    """In float32, whatever the schedule: the micro-batch sees the same operations as on one process."""
    for ranks in (2, 4):
        count = 2 * ranks
        cases = [Case(name, ranks, False, 1, False, False, count) for name in SCHEDULES]
        found = run_distributed(run_cases, ranks, cases, True)
        (alone,) = run_distributed(run_cases, 1, [Case("gpipe", 1, False, 1, False, False, count)], True)
        for i, case in enumerate(cases):
            micro = {index: losses for steps in found for index, losses in steps[i].micro.items()}
            assert sorted(micro) == list(range(count))
            for index, losses in micro.items():
                assert losses.dtype == torch.float32
                assert torch.equal(losses, alone[0].micro[index]), (case, index)

"""Saved by four ranks; loaded by four, two and one: every named tensor bit for bit."""

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.optimizer.config import OptimizerConfig
from parallel.optimizer.contract import ParameterSpec, Part
from parallel.optimizer.zero1 import Zero1
from tests.distributed_helper import run_distributed
from tests.parallel.optimizer import toy
from train.checkpoint import find_latest, save_checkpoint
from train.checkpoint_format import CheckpointError, CheckpointWriteError

KINDS = {"master": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
BIASES = {0: {"layers.2.router.bias": torch.arange(4.0) / 3}, 1: {"layers.10.router.bias": torch.arange(4.0) / 7}}
EXTRA_SHAPES = {name: tuple(value.shape) for biases in BIASES.values() for name, value in biases.items()}

State = dict[tuple[str, str], torch.Tensor]


def state_of(optimizer: Zero1) -> list[tuple[str, int, int, str, torch.Tensor]]:
    return [(r.name, r.first, r.last, kind, v.clone()) for r, state in optimizer.shards() for kind, v in state.items()]


def by_name(results) -> State:
    """Whole tensors from the pieces that the ranks own."""
    pieces: dict[tuple[str, str], list] = {}
    for result in results:
        for name, first, _, kind, value in result:
            pieces.setdefault((name, kind), []).append((first, value))
    return {key: torch.cat([v for _, v in sorted(found, key=lambda p: p[0])]) for key, found in pieces.items()}


def take_step(optimizer: Zero1, specs, rank: int, step: int) -> float:
    optimizer.begin_step(toy.chunks_of(rank))
    toy.feed(optimizer, specs, rank, step)
    return optimizer.step(1e-3).grad_norm


def listing(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(directory)), p.stat().st_size) for p in directory.rglob("*"))


def saving(rank: int, world_size: int, directory: Path) -> dict:
    groups = toy.groups()
    specs = toy.make_specs(rank, torch.bfloat16)
    optimizer = Zero1(specs, OptimizerConfig(), groups, rank)
    optimizer.initialize(toy.initial_rows)
    for step in range(2):
        take_step(optimizer, specs, rank, step)
    saved = state_of(optimizer)
    extra = BIASES.get(rank, {})
    state = {"updates": optimizer.updates}
    save_checkpoint(directory, 2, optimizer.shards(), optimizer.shapes(), extra, state)
    norm = take_step(optimizer, specs, rank, 2)
    after = state_of(optimizer)

    # The disk of one rank fails, then two ranks claim the same tensor: nobody publishes.
    before, messages, real = listing(directory), [], os.fsync
    torch.distributed.barrier()
    if rank == 2:

        def fsync(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = fsync
    for claimed in (extra, BIASES[0]):
        try:
            save_checkpoint(directory, 3, optimizer.shards(), optimizer.shapes(), claimed, state)
        except CheckpointWriteError as error:
            messages.append(str(error))
        os.fsync = real
    untouched = listing(directory) == before

    # A fresh process of the same layout goes on where the first one was.
    specs = toy.make_specs(rank, torch.bfloat16)
    resumed = Zero1(specs, OptimizerConfig(), groups, rank)
    checkpoint = find_latest(directory).checkpoint
    assert checkpoint is not None
    checkpoint.require(resumed.shapes(), EXTRA_SHAPES, KINDS)
    resumed.load_shards(checkpoint.read)
    resumed.updates = checkpoint.state["updates"]
    weights = {s.parts[0].name: s.parameter.detach().clone() for s in specs}
    again = take_step(resumed, specs, rank, 2)
    return {
        "saved": saved,
        "after": after,
        "resumed": state_of(resumed),
        "norms": (norm, again),
        "messages": messages,
        "untouched": untouched,
        "weights": weights,
    }


def loading(rank: int, world_size: int, directory: Path) -> dict:
    """Another layout: dense tensors on all ranks, experts split over them (stacked by kind)."""
    everyone = tuple(range(world_size))
    groups = {everyone: torch.distributed.group.WORLD}
    experts = range(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    specs = []
    for name, (shape, *_) in toy.TENSORS.items():
        if "experts" not in name:
            part = Part(name, 0, shape[0], torch.zeros(shape)[0].numel(), shape)
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
            specs.append(ParameterSpec(parameter, (part,), everyone, "dense", {0: 1}, "matrices"))
    for kind, shape in (("up", (200, 16)), ("down", (16, 200))):
        parts = tuple(
            Part(f"layers.10.experts.{e}.{kind}.weight", i * shape[0], (i + 1) * shape[0], shape[1], shape)
            for i, e in enumerate(experts)
        )
        parameter = nn.Parameter(torch.zeros((len(experts), *shape), dtype=torch.bfloat16))
        specs.append(ParameterSpec(parameter, parts, (rank,), "experts", {0: 1}, "experts"))
    optimizer = Zero1(specs, OptimizerConfig(), groups, rank)
    checkpoint = find_latest(directory).checkpoint
    assert checkpoint is not None
    checkpoint.require(optimizer.shapes(), EXTRA_SHAPES, KINDS)
    optimizer.load_shards(checkpoint.read)
    refused = ""
    try:  # only the last rank wants it, every rank must refuse
        wanted = {"other.weight": (1, 1)} if rank == world_size - 1 else {}
        checkpoint.require({**optimizer.shapes(), **wanted}, EXTRA_SHAPES, KINDS)
    except CheckpointError as error:
        refused = str(error)
    return {
        "state": state_of(optimizer),
        "extra": {name: checkpoint.extra(name) for name in EXTRA_SHAPES},
        "weights": {
            p.name: s.parameter.detach().view(-1, p.columns)[p.first_row : p.last_row].clone()
            for s in specs
            for p in s.parts
        },
        "refused": refused,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(directory):
    return run_distributed(saving, 4, directory)


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype and torch.equal(found[k], expected[k]) for k in expected
    )


def test_four_ranks_resume_bit_for_bit(saved):
    assert same(by_name([r["resumed"] for r in saved]), by_name([r["after"] for r in saved]))
    assert not same(by_name([r["saved"] for r in saved]), by_name([r["after"] for r in saved]))
    assert len({norm for r in saved for norm in r["norms"]}) == 1


def test_moments_stay_bf16(saved):
    dtypes = {(kind, value.dtype) for r in saved for *_, kind, value in r["resumed"]}
    assert dtypes == set(KINDS.items())


def test_a_rank_that_cannot_write_fails_the_save_on_all(saved):
    for result in saved:
        full, twice = result["messages"]
        assert "rank 2: OSError" in full and "No space left" in full and "rank 0" not in full
        assert "extra tensor layers.2.router.bias is saved by" in twice
        assert result["untouched"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_layout_loads_every_tensor_bit_for_bit(saved, directory, world_size):
    loaded = run_distributed(loading, world_size, directory)
    expected = by_name([r["saved"] for r in saved])
    assert same(by_name([r["state"] for r in loaded]), expected)
    for result in loaded:
        for biases in BIASES.values():
            assert all(torch.equal(result["extra"][name], value) for name, value in biases.items())
        for name, weight in result["weights"].items():
            assert torch.equal(weight, expected[name, "master"].bfloat16())
        assert "tensor other.weight: found nothing, expected shape (1, 1)" in result["refused"]

"""A rank is laid out on the meta device: what it holds and owns is known before it takes any memory."""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction

import pytest
import torch

from model.count import count_parameters
from model.names import canonical_shapes, is_router_bias
from model.partition import RankModel, stage_layout
from model.transformer import Transformer
from parallel.config import ParallelConfig
from parallel.layout import parse
from parallel.optimizer.config import OptimizerConfig
from parallel.optimizer.contract import ParameterSpec
from parallel.optimizer.zero1 import Zero1
from parallel.schedule.registry import build
from parallel.topology import Topology
from tests.distributed_helper import run_distributed
from tests.model.models import model_config


class Alone:
    """No process group for any replicas: a layout is computed, nothing is sent."""

    def __getitem__(self, ranks: tuple[int, ...], /) -> None:
        return None


def rank_models(name: str, parallel: ParallelConfig, ranks: Iterable[int], **changes: object) -> Iterator[RankModel]:
    config = model_config(name, **changes)
    table = build(parallel.schedule, parallel.pipeline, 2 * parallel.pipeline, parallel.stages_per_rank or None)
    layout = stage_layout(config, table, "")
    for rank in ranks:
        yield RankModel(config, Topology.of(parallel, rank), table, layout, torch.bfloat16, "meta")


def owned_by(model: RankModel) -> list[tuple[str, int, int]]:
    optimizer = Zero1(model.specs(), OptimizerConfig(), Alone(), model.topology.rank)
    return [(rows.name, rows.first, rows.last) for rows, _ in optimizer.shards()]


def trained_parameters(name: str) -> int:
    """Of the main model and MTP, without router biases, which no optimizer holds."""
    counts, shapes = count_parameters(model_config(name)), canonical_shapes(model_config(name))
    biases = sum(shape[0] for tensor, shape in shapes.items() if is_router_bias(tensor))
    return counts.total + counts.mtp - biases


def a_v3_rank(rank: int, world_size: int) -> dict[str, object]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = Transformer(model_config("v3"), torch.bfloat16, device="meta")
    (model,) = rank_models("v3", ParallelConfig(pipeline=16, expert=64, schedule="dualpipe"), [517])
    specs, owned = model.specs(), owned_by(model)
    return {
        "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "meta": all(tensor.is_meta for m in (whole, model) for tensor in [*m.parameters(), *m.buffers()]),
        "whole": sum(parameter.numel() for parameter in whole.parameters()),
        "held": {part.name: part.shape for spec in specs for part in spec.parts},
        "replicas": {part.name: len(spec.replicas) for spec in specs for part in spec.parts},
        "owned": owned,
    }


def test_a_rank_of_v3_takes_no_memory() -> None:
    """Rank 517 of 16 x 64: pipeline rank 8, expert rank 5, whose two stages are the 8th and its mirror, the 9th."""
    (found,) = run_distributed(a_v3_rank, 1)
    print(f"{found['mebibytes']:.0f} MiB")
    assert found["meta"] and found["mebibytes"] < 200
    assert found["whole"] == trained_parameters("v3") == 671_026_404_352 + 11_610_068_224 - 256
    shapes = canonical_shapes(model_config("v3"))
    layers = {int(name.split(".")[1]) for name in found["held"]}
    assert len(layers) == 8 and min(layers) == 28 and max(layers) == 35
    experts = [f"experts.{e}." for e in range(20, 24)]
    expected = {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(tuple(f"layers.{i}." for i in layers))
        and not is_router_bias(name)
        and (".experts." not in name or any(f".{e}" in name for e in experts))
    }
    assert found["held"] == expected
    assert all(found["replicas"][name] == (2 if ".experts." in name else 128) for name in expected)
    assert found["owned"] and all(0 <= first < last <= expected[name][0] for name, first, last in found["owned"])


def test_all_ranks_of_v3_share_every_parameter_once() -> None:
    parallel = ParallelConfig(pipeline=16, expert=8, schedule="dualpipe")
    total = Fraction(0)
    for model in rank_models("v3", parallel, range(parallel.world_size)):
        for spec in model.specs():
            total += Fraction(spec.parameter.numel(), len(spec.replicas))
    assert total == trained_parameters("v3")


@pytest.mark.parametrize("schedule,data", [("dualpipe", 1), ("1f1b", 2)])
def test_owned_rows_of_all_ranks_are_every_row_once(schedule: str, data: int) -> None:
    parallel = ParallelConfig(pipeline=4, expert=8, data=data, schedule=schedule)
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for model in rank_models("proxy_1b", parallel, range(parallel.world_size)):
        for name, first, last in owned_by(model):
            rows[name].append((first, last))
    shapes = canonical_shapes(model_config("proxy_1b"))
    assert set(rows) == {name for name in shapes if not is_router_bias(name)}
    owned = 0
    for name, found in rows.items():
        edges = sorted(found)
        assert [first for first, _ in edges] == [0, *(last for _, last in edges[:-1])] and edges[-1][1] == shapes[name][
            0
        ]
        owned += sum(last - first for first, last in edges) * torch.Size(shapes[name][1:]).numel()
    assert owned == trained_parameters("proxy_1b")


def described(spec: ParameterSpec) -> tuple[object, ...]:
    return (*vars(spec).values(),)[1:], spec.parameter.shape, spec.parameter.dtype, spec.parameter.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_materialising_changes_nothing_but_the_device(tied: bool) -> None:
    (model,) = rank_models("tiny", ParallelConfig(expert=2), [1], tie_embeddings=tied)
    before = [described(spec) for spec in model.specs()]
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        model.materialise("cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [described(spec) for spec in model.specs()] == before
    assert (model.head is model.embed) == tied
    assert all(p.device.type == "cpu" and p.isnan().all() for p in model.parameters())
    biases = list(model.buffers())
    assert len(biases) == 5 and all(bias.eq(0).all() and bias.device.type == "cpu" for bias in biases)


def test_the_default_is_on_the_cpu() -> None:
    topology, table = Topology(1, 1, 1, 0), build("1f1b", 1, 2)
    model = RankModel(model_config("tiny"), topology, table, parse("Et*5mL"), torch.float32)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(bias.eq(0).all() for bias in model.buffers())

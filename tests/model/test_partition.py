"""What each rank holds, for every rank of a layout at once: coverage, replicas, buckets, uses."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from model.names import canonical_shapes, is_router_bias
from model.ops import Ops
from model.partition import RankModel, stage_layout
from parallel.config import ParallelConfig
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.layout import describe, parse
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.registry import build
from parallel.topology import Topology
from tests.model.models import model_config

# `M` stands for the MTP depths, however many.
LAYOUTS = {
    "one": ParallelConfig(layout="Et*5ML"),
    "pp2_dualpipe_ep2": ParallelConfig(pipeline=2, expert=2, schedule="dualpipe", layout="Et*3|ttML"),
    "pp4_dualpipe": ParallelConfig(pipeline=4, schedule="dualpipe", layout="Ett|t|t|tML"),
    "pp4_1f1b": ParallelConfig(pipeline=4),
    "pp2_1f1b_dp2_ep2": ParallelConfig(pipeline=2, data=2, expert=2),
    "pp2_zbv": ParallelConfig(pipeline=2, schedule="zbv"),
    "pp2_dualpipev_empty_ends_ep2": ParallelConfig(pipeline=2, expert=2, schedule="dualpipev", layout="E|ttt|tt|ML"),
    "pp4_dualpipe_empty": ParallelConfig(pipeline=4, schedule="dualpipe", layout="E|t*4||tML"),
    "pp4_zbv_dp2": ParallelConfig(pipeline=4, data=2, schedule="zbv"),
    "pp2_interleaved": ParallelConfig(pipeline=2, schedule="interleaved", layout="Et|t||tttML"),
    "pp2_interleaved_3": ParallelConfig(pipeline=2, schedule="interleaved", stages_per_rank=3),
}


def world(name: str, depths: int = 1, tied: bool = False) -> list[RankModel]:
    """The model of every rank, in this process."""
    parallel, config = LAYOUTS[name], model_config("tiny", mtp_depth=depths, tie_embeddings=tied)
    table = build(parallel.schedule, parallel.pipeline, 2, parallel.stages_per_rank or None)
    ranks = range(parallel.world_size)
    layout = stage_layout(config, table, parallel.layout.replace("M", "m" * depths))
    return [RankModel(config, Topology.of(parallel, rank), table, layout, torch.float32) for rank in ranks]


def test_experts_must_divide() -> None:
    topology, table = Topology(1, 1, 3, 0), build("1f1b", 1, 2)
    with pytest.raises(ValueError, match=r"parallel\.expert: 3 does not divide the model's 8 experts"):
        RankModel(model_config("tiny"), topology, table, parse("Et*5mL"), torch.float32)


def test_layouts_that_do_not_fit() -> None:
    config, table = model_config("tiny"), build("dualpipe", 2, 2)
    for text, message in (
        ("Et*5mL", "parallel.layout 'Et*5mL': found 1 stages, allowed 2"),
        ("Et|t*3mL", "parallel.layout 'Et|t*3mL': found 4 transformer layers (t), allowed 5"),
        ("Ett|t*3L", "parallel.layout 'Ett|t*3L': found 0 MTP depths (m), allowed 1"),
        ("Ett|t*3|m|L", "parallel.layout 'Ett|t*3|m|L', position 10: found a stage ends after m without L; "),
    ):
        with pytest.raises(ValueError) as caught:
            stage_layout(config, table, text)
        assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"layout 'Et\*5mL': found 1 stages, allowed 2"):
        RankModel(config, Topology(1, 2, 1, 0), table, parse("Et*5mL"), torch.float32)


def test_default_layouts() -> None:
    """The largest rank load is smallest: in V3 head and MTP depth weigh about as much as four layers."""

    def default(name: str, schedule: str, ranks: int, **changes: object) -> str:
        config = model_config(name, **changes)
        return describe(stage_layout(config, build(schedule, ranks, 2), ""))

    assert default("tiny", "1f1b", 1) == "Et*5mL"
    assert default("v3", "1f1b", 16) == "Et*4|(t*4|)*14tmL"
    assert default("v3", "dualpipe", 16) == default("v3", "zbv", 8) == "Et*4|(t*4|)*14tmL"  # the same pairs of stages
    assert default("v3", "dualpipe", 16, mtp_depth=0) == "Et*4|(t*4|)*7t*3|(t*4|)*6ttL"
    assert default("tiny", "dualpipe", 4) == "E|tt|tt|tmL"
    assert default("tiny", "zbv", 4, num_layers=2) == "E|t|t||*4mL"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("depths", [0, 1, 2])
def test_every_tensor_is_held_and_its_replicas_are_who_hold_it(name: str, depths: int, tied: bool) -> None:
    models = world(name, depths, tied)
    expected = {n: s for n, s in canonical_shapes(models[0].config).items() if not is_router_bias(n)}
    holders: dict[str, set[int]] = defaultdict(set)
    claimed: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for rank, model in enumerate(models):
        parameters = {id(p) for p in model.parameters()}
        specs = model.specs()
        assert {id(spec.parameter) for spec in specs} == parameters and len(specs) == len(parameters)
        for spec in specs:
            rows = spec.parameter.reshape(-1, spec.parts[0].columns).shape[0]
            edges = [(part.first_row, part.last_row) for part in spec.parts]
            assert [first for first, _ in edges] == [0, *(last for _, last in edges[:-1])] and edges[-1][1] == rows
            for part in spec.parts:
                assert part.shape == expected[part.name]
                holders[part.name].add(rank)
                claimed[part.name].add(spec.replicas)
    assert set(holders) == set(expected)
    for tensor, ranks in holders.items():
        assert claimed[tensor] == {tuple(sorted(ranks))}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_buckets_agree_across_their_replicas(name: str, tied: bool) -> None:
    """Same bucket, same tensors in the same order on every rank of its group; one group per bucket."""
    models = world(name, tied=tied)
    content: dict[tuple[str, tuple[int, ...]], dict[int, list[str]]] = defaultdict(dict)
    for rank, model in enumerate(models):
        groups: dict[str, tuple[int, ...]] = {}
        for spec in model.specs():
            assert groups.setdefault(spec.bucket, spec.replicas) == spec.replicas
            names = content[spec.bucket, spec.replicas].setdefault(rank, [])
            names += [part.name for part in spec.parts]
    for (_, replicas), by_rank in content.items():
        assert tuple(sorted(by_rank)) == replicas
        assert len({tuple(names) for names in by_rank.values()}) == 1
    names = sorted({bucket for bucket, _ in content})
    layers = [f"layers.{i}.dense" for i in range(5)] + [f"layers.{i}.experts" for i in range(1, 5)]
    assert names == sorted(["embed", "output", *layers, "mtp.0.dense", "mtp.0.experts"])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_makes_the_same_replica_groups(name: str, tied: bool) -> None:
    models = world(name, tied=tied)
    groups = [set(model.replica_groups()) for model in models]
    assert all(found == groups[0] for found in groups)
    assert {spec.replicas for model in models for spec in model.specs()} <= groups[0]


def replicas_of(models: list[RankModel]) -> dict[str, tuple[int, ...]]:
    return {part.name: spec.replicas for model in models for spec in model.specs() for part in spec.parts}


def test_replicas_written_out() -> None:
    one_way = replicas_of(world("pp2_1f1b_dp2_ep2"))  # rank = (data * 2 + pipeline) * 2 + expert
    assert one_way["layers.0.attn_norm"] == one_way["layers.1.router.weight"] == (0, 1, 4, 5)
    assert one_way["layers.1.experts.0.down"] == one_way["layers.1.experts.3.gate_up"] == (0, 4)
    assert one_way["layers.1.experts.4.down"] == one_way["layers.1.experts.7.gate_up"] == (1, 5)
    assert one_way["head"] == one_way["norm"] == one_way["mtp.0.proj"] == (2, 3, 6, 7)
    assert one_way["mtp.0.layer.experts.4.down"] == (3, 7)
    assert one_way["embed"] == tuple(range(8))  # the MTP depths look it up on the last stage
    assert replicas_of(world("pp2_1f1b_dp2_ep2", depths=0))["embed"] == (0, 1, 4, 5)
    mirrored = replicas_of(world("pp2_dualpipe_ep2"))  # both stages live on both pipeline ranks
    assert mirrored["embed"] == mirrored["head"] == mirrored["layers.4.attention.o"] == (0, 1, 2, 3)
    assert mirrored["layers.4.experts.0.down"] == (0, 2) and mirrored["layers.4.experts.7.down"] == (1, 3)
    deep = replicas_of(world("pp4_dualpipe"))  # stages 0 and 3 on ranks 0 and 3, stages 1 and 2 on the others
    assert deep["embed"] == deep["head"] == deep["layers.4.attn_norm"] == (0, 3)
    assert deep["layers.2.attn_norm"] == deep["layers.3.attn_norm"] == (1, 2)
    assert replicas_of(world("pp4_1f1b"))["embed"] == (0, 3)


def uses_of(model: RankModel) -> dict[str, dict[int, int]]:
    return {part.name: spec.uses for spec in model.specs() for part in spec.parts}


def test_uses_written_out() -> None:
    """Contributions per chunk and direction: the embedding once, and once per MTP depth; so the head."""
    for depths in (0, 1, 2):
        (one,) = map(uses_of, world("one", depths))
        assert one["embed"] == one["head"] == {0: 1 + depths}
        assert one["norm"] == one["layers.3.router.weight"] == {0: 1}
    first, last = map(uses_of, world("pp2_dualpipe_ep2", depths=2)[::2])
    assert first["embed"] == {0: 1, 1: 2} and last["embed"] == {1: 1, 0: 2}
    assert first["head"] == {1: 3} and last["head"] == {0: 3}
    assert first["layers.0.attn_norm"] == {0: 1} and first["layers.4.attn_norm"] == {1: 1}
    assert last["layers.0.attn_norm"] == {1: 1} and last["layers.4.experts.0.down"] == {0: 1}
    assert first["mtp.1.proj"] == {1: 1}
    stages = [uses_of(model) for model in world("pp4_1f1b", depths=2)]
    assert stages[0]["embed"] == {0: 1} and stages[3]["embed"] == {0: 2} and stages[3]["head"] == {0: 3}
    assert all("embed" not in stage and "head" not in stage for stage in stages[1:3])


def test_uses_where_one_rank_holds_several_stages_of_a_direction() -> None:
    """Both ends of a V are on rank 0, so its lookups add up."""
    both, middle = map(uses_of, world("pp2_dualpipev_empty_ends_ep2", depths=2)[::2])
    assert both == {name: both[name] for name in both if name.startswith(("embed", "norm", "head", "mtp."))}
    assert both["embed"] == both["head"] == {0: 3} and both["norm"] == both["mtp.1.proj"] == {0: 1}
    assert {name.split(".")[1] for name in middle} == set("01234") and set(map(str, middle.values())) == {"{0: 1}"}
    first, last = map(uses_of, world("pp2_interleaved", depths=1))  # stages 0 and 2, 1 and 3
    assert first["embed"] == {0: 1} and last["embed"] == {0: 1} and last["head"] == {0: 2}
    assert {name.split(".")[1] for name in first if name.startswith("layers")} == {"0"}


def test_uses_of_tied_embeddings() -> None:
    """One parameter: a lookup on the first stage, the head's 1 + D products and the MTP's D lookups on the last."""
    for depths in (0, 1, 2):
        output = 1 + 2 * depths
        (one,) = map(uses_of, world("one", depths, tied=True))
        assert one["embed"] == {0: 1 + output} and "head" not in one
        first, last = map(uses_of, world("pp2_dualpipe_ep2", depths, tied=True)[::2])
        assert first["embed"] == {0: 1, 1: output} and last["embed"] == {1: 1, 0: output}
        stages = [uses_of(model) for model in world("pp4_1f1b", depths, tied=True)]
        assert stages[0]["embed"] == {0: 1} and stages[3]["embed"] == {0: output}
        ranks = [uses_of(model) for model in world("pp2_zbv", depths, tied=True)]
        assert ranks[0]["embed"] == {0: 1 + output} and "embed" not in ranks[1]
    tied = replicas_of(world("pp4_1f1b", 0, tied=True))
    assert tied["embed"] == (0, 3) and tied["norm"] == (3,)
    assert replicas_of(world("pp2_1f1b_dp2_ep2", 0, tied=True))["embed"] == tuple(range(8))


@pytest.mark.parametrize("tied", [False, True])
def test_groups_written_out(tied: bool) -> None:
    (model,) = world("one", tied=tied)
    groups = {part.name: spec.group for spec in model.specs() for part in spec.parts}
    assert groups["embed"] == "embedding" and groups.get("head") == (None if tied else "head")
    assert groups["norm"] == groups["mtp.0.hidden_norm"] == groups["layers.1.attention.kv_norm"] == "norms"
    assert groups["layers.1.router.weight"] == groups["mtp.0.layer.router.weight"] == "router"
    assert groups["layers.1.experts.7.down"] == groups["mtp.0.layer.experts.0.gate_up"] == "experts"
    for name in ("layers.0.mlp.down", "layers.1.shared.gate_up", "layers.1.attention.kv_b", "mtp.0.proj"):
        assert groups[name] == "matrices"
    assert set(groups) == {name for name in canonical_shapes(model.config) if not is_router_bias(name)}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_stages_share_the_ranks_modules(name: str, tied: bool) -> None:
    class Nowhere:
        def accumulate(self, parameter: torch.nn.Parameter, grad: torch.Tensor) -> None: ...

    held: set[str] = set()
    for model in world(name, depths=2, tied=tied):
        ops = Ops(WeightGradStore(Nowhere()), torch.float32, False, 1e-6)
        stages = model.build_stages(ops, AllToAllDispatcher(8, None))
        assert list(stages) == model.table.stages_of(model.topology.pipeline_rank)
        for (_, stage), built in stages.items():
            first, last = model.split[stage]
            assert [layer.layer for layer in built.layers] == [model.layers[str(i)] for i in range(first, last)]
            assert built.first == (stage == 0)
            assert (built.output is not None) == (stage == model.table.stages - 1)
            if built.output is not None:
                assert built.output.head is (model.embed if tied else model.head) is not None
                assert [depth.module for depth in built.output.depths] == list(model.mtp)
                assert built.embed is model.embed is not None
        biases = model.router_biases()
        assert all(model.get_submodule(n.removesuffix(".router.bias")).router.bias is b for n, b in biases.items())
        held |= set(biases)
    assert held == {n for n in canonical_shapes(model.config) if is_router_bias(n)}

"""Whatever the layout, ranks start from the same bits: masters by owner, compute copies on every holder."""

from __future__ import annotations

import pytest
import torch

from model.initialize import initial_rows
from model.names import canonical_shapes, canonical_tensors, is_router_bias
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig
from tests.distributed_helper import run_distributed
from tests.model.models import model_config
from train.engine import Engine

SEED = 5
LAYOUTS = {
    "dualpipe_pp2_ep2": ParallelConfig(pipeline=2, expert=2, schedule="dualpipe"),
    "dualpipe_pp4": ParallelConfig(pipeline=4, schedule="dualpipe"),
    "1f1b_pp2_dp2": ParallelConfig(pipeline=2, data=2),
    "ep4": ParallelConfig(expert=4),
}
Found = dict[str, tuple[list[tuple[str, int, int]], list[str], list[str]]]


def started(rank: int, world_size: int, tied: bool, layouts: dict[str, ParallelConfig]) -> Found:
    """Of each layout: the rows that this rank owns, the tensors that it holds, and what has other bits than the one
    tensor of that name."""
    config = model_config("tiny", tie_embeddings=tied)
    shapes = canonical_shapes(config)

    def expected(name: str, first: int, last: int) -> torch.Tensor:
        return initial_rows(name, shapes[name], config.init_std, SEED, first, last)

    found: Found = {}
    for layout, parallel in layouts.items():
        engine = Engine(config, parallel, OptimizerConfig(), torch.bfloat16, False, rank, sources=2)
        engine.initialize(SEED)
        owned, wrong = [], []
        for rows, state in engine.optimizer.shards():
            owned.append((rows.name, rows.first, rows.last))
            same = torch.equal(state["master"], expected(rows.name, rows.first, rows.last))
            if not same or state["exp_avg"].any() or state["exp_avg_sq"].any():
                wrong.append(f"state of {rows.name} {rows.first}..{rows.last}")
        held = canonical_tensors(engine.model)
        if tied:
            held.pop("head", None)
        for name, value in held.items():
            whole = expected(name, 0, shapes[name][0]).view(shapes[name])
            if not torch.equal(value, whole.to(value.dtype)):
                wrong.append(f"parameter {name}")
        found[layout] = (owned, list(held), wrong)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_starts_from_the_same_bits(tied: bool) -> None:
    shapes = canonical_shapes(model_config("tiny", tie_embeddings=tied))
    every = {"one": started(0, 1, tied, {"one": ParallelConfig()})["one"]}
    results = [[every["one"]]]
    layouts = {name: LAYOUTS[name] for name in LAYOUTS if not tied or "dualpipe" in name}
    ranks = run_distributed(started, 4, tied, layouts)
    results += [[rank[layout] for rank in ranks] for layout in layouts]
    for result in results:
        assert [wrong for _, _, wrong in result] == [[]] * len(result)
        assert {name for _, held, _ in result for name in held} == set(shapes)
        rows = [(name, row) for owned, _, _ in result for name, first, last in owned for row in range(first, last)]
        trained = {name: shape for name, shape in shapes.items() if not is_router_bias(name)}
        assert sorted(rows) == sorted((name, row) for name, shape in trained.items() for row in range(shape[0]))

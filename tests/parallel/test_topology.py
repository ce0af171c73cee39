"""Coordinates read off the grid, and process groups made from sets of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.topology import Groups, Topology
from tests.distributed_helper import run_distributed

SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (3, 4, 2)]


def world(sizes: tuple[int, int, int]) -> list[Topology]:
    data, pipeline, expert = sizes
    config = ParallelConfig(data=data, pipeline=pipeline, expert=expert)
    return [Topology.of(config, rank) for rank in range(config.world_size)]


def test_an_expert_group_is_contiguous() -> None:
    """Rank = (data * 2 + pipeline) * 2 + expert, written out."""
    ranks = world((2, 2, 2))
    found = [(t.data_rank, t.pipeline_rank, t.expert_rank) for t in ranks]
    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert ranks[0].expert_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [t.replica for t in ranks] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert [ranks[5].pipeline_peer(p) for p in range(2)] == [5, 7]
    assert [ranks[2].pipeline_peer(p) for p in range(2)] == [0, 2]


@pytest.mark.parametrize("sizes", SIZES)
def test_coordinates_and_grid_agree(sizes: tuple[int, int, int]) -> None:
    for rank, t in enumerate(world(sizes)):
        assert t.grid[t.data_rank, t.pipeline_rank, t.expert_rank] == rank
        assert t.grid.numel() == t.world_size
        assert t.pipeline_peer(t.pipeline_rank) == rank
        peers = [world(sizes)[t.pipeline_peer(p)] for p in range(t.pipeline)]
        assert {peer.replica for peer in peers} == {t.replica}
        assert [peer.pipeline_rank for peer in peers] == list(range(t.pipeline))
        groups = t.expert_groups()
        assert sorted(r for group in groups for r in group) == list(range(t.world_size))
        (mine,) = [group for group in groups if rank in group]
        assert mine[t.expert_rank] == rank
    assert {t.replica for t in world(sizes)} == set(range(sizes[0] * sizes[2]))


def sums(rank: int, world_size: int) -> dict[tuple[int, ...], float | None]:
    """What an all-reduce of 10^rank gives in every group that this rank can look up."""
    members = [(0, 2), (1, 3), (0, 1, 2, 3), (1, 2), (3,), (0,)]
    # Given in another order, and twice, on every rank: the groups must still be made alike.
    shuffled = members[rank:] + members[:rank] + members[:2]
    groups = Groups(rank, shuffled, timeout_seconds=30)
    found: dict[tuple[int, ...], float | None] = {}
    for ranks in members:
        try:
            group = groups[ranks]
        except KeyError:
            continue
        if group is None:
            found[ranks] = None
            continue
        value = torch.tensor(10.0**rank)
        dist.all_reduce(value, group=group)
        found[ranks] = value.item()
    return found


def test_groups_join_the_ranks_they_name() -> None:
    """A rank finds its own groups; a group of one needs no communication, whoever asks."""
    assert run_distributed(sums, 4) == [
        {(0, 2): 101.0, (0, 1, 2, 3): 1111.0, (3,): None, (0,): None},
        {(1, 3): 1010.0, (0, 1, 2, 3): 1111.0, (1, 2): 110.0, (3,): None, (0,): None},
        {(0, 2): 101.0, (0, 1, 2, 3): 1111.0, (1, 2): 110.0, (3,): None, (0,): None},
        {(1, 3): 1010.0, (0, 1, 2, 3): 1111.0, (3,): None, (0,): None},
    ]

"""Send and receive layouts against loops over tokens, slots and experts."""

from __future__ import annotations

import pytest
import torch

from parallel.expert.layout import receive_layout, send_layout

EXPERTS = 8


def random_index(tokens: int, top_k: int, experts: range = range(EXPERTS), seed: int = 0) -> torch.Tensor:
    """[tokens, top_k] distinct experts per token, in random order."""
    generator = torch.Generator().manual_seed(seed + 31 * tokens + top_k)
    order = torch.rand(tokens, len(experts), generator=generator).argsort(1)[:, :top_k]
    return order + experts.start


CASES = [(random_index(tokens, top_k), ranks) for ranks in (1, 2, 4) for tokens in (0, 1, 19) for top_k in (1, 2, 5)]
# Every token to the experts of one rank: the others receive nothing.
CASES += [(random_index(9, 2, range(4, 6)), ranks) for ranks in (1, 2, 4)]


@pytest.mark.parametrize("index_TK,ranks", CASES)
def test_send_layout(index_TK: torch.Tensor, ranks: int) -> None:
    local = EXPERTS // ranks
    rows, counts = [], []
    for rank in range(ranks):
        wanted = range(rank * local, (rank + 1) * local)
        mine = [token for token, experts in enumerate(index_TK.tolist()) if any(e in wanted for e in experts)]
        rows += mine
        chosen = [e for experts in index_TK.tolist() for e in experts]
        counts.append([len(mine), *(chosen.count(e) for e in wanted)])
    layout = send_layout(index_TK, local, ranks)
    assert layout.rows(len(rows)).tolist() == rows
    assert layout.counts_RC.tolist() == counts


def test_a_token_goes_once_to_a_rank() -> None:
    """Experts 4 to 7 live on rank 1 of 2: a token that wants three of them is one row there, and none on rank 0."""
    layout = send_layout(torch.tensor([[7, 4, 5], [0, 6, 4]]), 4, 2)
    assert layout.rows(3).tolist() == [1, 0, 1]
    assert layout.counts_RC.tolist() == [[1, 1, 0, 0, 0], [2, 2, 1, 1, 1]]


@pytest.mark.parametrize("index_TK,ranks", CASES)
def test_receive_layout(index_TK: torch.Tensor, ranks: int) -> None:
    """By local expert, then by received row; slots that name experts of other ranks give no row."""
    local = EXPERTS // ranks
    for rank in range(ranks):
        rows, slots, counts = [], [], []
        for expert in range(rank * local, (rank + 1) * local):
            found = [(v, k) for v, row in enumerate(index_TK.tolist()) for k, e in enumerate(row) if e == expert]
            rows += [v for v, _ in found]
            slots += [k for _, k in found]
            counts.append(len(found))
        layout = receive_layout(index_TK, rank * local, counts)
        assert (layout.rows_X.tolist(), layout.slots_X.tolist(), layout.counts) == (rows, slots, counts)

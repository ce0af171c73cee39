"""Where the rows of one chunk go, from top-k indices alone: pure, tested against brute force.

Shape letters: T tokens, K experts per token, R ranks, S rows sent, V rows received, X expanded rows (one per received
row and local expert).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SendLayout:
    """rows_S: token of every row sent, rank after rank, tokens ascending. counts_R: rows for each rank."""

    rows_S: torch.Tensor
    counts_R: torch.Tensor


def send_layout(expert_index_TK: torch.Tensor, local_experts: int, ranks: int) -> SendLayout:
    """A token goes at most once to a rank, whatever number of its experts live there."""
    tokens = len(expert_index_TK)
    hit_TR = torch.zeros(tokens, ranks, dtype=torch.bool)
    hit_TR.scatter_(1, expert_index_TK // local_experts, True)
    rank_S, rows_S = hit_TR.T.nonzero(as_tuple=True)
    return SendLayout(rows_S, torch.bincount(rank_S, minlength=ranks))


@dataclass(frozen=True)
class ReceiveLayout:
    """rows_X: received row of every expanded row; slots_X: its top-k slot; counts: expanded rows per local expert."""

    rows_X: torch.Tensor
    slots_X: torch.Tensor
    counts: list[int]


def receive_layout(expert_index_VK: torch.Tensor, first_expert: int, local_experts: int) -> ReceiveLayout:
    """Expanded rows sorted by local expert, then by received row (source rank, then token)."""
    mine_VK = expert_index_VK - first_expert
    rows, slots = ((mine_VK >= 0) & (mine_VK < local_experts)).nonzero(as_tuple=True)
    experts = mine_VK[rows, slots]
    order = experts.sort(stable=True).indices
    counts = torch.bincount(experts, minlength=local_experts).tolist()
    return ReceiveLayout(rows[order], slots[order], counts)

"""Where the rows of one chunk go, from top-k indices alone: pure, tested against brute force.

Every size is known to the host from the counts, so nothing here asks a device for a value: orders come from stable
sorts of a fixed size, of which the first `rows` entries are taken.

Shape letters: T tokens, K experts per token, R ranks, L experts per rank, S rows sent, V rows received, X expanded rows
(one per received row and local expert).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SendLayout:
    """counts_RC: for each rank, rows sent to it, then expanded rows for each of its experts (C = 1 + L).
    rank_hit_RT: whether a token goes to a rank."""

    counts_RC: torch.Tensor
    rank_hit_RT: torch.Tensor

    def rows(self, count: int) -> torch.Tensor:
        """Token of every row sent, rank after rank, tokens ascending; `count` rows in all."""
        tokens = self.rank_hit_RT.shape[1]
        order = (~self.rank_hit_RT).flatten().to(torch.uint8).argsort(stable=True)
        return order[:count] % max(tokens, 1)


def send_layout(expert_index_TK: torch.Tensor, local_experts: int, ranks: int) -> SendLayout:
    """A token goes at most once to a rank, whatever number of its experts live there."""
    tokens = len(expert_index_TK)
    hit_RT = torch.zeros(ranks, tokens, dtype=torch.bool, device=expert_index_TK.device)
    hit_RT.scatter_(0, (expert_index_TK // local_experts).T, True)
    flat = expert_index_TK.flatten()
    expanded_E = torch.zeros(ranks * local_experts, dtype=torch.int64, device=flat.device)
    expanded_E.scatter_add_(0, flat, torch.ones_like(flat))
    counts_RC = torch.cat((hit_RT.sum(1, keepdim=True), expanded_E.view(ranks, local_experts)), 1)
    return SendLayout(counts_RC, hit_RT)


@dataclass(frozen=True)
class ReceiveLayout:
    """rows_X: received row of every expanded row; slots_X: its top-k slot; counts: expanded rows per local expert."""

    rows_X: torch.Tensor
    slots_X: torch.Tensor
    counts: list[int]


def receive_layout(expert_index_VK: torch.Tensor, first_expert: int, counts: list[int]) -> ReceiveLayout:
    """Expanded rows sorted by local expert, then by received row (source rank, then token)."""
    local_experts, top_k = len(counts), expert_index_VK.shape[1]
    local_VK = expert_index_VK - first_expert
    elsewhere = (local_VK < 0) | (local_VK >= local_experts)
    order = local_VK.masked_fill(elsewhere, local_experts).flatten().argsort(stable=True)[: sum(counts)]
    return ReceiveLayout(order // top_k, order % top_k, counts)

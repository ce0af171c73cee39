"""The MoE router: sigmoid scores, group-limited selection with a bias that only selects, balance loss, bias update.

Shape letters: T tokens (any leading dimensions), B sequences, d hidden, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.norm import promoted


@dataclass(frozen=True)
class Routing:
    """Where each token goes. index [..., K] int64; weight [..., K] and score [..., E] in promoted precision."""

    index_TK: torch.Tensor
    weight_TK: torch.Tensor
    score_TE: torch.Tensor


def top_k_lowest_first(value: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [..., k] of the largest values, ties to the lower index (`torch.topk` leaves ties open)."""
    # Not a view, which would keep the order of all values for as long as these are kept.
    return value.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def select_experts(score_TE: torch.Tensor, bias_E: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Expert ids [..., K]: the best `groups_per_token` groups by the sum of their two best biased scores, then the best
    biased scores within them (DeepSeek's Gate; the paper's section 2.1.2 ranks by unbiased ones). The other groups
    are masked with -inf: masked with 0, negative biases would let them in.
    """
    biased_TE = score_TE.detach() + bias_E
    groups = config.num_expert_groups
    if groups > 1:
        biased_TGe = biased_TE.unflatten(-1, (groups, -1))
        rank_TG = biased_TGe.topk(min(2, biased_TGe.shape[-1]), dim=-1).values.sum(-1)
        kept = top_k_lowest_first(rank_TG, config.groups_per_token)
        dropped_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter(-1, kept, False)
        biased_TE = biased_TGe.masked_fill(dropped_TG[..., None], float("-inf")).flatten(-2)
    return top_k_lowest_first(biased_TE, config.experts_per_token)


def expert_weights(score_TE: torch.Tensor, index_TK: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Unbiased scores of the chosen experts, renormalised, times `routed_scaling_factor` (V3 eq. 13 and its code)."""
    chosen_TK = score_TE.gather(-1, index_TK)
    return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


def sequence_balance_loss(
    score_BTE: torch.Tensor, config: ModelConfig, real_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_i f_i P_i of each sequence, [B], without alpha (V3 eq. 17-20).

    f counts the *unbiased* top-K of every token and is a constant; P averages the scores normalised over experts. T
    is the sequence's number of real tokens; a sequence without any gives 0.
    """
    E, K = config.num_routed_experts, config.experts_per_token
    if real_BT is None:
        real_BT = torch.ones(score_BTE.shape[:-1], dtype=torch.bool, device=score_BTE.device)
    real_BT1 = real_BT[..., None].to(score_BTE.dtype)
    tokens_B1 = real_BT1.sum(1).clamp(min=1)
    index_BTK = top_k_lowest_first(score_BTE.detach(), K)
    chosen_BTE = torch.zeros_like(score_BTE, requires_grad=False).scatter(-1, index_BTK, 1.0)
    f_BE = (chosen_BTE * real_BT1).sum(1) * (E / K) / tokens_B1
    normalised_BTE = score_BTE / score_BTE.sum(-1, keepdim=True)
    P_BE = (normalised_BTE * real_BT1).sum(1) / tokens_B1
    return (f_BE * P_BE).sum(-1)


def expert_load(index_TK: torch.Tensor, experts: int, real_T: torch.Tensor | None = None) -> torch.Tensor:
    """Real tokens sent to each expert: [E] int64. Asks the device for no size, as a mask or `bincount` would."""
    counted = torch.ones_like(index_TK) if real_T is None else real_T[..., None].expand_as(index_TK).to(index_TK.dtype)
    load_E = torch.zeros(experts, dtype=torch.int64, device=index_TK.device)
    return load_E.scatter_add_(0, index_TK.flatten(), counted.flatten())


@torch.no_grad()
def update_bias(bias_E: torch.Tensor, load_E: torch.Tensor, gamma: float) -> None:
    """b_i += gamma * sign(mean load - load_i), in place (Loss-Free Balancing, algorithm 1; V3 section 2.1.2).

    `load_E`: integer counts of the whole step. The sign is taken of total - E * load_i, in integers, so that it is
    exact.
    """
    sign_E = torch.sign(load_E.sum() - load_E.numel() * load_E)
    bias_E += gamma * sign_E.to(bias_E.dtype)


class Router(nn.Module):
    """weight [E, d] and the selection bias [E] (a buffer in promoted precision; not trained by gradients)."""

    bias: torch.Tensor

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        experts = config.num_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(experts, dtype=promoted(dtype), device=device))

    def forward(self, x_Td: torch.Tensor) -> Routing:
        """Routing of [..., d] tokens; logits, sigmoid and weights in promoted precision."""
        precision = promoted(x_Td.dtype)
        score_TE = F.linear(x_Td.to(precision), self.weight.to(precision)).sigmoid()
        index_TK = select_experts(score_TE, self.bias, self.config)
        return Routing(index_TK, expert_weights(score_TE, index_TK, self.config), score_TE)

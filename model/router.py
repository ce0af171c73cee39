"""The MoE router: scores, group-limited selection with a bias that only selects, weights, bias update.

Shape letters: T tokens (any leading dimensions), d hidden, E experts, K experts per token, G groups.
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


def affinities(logits_TE: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Scores [..., E] of router logits: sigmoid (V3 eq. 15) or softmax over experts (V2 eq. 22)."""
    return logits_TE.sigmoid() if config.score_function == "sigmoid" else logits_TE.softmax(-1)


def select_experts(score_TE: torch.Tensor, bias_E: torch.Tensor | None, config: ModelConfig) -> torch.Tensor:
    """Expert ids [..., K]: the best `groups_per_token` groups, then the best (biased) scores within them.

    A group ranks by its best score (V2 section 2.2.2) or by the sum of its two best biased ones (DeepSeek's Gate; the
    V3 paper's section 2.1.2 takes unbiased ones). The other groups are masked with -inf: masked with 0, negative
    biases would let them in.
    """
    biased_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E
    groups = config.num_expert_groups
    if groups > 1:
        biased_TGe = biased_TE.unflatten(-1, (groups, -1))
        best = biased_TGe.topk(1 if config.group_rule == "max" else 2, dim=-1).values
        rank_TG = best.sum(-1)
        kept = top_k_lowest_first(rank_TG, config.groups_per_token)
        dropped_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter(-1, kept, False)
        biased_TE = biased_TGe.masked_fill(dropped_TG[..., None], float("-inf")).flatten(-2)
    return top_k_lowest_first(biased_TE, config.experts_per_token)


def expert_weights(score_TE: torch.Tensor, index_TK: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Unbiased scores of the chosen experts, renormalised or not, times `routed_scaling_factor` (V3 eq. 13 and its
    code; V2 eq. 21).
    """
    chosen_TK = score_TE.gather(-1, index_TK)
    if config.renormalise:
        chosen_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20)
    return chosen_TK * config.routed_scaling_factor


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
    """weight [E, d] and, where the model has it, the selection bias [E] (a buffer in promoted precision; not trained by
    gradients).
    """

    bias: torch.Tensor | None

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        experts = config.num_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=dtype, device=device))
        bias = torch.zeros(experts, dtype=promoted(dtype), device=device) if config.router_bias else None
        self.register_buffer("bias", bias)

    def forward(self, x_Td: torch.Tensor) -> Routing:
        """Routing of [..., d] tokens; logits, scores and weights in promoted precision."""
        precision = promoted(x_Td.dtype)
        score_TE = affinities(F.linear(x_Td.to(precision), self.weight.to(precision)), self.config)
        index_TK = select_experts(score_TE, self.bias, self.config)
        return Routing(index_TK, expert_weights(score_TE, index_TK, self.config), score_TE)

"""Balance losses of a MoE layer, per sequence.

Shape letters: B sequences, T positions, E experts, K experts per token, G groups (V2's devices).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig


@dataclass
class BalanceWeights:
    """What each balance loss is multiplied by; 0: it is not computed.

    sequence: alpha of V3 eq. 17. expert, device, communication: alpha_1 to alpha_3 of V2 eq. 23-31; a device is a
    group of experts.
    """

    sequence: float = 0.0
    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0

    @property
    def asked(self) -> bool:
        """Whether any is not 0."""
        return any(vars(self).values())

    def over(self, sequences: int) -> BalanceWeights:
        """Each divided by the sequences of a step."""
        return BalanceWeights(**{name: weight / max(sequences, 1) for name, weight in vars(self).items()})


def balance_losses(
    score_BTE: torch.Tensor,
    index_BTK: torch.Tensor,
    config: ModelConfig,
    real_BT: torch.Tensor | None = None,
    kinds: tuple[str, ...] = ("sequence", "expert", "device", "communication"),
) -> dict[str, torch.Tensor]:
    """kind -> loss of each sequence [B], without its weight.

    With P_i the mean over real tokens of the scores normalised over experts (softmax scores are), T real tokens, and
    G groups of experts of which a token reaches M:

    sequence       sum_i f_i P_i, f_i = E / (K T) * tokens whose K best *unbiased* scores hold i (V3 eq. 17-20)
    expert         the same with f_i counting the experts that were selected (V2 eq. 23-25)
    device         sum_g mean(f_i of g) * sum(P_i of g), f as in `expert` (V2 eq. 26-28)
    communication  sum_g G / (M T) * tokens with an expert in g * sum(P_i of g) (V2 eq. 29-31)

    The counts are constants. A sequence without real tokens gives 0.
    """
    if real_BT is None:
        real_BT = torch.ones(score_BTE.shape[:-1], dtype=torch.bool, device=score_BTE.device)
    E, K, G = config.num_routed_experts, config.experts_per_token, config.num_expert_groups
    real_BT1 = real_BT[..., None].to(score_BTE.dtype)
    tokens_B1 = real_BT1.sum(1).clamp(min=1)
    normalised_BTE = score_BTE / score_BTE.sum(-1, keepdim=True)
    P_BE = (normalised_BTE * real_BT1).sum(1) / tokens_B1

    def chosen(index: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(score_BTE, requires_grad=False).scatter(-1, index, 1.0)

    def frequency(chosen_BTE: torch.Tensor) -> torch.Tensor:
        return (chosen_BTE * real_BT1).sum(1) * (E / K) / tokens_B1

    found: dict[str, torch.Tensor] = {}
    if "sequence" in kinds:
        best_BTK = score_BTE.detach().sort(dim=-1, descending=True, stable=True).indices[..., :K]
        found["sequence"] = (frequency(chosen(best_BTK)) * P_BE).sum(-1)
    if not {"expert", "device", "communication"}.isdisjoint(kinds):
        selected_BTE = chosen(index_BTK)
        f_BE = frequency(selected_BTE)
        group_P_BG = P_BE.unflatten(-1, (G, -1)).sum(-1)
        if "expert" in kinds:
            found["expert"] = (f_BE * P_BE).sum(-1)
        if "device" in kinds:
            found["device"] = (f_BE.unflatten(-1, (G, -1)).mean(-1) * group_P_BG).sum(-1)
        if "communication" in kinds:
            sent_BTG = selected_BTE.unflatten(-1, (G, -1)).amax(-1)
            sent_BG = (sent_BTG * real_BT1).sum(1) * (G / config.groups_per_token) / tokens_B1
            found["communication"] = (sent_BG * group_P_BG).sum(-1)
    return found


def weighted_balance(
    score_BTE: torch.Tensor,
    index_BTK: torch.Tensor,
    config: ModelConfig,
    real_BT: torch.Tensor | None,
    weights: BalanceWeights,
) -> torch.Tensor:
    """Sum over kinds and sequences of the losses times their weights: a scalar."""
    kinds = {name: weight for name, weight in vars(weights).items() if weight}
    total = score_BTE.new_zeros(())
    for name, loss_B in balance_losses(score_BTE, index_BTK, config, real_BT, tuple(kinds)).items():
        total = total + loss_B.sum() * kinds[name]
    return total

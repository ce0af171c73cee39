"""Balance losses against their equations in plain Python."""

from __future__ import annotations

import pytest
import torch

from model.balance import BalanceWeights, balance_losses, weighted_balance
from model.config import ModelConfig
from model.router import select_experts

B, T, E, K, G, M = 3, 7, 12, 3, 4, 2
SIZE = E // G
REAL_BT = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [False] * 7])


def family(score: str) -> ModelConfig:
    return ModelConfig(
        hidden_size=8,
        num_routed_experts=E,
        num_expert_groups=G,
        groups_per_token=M,
        experts_per_token=K,
        score_function=score,
        group_rule="max" if score == "softmax" else "top2_sum",
    )


def drawn(score: str) -> tuple[ModelConfig, torch.Tensor, torch.Tensor]:
    """Config, scores that want a gradient, and the experts selected with biases and groups."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, E, dtype=torch.float64, generator=generator)
    score_BTE = (logits.softmax(-1) if score == "softmax" else logits.sigmoid()).requires_grad_()
    bias_E = 0.3 * torch.randn(E, dtype=torch.float64, generator=generator)
    return family(score), score_BTE, select_experts(score_BTE, bias_E, family(score))


def coefficients(scores: list[list[float]], chosen: list[list[int]]) -> dict[str, list[float]]:
    """What P_i is multiplied by over real tokens: f_i, f_i, f'_d, f''_d (V3 eq. 18; V2 eq. 24, 27, 30)."""
    tokens = len(scores)
    best = [sorted(range(E), key=lambda i, s=s: (-s[i], i))[:K] for s in scores]
    devices = [range(g * SIZE, (g + 1) * SIZE) for g in range(G)]

    def f(picked: list[list[int]], i: int) -> float:
        return E / (K * tokens) * sum(i in ids for ids in picked)

    def sent(device: range) -> float:
        return G / (M * tokens) * sum(any(i in device for i in ids) for ids in chosen)

    return {
        "sequence": [f(best, i) for i in range(E)],
        "expert": [f(chosen, i) for i in range(E)],
        "device": [sum(f(chosen, j) for j in devices[i // SIZE]) / SIZE for i in range(E)],
        "communication": [sent(devices[i // SIZE]) for i in range(E)],
    }


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_every_loss_is_its_equations_over_real_tokens(score: str) -> None:
    config, score_BTE, index_BTK = drawn(score)
    found = balance_losses(score_BTE, index_BTK, config, REAL_BT)
    for kind, loss_B in found.items():
        (grad_BTE,) = torch.autograd.grad(loss_B.sum(), score_BTE, retain_graph=True)
        assert loss_B[2] == 0 and grad_BTE[~REAL_BT].abs().max() == 0
        for b in range(2):
            real_TE = score_BTE[b, REAL_BT[b]].detach().requires_grad_()
            factor = coefficients(real_TE.tolist(), index_BTK[b, REAL_BT[b]].tolist())[kind]
            P_E = (real_TE / real_TE.sum(-1, keepdim=True)).mean(0)
            expected = sum(c * P for c, P in zip(factor, P_E, strict=True))
            expected.backward()
            torch.testing.assert_close(loss_B[b], expected, rtol=1e-13, atol=0, msg=kind)
            torch.testing.assert_close(grad_BTE[b, REAL_BT[b]], real_TE.grad, rtol=1e-12, atol=1e-15, msg=kind)
    # The bias and the groups moved the selection: otherwise two of the kinds could not be told apart.
    assert (found["sequence"] - found["expert"]).abs().max() > 1e-3


def test_balanced_scores_have_loss_one() -> None:
    config = ModelConfig(num_routed_experts=4, num_expert_groups=1, groups_per_token=1, experts_per_token=1)
    score_BTE = (torch.eye(4, dtype=torch.float64) * 0.5 + 0.25)[None]
    for kind, loss_B in balance_losses(score_BTE, torch.arange(4)[None, :, None], config).items():
        torch.testing.assert_close(loss_B, torch.ones(1, dtype=torch.float64), msg=kind)


def test_only_weighted_kinds_enter() -> None:
    config, score_BTE, index_BTK = drawn("sigmoid")
    every = balance_losses(score_BTE, index_BTK, config, REAL_BT)
    weights = BalanceWeights(sequence=0.5, communication=2.0).over(4)
    expected = 0.5 / 4 * every["sequence"].sum() + 2.0 / 4 * every["communication"].sum()
    torch.testing.assert_close(weighted_balance(score_BTE, index_BTK, config, REAL_BT, weights), expected)
    nothing = weighted_balance(score_BTE, index_BTK, config, REAL_BT, BalanceWeights())
    assert nothing.item() == 0

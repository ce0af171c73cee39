"""DeepSeekMoE, which transformers has no class for, against its equations in plain loops over tokens, heads and
experts; gradients by autograd of the same loops. None of the model's code is used.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings

from model.config import ModelConfig
from model.names import canonical_tensors
from model.rope import Rotary
from tests.model.compared import BOUND, gradients, worst_gradient
from tests.model.drawn_configs import Drawn, checked, deepseek_moe_model, drawn
from tests.model.models import model_config, random_model, random_tokens

Weights = dict[str, torch.Tensor]


def norm(x_d: torch.Tensor, gain_d: torch.Tensor, eps: float) -> torch.Tensor:
    return x_d / torch.sqrt(x_d @ x_d / len(x_d) + eps) * gain_d


def rotated(x_h: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Dimension i turns with dimension i + half."""
    half = len(x_h) // 2
    first, second = [], []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_h))
        a, b = x_h[i], x_h[i + half]
        first.append(a * math.cos(angle) - b * math.sin(angle))
        second.append(b * math.cos(angle) + a * math.sin(angle))
    return torch.stack(first + second)


def shares(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """softmax."""
    powers = [torch.exp(v - max(v.item() for v in values)) for v in values]
    return [power / sum(powers) for power in powers]


def attention(x_Td: list[torch.Tensor], w: Weights, at: str, c: ModelConfig) -> list[torch.Tensor]:
    h, per_group = c.head_dim, c.num_heads // c.num_key_value_heads
    outputs: list[list[torch.Tensor]] = [[] for _ in x_Td]
    for head in range(c.num_heads):
        mine, shared = slice(head * h, (head + 1) * h), slice(head // per_group * h, (head // per_group + 1) * h)
        query = [rotated(w[f"{at}.q"][mine] @ x, t, c.rope_theta) for t, x in enumerate(x_Td)]
        key = [rotated(w[f"{at}.k"][shared] @ x, t, c.rope_theta) for t, x in enumerate(x_Td)]
        value = [w[f"{at}.v"][shared] @ x for x in x_Td]
        for t, q in enumerate(query):
            weight = shares([q @ key[s] / math.sqrt(h) for s in range(t + 1)])
            outputs[t].append(sum(weight[s] * value[s] for s in range(t + 1)))  # type: ignore[arg-type]
    return [w[f"{at}.o"] @ torch.cat(pieces) for pieces in outputs]


def mlp(x_d: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    f = len(gate_up) // 2
    gate, up = gate_up[:f] @ x_d, gate_up[f:] @ x_d
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def experts(x_d: torch.Tensor, w: Weights, at: str, c: ModelConfig) -> torch.Tensor:
    logits = [w[f"{at}.router.weight"][e] @ x_d for e in range(c.num_routed_experts)]
    score = shares(logits) if c.score_function == "softmax" else [1 / (1 + torch.exp(-v)) for v in logits]
    bias = w[f"{at}.router.bias"].tolist() if c.router_bias else [0.0] * len(score)
    best = sorted(range(len(score)), key=lambda e: -(score[e].item() + bias[e]))[: c.experts_per_token]
    total = sum(score[e] for e in best) if c.renormalise else 1.0
    output = mlp(x_d, w[f"{at}.shared.gate_up"], w[f"{at}.shared.down"])
    for e in best:
        own = mlp(x_d, w[f"{at}.experts.{e}.gate_up"], w[f"{at}.experts.{e}.down"])
        output = output + score[e] / total * own
    return output


def brute_force(tokens: list[int], w: Weights, c: ModelConfig) -> torch.Tensor:
    """Logits [T, V] of one sequence."""
    eps = c.rms_norm_eps
    x = [w["embed"][token] for token in tokens]
    for i in range(c.num_layers):
        at = f"layers.{i}"
        attended = attention([norm(v, w[f"{at}.attn_norm"], eps) for v in x], w, f"{at}.attention", c)
        x = [v + a for v, a in zip(x, attended, strict=True)]
        normed = [norm(v, w[f"{at}.mlp_norm"], eps) for v in x]
        if i < c.first_dense_layers:
            x = [v + mlp(n, w[f"{at}.mlp.gate_up"], w[f"{at}.mlp.down"]) for v, n in zip(x, normed, strict=True)]
        else:
            x = [v + experts(n, w, at, c) for v, n in zip(x, normed, strict=True)]
    return torch.stack([w["embed" if c.tie_embeddings else "head"] @ norm(v, w["norm"], eps) for v in x])


def compare(config: ModelConfig, sequences: int = 2, length: int = 9) -> tuple[float, int, int]:
    """Worst gradient, tensors whose gradient is 0, all tensors."""
    model = random_model(config, torch.float64)
    tokens_BT = random_tokens(config, sequences, length)
    mine = model(tokens_BT, rotary=Rotary(config, length)).logits_BTV
    w = {name: tensor.clone().requires_grad_() for name, tensor in canonical_tensors(model).items()}
    theirs = torch.stack([brute_force(tokens, w, config) for tokens in tokens_BT.tolist()])
    assert (mine - theirs).abs().max() < BOUND and mine.std() > 0.1
    probe = torch.randn(mine.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (mine * probe).sum().backward()
    (theirs * probe).sum().backward()
    named = gradients(model)
    expected = {name: torch.zeros_like(w[name]) if w[name].grad is None else w[name].grad for name in named}
    worst, zeros = worst_gradient(named, expected)  # type: ignore[arg-type]
    return worst, zeros, len(named)


def test_random_models() -> None:
    found: list[tuple[float, int, int]] = []
    seen: list[ModelConfig] = []

    @settings(max_examples=12, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(drawn(deepseek_moe_model))
    def each(model_and_length: Drawn) -> None:
        seen.append(model_and_length[0])
        found.append(compare(model_and_length[0]))

    each()
    zeros, tensors = sum(values[1] for values in found), sum(values[2] for values in found)
    print(
        f"deepseek: {len(found)} models, gradients within {max(values[0] for values in found):.1e}, "
        f"{zeros} of {tensors} gradients are 0 ({zeros / tensors:.1%})"
    )
    assert len(found) >= 12 and zeros < 0.1 * tensors
    assert {config.score_function for config in seen} == {"softmax", "sigmoid"}
    assert len({config.num_heads == config.num_key_value_heads for config in seen}) == 2
    assert any(1 < config.num_key_value_heads < config.num_heads for config in seen)
    assert len({config.first_dense_layers > 0 for config in seen}) == 2


@pytest.mark.parametrize("name", ["moe_16b", "proxy_1b"])
def test_the_released_shapes_made_small(name: str) -> None:
    """What is not a size stays as it is in conf/model."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_layers": 3,
        "num_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
    }
    sizes |= {"intermediate_size": 20, "moe_intermediate_size": 5, "num_routed_experts": 8, "experts_per_token": 3}
    compare(checked(name, vars(model_config(name, **sizes)) | {"init_std": 0.2}))

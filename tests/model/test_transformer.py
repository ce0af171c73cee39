"""The loss term by term, padding, precision, and causality of the plain model."""

from __future__ import annotations

import math

import pytest
import torch

from model.balance import BalanceWeights
from model.layer import TransformerLayer
from model.names import canonical_tensors
from model.rope import Rotary
from model.router import update_bias
from model.transformer import IGNORE, Transformer, loss
from tests.model.models import model_config, random_model, random_tokens

CONFIG = model_config("tiny", mtp_depth=2)
WEIGHTS = {"mtp_weight": 0.3, "balance_weights": BalanceWeights(sequence=0.01)}


def batch(sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, labels, MTP tokens and labels as data.contract defines them for one document per sequence."""
    text_BT = random_tokens(CONFIG, sequences, length + 1)

    def ahead(k: int, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(text_BT[:, k : k + length], (0, max(0, k - 1)), value=fill)[:, :length]

    mtp_tokens = torch.stack([ahead(k + 1, 0) for k in range(2)])
    mtp_labels = torch.stack([ahead(k + 2, IGNORE) for k in range(2)])
    return text_BT[:, :-1], text_BT[:, 1:], mtp_tokens, mtp_labels


def test_loss_term_by_term() -> None:
    model, rotary = random_model(CONFIG, torch.float64), Rotary(CONFIG, 16)
    tokens, labels, mtp_tokens, mtp_labels = batch(2, 16)
    labels = labels.clone()
    labels[0, 3] = IGNORE
    output = model(tokens, mtp_tokens, rotary=rotary)
    losses = loss(
        output, labels, mtp_labels, main_count=100, mtp_counts=(90, 80), sequences=6, **WEIGHTS
    )  # counts of a larger step, of which this is one share

    def nll(logits: torch.Tensor, wanted: torch.Tensor) -> float:
        table = logits.detach().log_softmax(-1).tolist()
        pairs = [(b, t, w) for b, row in enumerate(wanted.tolist()) for t, w in enumerate(row) if w != IGNORE]
        return math.fsum(-table[b][t][w] for b, t, w in pairs)

    main = nll(output.logits_BTV, labels) / 100
    depths = [nll(output.mtp_logits[0], mtp_labels[0]) / 90, nll(output.mtp_logits[1], mtp_labels[1]) / 80]
    assert sorted(output.moe) == ["layers.1", "layers.2", "layers.3", "layers.4", "mtp.0.layer", "mtp.1.layer"]
    balance = sum(statistics.balance["sequence"].sum().item() for statistics in output.moe.values()) / 6
    assert losses.main.item() == pytest.approx(main, rel=1e-12)
    assert [value.item() for value in losses.mtp] == pytest.approx(depths, rel=1e-12)
    assert losses.balance.item() == pytest.approx(0.01 * balance, rel=1e-12)
    assert losses.total.item() == pytest.approx(main + 0.3 / 2 * sum(depths) + 0.01 * balance, rel=1e-12)


def test_micro_batches_add_up_to_the_step() -> None:
    model, rotary = random_model(CONFIG, torch.float64), Rotary(CONFIG, 16)
    tokens, labels, mtp_tokens, mtp_labels = batch(4, 16)
    counts = {"main_count": 64, "mtp_counts": (60, 56), "sequences": 4}

    def gradients(rows: list[slice]) -> list[torch.Tensor]:
        model.zero_grad()
        for row in rows:
            output = model(tokens[row], mtp_tokens[:, row], rotary=rotary)
            loss(output, labels[row], mtp_labels[:, row], **counts, **WEIGHTS).total.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for whole, pieces in zip(gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])):
        assert (whole - pieces).abs().max() <= 1e-12 * whole.abs().max()
        assert whole.abs().max() > 0


def test_padding_counts_in_no_statistic_and_changes_no_real_position() -> None:
    model, rotary = random_model(CONFIG, torch.float64), Rotary(CONFIG, 16)
    tokens, _, mtp_tokens, _ = batch(2, 16)
    real = torch.ones(2, 16, dtype=torch.bool)
    real[1, 10:] = False
    padded = tokens.masked_fill(~real, 0)
    first = model(tokens, mtp_tokens, rotary=rotary, real_BT=real)
    second = model(padded, mtp_tokens, rotary=rotary, real_BT=real)
    assert (first.logits_BTV[1, :10] - second.logits_BTV[1, :10]).abs().max() < 1e-12
    for name, statistics in first.moe.items():
        assert statistics.load_E.sum() == 26 * CONFIG.experts_per_token
        if name.startswith("layers"):
            assert torch.equal(statistics.load_E, second.moe[name].load_E)
            torch.testing.assert_close(statistics.balance, second.moe[name].balance, rtol=1e-12, atol=0)


def test_no_position_sees_the_future() -> None:
    model, rotary = random_model(CONFIG, torch.float64), Rotary(CONFIG, 16)
    tokens, _, mtp_tokens, _ = batch(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    before, after = (model(t, mtp_tokens, rotary=rotary) for t in (tokens, changed))
    for one, other in zip([before.logits_BTV, *before.mtp_logits], [after.logits_BTV, *after.mtp_logits]):
        assert (one[0, :9] - other[0, :9]).abs().max() < 1e-13
        assert (one[0, 9:] - other[0, 9:]).abs().amax(-1).min() > 1e-6


def test_bfloat16_and_float32_stay_near_float64() -> None:
    tokens, _, mtp_tokens, _ = batch(2, 16)
    reference = random_model(CONFIG, torch.float64)
    expected = reference(tokens, mtp_tokens, rotary=Rotary(CONFIG, 16))
    model = Transformer(CONFIG, dtype=torch.float32)
    model.load_state_dict(reference.state_dict())
    output = model(tokens, mtp_tokens, rotary=Rotary(CONFIG, 16))
    assert output.logits_BTV.dtype == torch.float32
    assert (output.logits_BTV - expected.logits_BTV).abs().max() < 1e-4
    half = Transformer(CONFIG, dtype=torch.bfloat16)
    half.load_state_dict(reference.state_dict())
    output = half(tokens, mtp_tokens, rotary=Rotary(CONFIG, 16))
    assert output.logits_BTV.dtype == torch.bfloat16 and half.layers[1].router.bias.dtype == torch.float32
    relative = (output.logits_BTV.double() - expected.logits_BTV).norm() / expected.logits_BTV.norm()
    assert relative < 0.2


def test_bias_update_reaches_the_mtp_layer() -> None:
    model, rotary = random_model(CONFIG, torch.float64), Rotary(CONFIG, 16)
    tokens, _, mtp_tokens, _ = batch(2, 16)
    output = model(tokens, mtp_tokens, rotary=rotary)
    biases = canonical_tensors(model)
    for name, statistics in output.moe.items():
        before = biases[f"{name}.router.bias"].clone()
        update_bias(biases[f"{name}.router.bias"], statistics.load_E, 0.001)
        moved = model.get_submodule(name).router.bias - before
        assert moved.abs().max() == pytest.approx(0.001)


def test_a_slice_of_experts_has_no_plain_forward() -> None:
    layer = TransformerLayer(CONFIG, moe=True, experts=(0, 4))
    assert layer.experts.gate_up.shape == (4, 32, 32)
    x_BTd = torch.zeros(1, 2, 32)
    with pytest.raises(RuntimeError, match=r"all 8 experts, this rank holds 0\.\.4"):
        layer.experts(x_BTd[0], torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="slice"):
        TransformerLayer(CONFIG, moe=True, experts=(4, 9))

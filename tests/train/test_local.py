"""The local step against the plain model and autograd, in float64."""

from __future__ import annotations

import pytest
import torch

from model.balance import BalanceWeights
from model.names import canonical_tensors, load_canonical
from model.rope import Rotary
from model.transformer import IGNORE, loss
from tests.model.models import model_config, random_model, random_tokens
from train.local import LocalStep


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_model(tied: bool, recompute: bool) -> None:
    config = model_config("tiny", mtp_depth=0, tie_embeddings=tied)
    plain = random_model(config, torch.float64)
    local = LocalStep(config, torch.float64, recompute)
    load_canonical(local.model, canonical_tensors(plain).__getitem__)
    tokens_BT, labels_BT = random_tokens(config, 3, 9), random_tokens(config, 3, 9, seed=2)
    labels_BT[1, 4:] = IGNORE
    expected = loss(
        plain(tokens_BT, rotary=Rotary(config, 9)),
        labels_BT,
        main_count=22,
        sequences=3,
        mtp_weight=0.0,
        balance_weights=BalanceWeights(),
    ).total
    expected.backward()
    for times in (1, 2):
        assert local.gradients(tokens_BT, labels_BT) == pytest.approx(expected.item(), rel=1e-13)
        assert len(list(local.model.parameters())) == len(list(plain.parameters()))
        for name, parameter in local.model.named_parameters():
            gradient = times * plain.get_parameter(name).grad
            assert (parameter.grad - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


def test_only_the_main_loss() -> None:
    with pytest.raises(ValueError, match="mtp_depth 1"):
        LocalStep(model_config("tiny", mtp_depth=1), torch.float32)

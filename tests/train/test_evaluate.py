"""Held-out cost against a loop that predicts one token at a time, with a tiny model in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import train.evaluate
from model.rope import Rotary
from model.transformer import IGNORE, Transformer
from tests.model.models import model_config, random_model
from train.evaluate import total_bits, windows

CONFIG = model_config("tiny")
TOKENS = 23


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG, torch.float64)


def text() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and which of them count; the first one too is content, and is never predicted."""
    draw = np.random.default_rng(3)
    content = draw.random(TOKENS) > 0.25
    content[0] = content[-1] = True
    return draw.integers(0, CONFIG.vocab_size, TOKENS), content


@pytest.mark.parametrize("context", [1, 2, 5, 11, 21, 22, 23, 50])
def test_every_content_token_is_predicted_once(context: int) -> None:
    tokens, content = np.arange(TOKENS) + 100, text()[1]
    inputs_WT, labels_WT = windows(tokens, content, context)
    assert inputs_WT.shape == labels_WT.shape == (math.ceil((TOKENS - 1) / context), context)
    predicted = []
    for inputs, labels in zip(inputs_WT.tolist(), labels_WT.tolist(), strict=True):
        for i, label in enumerate(labels):
            if label != IGNORE:
                # What the model sees up to here are the tokens straight before the label.
                assert inputs[: i + 1] == list(range(label - i - 1, label))
                predicted.append(label - 100)
    assert predicted == [i for i in range(1, TOKENS) if content[i]]


def one_at_a_time(model: Transformer, tokens: np.ndarray, content: np.ndarray, context: int) -> float:
    total, rotary = 0.0, Rotary(CONFIG, 64)
    for i in range(1, TOKENS):
        if content[i]:
            start = (i - 1) // context * context
            logits = model(torch.from_numpy(tokens[None, start:i]), rotary=rotary).logits_BTV[0, -1]
            total -= logits.log_softmax(-1)[tokens[i]].item() / math.log(2)
    return total


@pytest.mark.parametrize("context", [1, 4, 22, 40])
@pytest.mark.parametrize("at_once", [8, 4096])
@torch.no_grad()
def test_bits_equal_a_loop(model: Transformer, context: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """at_once 8: several batches of windows, the last one smaller."""
    monkeypatch.setattr(train.evaluate, "TOKENS_AT_ONCE", at_once)
    tokens, content = text()
    found = total_bits(model, Rotary(CONFIG, 64), tokens, content, context)
    assert found == pytest.approx(one_at_a_time(model, tokens, content, context), rel=1e-12)


def test_no_token_sees_beyond_its_window(model: Transformer) -> None:
    """Windows of 4 tokens: token 8 is an input of the third window only, whose labels are 9 to 12."""
    tokens, _ = text()
    changed, rotary = tokens.copy(), Rotary(CONFIG, 64)
    changed[8] = (changed[8] + 1) % CONFIG.vocab_size

    def cost(text_N: np.ndarray, label: int) -> float:
        only = np.arange(TOKENS) == label
        return total_bits(model, rotary, text_N, only, 4)

    moved = [label for label in range(1, TOKENS) if abs(cost(tokens, label) - cost(changed, label)) > 1e-9]
    assert moved == [8, 9, 10, 11, 12]  # 8: its own label


def test_content_only(model: Transformer) -> None:
    tokens, content = text()
    assert total_bits(model, Rotary(CONFIG, 64), tokens, np.zeros_like(content), 5) == 0.0

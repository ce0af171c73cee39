"""Generation with the latent cache is generation without it."""

from __future__ import annotations

import pytest
import torch

from model.cache import LatentCache
from model.errors import ModelError
from model.generate import generate, sample
from model.rope import Rotary
from tests.model.models import model_config, random_model, random_tokens


@pytest.mark.parametrize("length", [128, 256], ids=["plain", "yarn"])
def test_cached_logits_are_the_full_forwards(length: int) -> None:
    config = model_config("tiny")
    model, rotary = random_model(config, torch.float64), Rotary(config, length)
    tokens_BT = random_tokens(config, 2, 20)
    full = model(tokens_BT, rotary=rotary).logits_BTV
    caches, done, pieces = [LatentCache() for _ in model.layers], 0, []
    for size in (7, 1, 1, 8, 3):
        piece_BT = tokens_BT[:, done : done + size]
        pieces.append(model(piece_BT, rotary=rotary, caches=caches, first_position=done).logits_BTV)
        done += size
    assert (torch.cat(pieces, 1) - full).abs().max() < 1e-12
    assert caches[0].first is not None and caches[0].first.shape == (2, 20, config.kv_lora_rank)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_with_and_without_cache(temperature: float) -> None:
    config = model_config("tiny")
    model, rotary = random_model(config, torch.float64), Rotary(config, 64)
    texts = [
        list(
            generate(
                model,
                [1, 2, 3],
                rotary=rotary,
                max_new_tokens=20,
                temperature=temperature,
                use_cache=cached,
                generator=torch.Generator().manual_seed(0),
            )
        )
        for cached in (True, False)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 20 and len(set(texts[0])) > 3


def test_ends() -> None:
    config = model_config("tiny")
    model = random_model(config, torch.float64)
    text = list(generate(model, [1, 2, 3], rotary=Rotary(config, 10), max_new_tokens=50))
    assert len(text) == 8
    stop = text[2]
    stopped = list(generate(model, [1, 2, 3], rotary=Rotary(config, 64), max_new_tokens=50, stop_ids=[stop]))
    assert stopped == text[: text.index(stop) + 1]
    few = list(generate(model, [1, 2, 3], rotary=Rotary(config, 64), max_new_tokens=30, temperature=5.0, vocabulary=8))
    assert max(few) < 8


def test_sampling() -> None:
    logits_V = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert sample(logits_V, 0.0) == 1
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits_V, 0.5, generator) for _ in range(2000)]
    expected = (logits_V / 0.5).softmax(-1)
    for token in range(4):
        assert abs(drawn.count(token) / 2000 - expected[token].item()) < 0.04


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "0 tokens"), ([1] * 65, "65 tokens"), ([1, 256], "token id 256"), ([-1], "id -1")]
)
def test_bad_prompts(prompt: list[int], message: str) -> None:
    config = model_config("tiny")
    model = random_model(config, torch.float32)
    with pytest.raises(ModelError, match=message):
        next(generate(model, prompt, rotary=Rotary(config, 64), max_new_tokens=1))

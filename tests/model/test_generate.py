"""Generation with a cache, read in either form, is generation without it."""

from __future__ import annotations

import pytest
import torch

import model.attention
from model.cache import Cache, KeyValueCache, LatentCache, new_cache
from model.config import ModelConfig
from model.count import cache_bytes_per_token
from model.errors import DivergedError, ModelError
from model.generate import generate, sample
from model.rope import Rotary
from tests.model.models import model_config, random_model, random_tokens

PIECES = (7, 1, 1, 8, 3)
GQA = {"attention": "gqa", "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def in_pieces(
    config: ModelConfig, dtype: torch.dtype, length: int, caches: list[Cache], sizes: tuple[int, ...]
) -> float:
    """Largest difference of logits in pieces to those of one forward without a cache."""
    transformer, rotary = random_model(config, dtype), Rotary(config, length)
    tokens_BT = random_tokens(config, 2, sum(sizes))
    full = transformer(tokens_BT, rotary=rotary).logits_BTV
    done, pieces = 0, []
    for size in sizes:
        piece_BT = tokens_BT[:, done : done + size]
        pieces.append(transformer(piece_BT, rotary=rotary, caches=caches, first_position=done).logits_BTV)
        done += size
    return float((torch.cat(pieces, 1) - full).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(20,), (1,) * 20, PIECES], ids=["prefill", "decoding", "mixed"])
@pytest.mark.parametrize("q_lora_rank", [16, 0], ids=["compressed_query", "plain_query"])
@pytest.mark.parametrize("length", [128, 256], ids=["plain", "yarn"])
@pytest.mark.parametrize("absorbed", [True, False, None], ids=["absorbed", "naive", "cheaper"])
def test_cached_logits_are_the_full_forwards(
    absorbed: bool | None, length: int, q_lora_rank: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.attention, "QUERY_BLOCK", 3)
    config = model_config("tiny", q_lora_rank=q_lora_rank, num_layers=2)
    caches = [new_cache(config, absorbed=absorbed) for _ in range(config.num_layers)]
    assert in_pieces(config, torch.float64, length, caches, sizes) < 1e-12
    assert caches[0].first is not None and caches[0].first.shape == (2, 20, config.kv_lora_rank)
    assert sum(cache.nbytes for cache in caches) == 2 * 20 * cache_bytes_per_token(config, 8)


def test_the_cheaper_form() -> None:
    # V3: projecting a key up costs 512 * 256 multiplications per head, a pair 1088 absorbed and 320 naive.
    attention = model.attention.Attention(model_config("v3"), device="meta")
    for T, S, absorbed in ((1, 1, False), (1, 2, True), (2, 4096, True), (160, 4096, True), (180, 4096, False)):
        assert attention.reads_latents(LatentCache(absorbed=None), T, S) == absorbed
        assert (T * 512 * 256 / S + T * 1088 < 512 * 256 + T * 320) == absorbed
        assert attention.reads_latents(LatentCache(absorbed=True), T, S)
        assert not attention.reads_latents(LatentCache(absorbed=False), T, S)


@torch.no_grad()
def test_forms_agree_in_lower_precision() -> None:
    # Attention alone: in a whole model a router's near tie may go either way.
    config = model_config("tiny")
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
        attention, rotary = random_model(config, dtype).layers[0].attention, Rotary(config, 256)
        x_BTd = torch.randn(2, 20, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
        tables = rotary.tables(torch.arange(20), dtype)
        absorbed, naive = (
            attention(x_BTd, *tables, rotary.softmax_scale, LatentCache(absorbed=form)) for form in (True, False)
        )
        assert absorbed.dtype == dtype and not torch.equal(absorbed, naive)
        assert (absorbed - naive).abs().max() < tolerance * naive.abs().max()


@torch.no_grad()
def test_grouped_query_pieces() -> None:
    config = model_config("tiny", num_layers=3, **GQA)
    caches = [new_cache(config) for _ in range(3)]
    assert in_pieces(config, torch.float64, 128, caches, PIECES) < 1e-12
    assert caches[0].first is not None and caches[0].first.shape == (2, 2, 20, 8)


@pytest.mark.parametrize("capacity", [0, 5, 64])
@pytest.mark.parametrize("kind", [LatentCache, KeyValueCache])
def test_cache_is_concatenation_and_truncation(kind: type[Cache], capacity: int) -> None:
    cache, generator = kind(capacity), torch.Generator().manual_seed(0)
    assert cache.first is None and cache.second is None and cache.nbytes == 0
    shapes = [[2, 3, 0, 4], [2, 3, 0, 5]] if kind is KeyValueCache else [[2, 0, 4], [2, 0, 5]]
    expected = [torch.empty(shape) for shape in shapes]
    rooms = set()
    for step in range(30):
        new = []
        for shape in shapes:
            shape[kind.positions] = 1 + step % 3
            new.append(torch.randn(shape, generator=generator))
        expected = [torch.cat(pair, kind.positions) for pair in zip(expected, new)]
        assert all(torch.equal(a, b) for a, b in zip(cache.append(*new), expected))
        if step % 4 == 3:
            keep = cache.length - 2
            cache.truncate(keep)
            expected = [x.narrow(kind.positions, 0, keep) for x in expected]
        assert cache.first is not None and cache.second is not None
        assert torch.equal(cache.first, expected[0]) and torch.equal(cache.second, expected[1])
        assert cache.nbytes == sum(x.nbytes for x in expected)
        rooms.add(cache.first.data_ptr())
    assert len(rooms) <= (1 if capacity == 64 else 7)
    with pytest.raises(ValueError, match="truncate to"):
        cache.truncate(cache.length + 1)
    with pytest.raises(ValueError, match="to append"):
        cache.append(*(x[:1] for x in expected))


@pytest.mark.parametrize("changes", [{}, GQA], ids=["mla", "gqa"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_with_and_without_cache(temperature: float, changes: dict[str, object]) -> None:
    config = model_config("tiny", num_layers=3, **changes)
    transformer, rotary = random_model(config, torch.float64), Rotary(config, 64)
    forms = [{"use_cache": False}, {}] + ([] if changes else [{"form": "absorbed"}, {"form": "naive"}])
    texts = [
        list(
            generate(
                transformer,
                [1, 2, 3],
                rotary=rotary,
                max_new_tokens=20,
                temperature=temperature,
                generator=torch.Generator().manual_seed(0),
                **form,
            )
        )
        for form in forms
    ]
    assert all(text == texts[0] for text in texts) and len(texts[0]) == 20 and len(set(texts[0])) > 3


def test_ends() -> None:
    config = model_config("tiny")
    transformer = random_model(config, torch.float64)
    text = list(generate(transformer, [1, 2, 3], rotary=Rotary(config, 10), max_new_tokens=50))
    assert len(text) == 8
    stop = text[2]
    stopped = list(generate(transformer, [1, 2, 3], rotary=Rotary(config, 64), max_new_tokens=50, stop_ids=[stop]))
    assert stopped == text[: text.index(stop) + 1]
    rotary = Rotary(config, 64)
    few = list(generate(transformer, [1, 2, 3], rotary=rotary, max_new_tokens=30, temperature=5.0, vocabulary=8))
    assert max(few) < 8


def test_diverged_weights_are_one_line() -> None:
    config = model_config("tiny")
    model = random_model(config, torch.float32)
    with torch.no_grad():
        model.norm.fill_(float("nan"))
    with pytest.raises(DivergedError, match="have diverged"):
        next(generate(model, [1, 2], rotary=Rotary(config, 64), max_new_tokens=1))
    with pytest.raises(DivergedError, match="have diverged"):
        sample(torch.tensor([0.0, float("nan")]), 0.5)


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
    transformer = random_model(config, torch.float32)
    with pytest.raises(ModelError, match=message):
        next(generate(transformer, prompt, rotary=Rotary(config, 64), max_new_tokens=1))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"form": "folded"}, "form 'folded', must be one of absorbed, naive"),
        (GQA, {"form": "naive"}, "this model's attention is gqa"),
        ({}, {"form": "absorbed", "use_cache": False}, "reads a cache"),
        ({}, {"vocabulary": 257}, "vocabulary 257, must be 1..256"),
        ({}, {"temperature": -1.0}, "temperature -1.0"),
        ({}, {"temperature": float("nan")}, "temperature nan"),
        ({}, {"temperature": float("inf")}, "temperature inf"),
        ({}, {"temperature": 1e-300}, "temperature 1e-300, must be 0 or 1e-06 and more"),
    ],
)
def test_bad_options(changes: dict[str, object], options: dict[str, object], message: str) -> None:
    config = model_config("tiny", num_layers=1, **changes)
    with pytest.raises(ModelError, match=message):
        next(generate(random_model(config, torch.float32), [1], rotary=Rotary(config, 64), max_new_tokens=1, **options))

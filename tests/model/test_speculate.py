"""Speculative decoding gives the text of plain decoding; its drafts are those of the whole forward with MTP.

The model is trained for some seconds on words in random order: within a word the next tokens can be known, between
words not, so that drafts are both accepted and rejected.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from model.errors import ModelError
from model.generate import generate
from model.rope import Rotary
from model.speculate import DraftCounts, Drafter, judge, speculate
from model.transformer import Transformer
from tests.model.models import model_config, random_model

VOCABULARY, LENGTH, DEPTHS, NEW = 32, 40, 2, 9
Speaker = tuple[Transformer, Rotary, list[list[int]]]


def words_in_random_order(draw: random.Random, words: list[list[int]], length: int) -> list[int]:
    text: list[int] = []
    while len(text) < length:
        text += draw.choice(words)
    return text[:length]


def trained(steps: int, **changes: object) -> Speaker:
    """A model in float64, its rotary embedding and 200 prompts of 1 to 20 tokens."""
    config = model_config(
        "tiny",
        **{
            "vocab_size": VOCABULARY,
            "num_layers": 2,
            "num_routed_experts": 4,
            "num_expert_groups": 2,
            "mtp_depth": DEPTHS,
            **changes,
        },
    )
    draw = random.Random(0)
    words = [[draw.randrange(3, 24) for _ in range(draw.randrange(2, 7))] for _ in range(8)]
    transformer, rotary = random_model(config, torch.float32), Rotary(config, LENGTH)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    T = 32
    for _ in range(steps):
        text = torch.tensor([words_in_random_order(draw, words, T + 1 + DEPTHS) for _ in range(8)])
        shifted = [text[:, k : k + T] for k in range(DEPTHS + 2)]
        output = transformer(shifted[0], torch.stack(shifted[1:-1]), rotary=rotary)
        loss = torch.zeros(())
        for logits, label in zip([output.logits_BTV, *output.mtp_logits], shifted[1:]):
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompts = [words_in_random_order(draw, words, 1 + i % 20) for i in range(200)]
    return transformer.double(), rotary, prompts


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return trained(20)


@pytest.fixture(scope="module")
def greedy(speaker: Speaker) -> list[list[int]]:
    """The plain texts."""
    transformer, rotary, prompts = speaker
    return [list(generate(transformer, prompt, rotary=rotary, max_new_tokens=NEW)) for prompt in prompts]


@pytest.mark.parametrize("depths", [1, 2])
def test_the_text_is_the_greedy_one(speaker: Speaker, greedy: list[list[int]], depths: int) -> None:
    transformer, rotary, prompts = speaker
    drafted, accepted, forwards = [0] * depths, [0] * depths, 0
    for prompt, expected in zip(prompts, greedy, strict=True):
        counts = DraftCounts()
        text = list(speculate(transformer, prompt, rotary=rotary, max_new_tokens=NEW, depths=depths, counts=counts))
        assert text == expected
        # No stop ids: a forward hands out what it accepts and one token of its own.
        assert counts.tokens == NEW == counts.forwards + sum(counts.accepted)
        drafted = [a + b for a, b in zip(drafted, counts.drafted)]
        accepted = [a + b for a, b in zip(accepted, counts.accepted)]
        forwards += counts.forwards
    tokens = sum(map(len, greedy))
    print(f"depths {depths}: drafted {drafted}, accepted {accepted}, {forwards} forwards for {tokens} tokens")
    for number, right in zip(drafted, accepted):
        assert right > 150 and number - right > 150
    assert forwards < 0.8 * tokens


def definition(
    transformer: Transformer, rotary: Rotary, text: Sequence[int], number: int
) -> tuple[list[int], list[torch.Tensor]]:
    """`number` drafts after `text` and their logits, each from a forward over the whole text with the drafts so far."""
    tokens, chosen_by, length = list(text), [], len(text) - 1
    for k in range(number):
        shifted = [(tokens + [0] * DEPTHS)[j : j + length] for j in range(DEPTHS + 1)]
        rows = torch.tensor(shifted)[:, None]
        chosen_by.append(transformer(rows[0], rows[1:], rotary=rotary).mtp_logits[k][0, -1])
        tokens.append(int(chosen_by[-1].argmax()))
    return tokens[len(text) :], chosen_by


@torch.no_grad()
@pytest.mark.parametrize("form", ["absorbed", "naive"])
def test_drafts_are_those_of_the_whole_forward(speaker: Speaker, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, rotary, prompts = speaker
    rounds = []
    original = Drafter.draft

    def recording(self: Drafter, text: Sequence[int], *rest: object) -> tuple[list[int], list[torch.Tensor]]:
        drafts, chosen_by = original(self, text, *rest)  # type: ignore[arg-type]
        rounds.append((list(text), drafts, chosen_by))
        return drafts, chosen_by

    monkeypatch.setattr(Drafter, "draft", recording)
    for prompt in prompts[:12]:
        list(speculate(transformer, prompt, rotary=rotary, max_new_tokens=16, form=form))
    kinds = Counter(len(drafts) for _, drafts, _ in rounds)
    assert kinds[2] > 40 and kinds[1] > 0
    for text, drafts, chosen_by in rounds:
        expected, logits = definition(transformer, rotary, text, len(drafts))
        assert drafts == expected
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(chosen_by, logits, strict=True))


class Bounded(Rotary):
    """Refuses positions that the length does not have."""

    def tables(
        self, positions_T: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert positions_T.max() < self.length
        return super().tables(positions_T, dtype)


def test_ends_where_plain_decoding_ends(speaker: Speaker) -> None:
    transformer, _, prompts = speaker
    rotary = Bounded(transformer.config, LENGTH)
    lengths = set()
    for prompt in prompts[10:18]:
        for options in ({"max_new_tokens": 50}, {"max_new_tokens": 5, "vocabulary": 24}, {"max_new_tokens": 1}):
            plain = list(generate(transformer, prompt, rotary=rotary, **options))
            assert list(speculate(transformer, prompt, rotary=rotary, **options)) == plain
        text = list(generate(transformer, prompt, rotary=rotary, max_new_tokens=20))
        stop = text[len(prompt) % 10]
        stopped = list(speculate(transformer, prompt, rotary=rotary, max_new_tokens=20, stop_ids=[stop]))
        assert stopped == text[: text.index(stop) + 1]
        lengths.add(len(stopped))
    assert len(lengths) > 2
    assert not list(speculate(transformer, [3], rotary=rotary, max_new_tokens=0))
    whole = list(speculate(transformer, [3] * LENGTH, rotary=rotary, max_new_tokens=5))
    assert whole == list(generate(transformer, [3] * LENGTH, rotary=rotary, max_new_tokens=5)) and len(whole) == 1


def test_grouped_query_and_dense_model() -> None:
    changes = {"attention": "gqa", "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_routed_experts": 0}
    transformer, rotary, prompts = trained(15, **changes)
    accepted = 0
    for prompt in prompts[:20]:
        counts = DraftCounts()
        text = list(speculate(transformer, prompt, rotary=rotary, max_new_tokens=NEW, counts=counts))
        assert text == list(generate(transformer, prompt, rotary=rotary, max_new_tokens=NEW))
        accepted += sum(counts.accepted)
    assert accepted > 20


def test_judged_tokens_are_distributed_as_the_models_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_V, draft_logits_V = (torch.randn(2, 5, generator=generator, dtype=torch.float64) * 2).unbind()
    temperature, number = 0.8, 10000
    p_V, q_V = ((x / temperature).softmax(-1) for x in (logits_V, draft_logits_V))
    drafts = torch.multinomial(q_V, number, replacement=True, generator=generator).tolist()
    made = Counter()
    agreed = 0
    for draft in drafts:
        token = judge(logits_V, draft, draft_logits_V, temperature, generator)
        made[token] += 1
        agreed += token == draft
    assert (p_V - q_V).abs().max() > 0.2
    for token, p in enumerate(p_V.tolist()):
        assert abs(made[token] / number - p) < 4 * (p * (1 - p) / number) ** 0.5
    rate = float(torch.minimum(p_V, q_V).sum())
    assert abs(agreed / number - rate) < 4 * (rate * (1 - rate) / number) ** 0.5


@torch.no_grad()
def test_sampled_texts_are_distributed_as_plain_ones(speaker: Speaker) -> None:
    transformer, rotary, _ = speaker
    options = {"rotary": rotary, "max_new_tokens": 3, "temperature": 4.0, "vocabulary": 3}
    generator, number, counts = torch.Generator().manual_seed(0), 250, DraftCounts()
    drawn = Counter(
        tuple(speculate(transformer, [1], generator=generator, counts=counts, **options))[1:] for _ in range(number)
    )
    exact: Counter[tuple[int, ...]] = Counter()
    for a in range(3):
        for b in range(3):
            for c in range(3):
                logits = transformer(torch.tensor([[1, a, b]]), rotary=rotary).logits_BTV[0, :, :3]
                p = (logits / 4.0).softmax(-1)
                exact[b, c] += float(p[0, a] * p[1, b] * p[2, c])
    assert abs(sum(exact.values()) - 1) < 1e-9
    for pair, p in exact.items():
        assert abs(drawn[pair] / number - p) < 4 * (p * (1 - p) / number) ** 0.5


@pytest.mark.parametrize(
    ("mtp_depth", "depths", "message"),
    [(0, None, "this model has none"), (1, 2, "2 drafting depths, must be 1..1"), (1, 0, "0 drafting depths")],
)
def test_refusals(mtp_depth: int, depths: int | None, message: str) -> None:
    config = model_config("tiny", num_layers=1, mtp_depth=mtp_depth)
    transformer, rotary = random_model(config, torch.float32), Rotary(config, 64)
    with pytest.raises(ModelError, match=message) as refused:
        next(speculate(transformer, [1], rotary=rotary, max_new_tokens=1, depths=depths))
    assert refused.value.exit_code == 64 and "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="prompt has 0 tokens"):
        next(speculate(transformer, [], rotary=rotary, max_new_tokens=1))

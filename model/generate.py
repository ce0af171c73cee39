"""Text generation with the plain forward and a cache of what its attention needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from model.cache import Cache, new_cache
from model.config import ModelConfig
from model.errors import DivergedError, ModelError
from model.norm import promoted
from model.rope import Rotary
from model.transformer import Transformer

FORMS = ("absorbed", "naive")
LOWEST_TEMPERATURE = 1e-6  # logits divided by less may not be finite in float32


def sample(logits_V: torch.Tensor, temperature: float, generator: torch.Generator | None = None) -> int:
    """One token id: the largest logit (lowest id on ties) at temperature 0, else drawn from softmax(logits /
    temperature). DivergedError when there is no largest.
    """
    wide_V = logits_V.to(promoted(logits_V.dtype))
    if wide_V.isnan().any():
        raise DivergedError("generate: the model's logits are not numbers: its weights have diverged")
    if temperature == 0:
        return int((wide_V == wide_V.max()).nonzero()[0])
    return int(torch.multinomial((wide_V / temperature).softmax(-1), 1, generator=generator))


def check_request(
    model: Transformer, prompt: Sequence[int], rotary: Rotary, temperature: float, vocabulary: int | None
) -> int:
    """How many ids may be produced. ModelError for an empty or too long prompt and for ids or options out of range."""
    limit = vocabulary if vocabulary is not None else model.config.vocab_size
    if not 0 < limit <= model.config.vocab_size:
        raise ModelError(f"generate: vocabulary {limit}, must be 1..{model.config.vocab_size}")
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise ModelError(f"generate: temperature {temperature}, must be 0 or {LOWEST_TEMPERATURE:g} and more, finite")
    if not 0 < len(prompt) <= rotary.length:
        raise ModelError(f"generate: prompt has {len(prompt)} tokens, must have 1..{rotary.length}")
    bad = [token for token in prompt if not 0 <= token < limit]
    if bad:
        raise ModelError(f"generate: token id {bad[0]} in the prompt, must be 0..{limit - 1}")
    return limit


def new_caches(config: ModelConfig, number: int, form: str | None, capacity: int) -> list[Cache]:
    """Empty caches of `number` layers. form: how MLA reads them, `absorbed` or `naive`, or (None) in each forward the
    one with fewer multiplications. ModelError for another form, and for any with GQA, which has one only.
    """
    if form is not None and config.attention != "mla":
        raise ModelError(f"generate: form {form!r} is of MLA, this model's attention is {config.attention}")
    if form is not None and form not in FORMS:
        raise ModelError(f"generate: form {form!r}, must be one of {', '.join(FORMS)}")
    absorbed = None if form is None else form == "absorbed"
    return [new_cache(config, capacity, absorbed) for _ in range(number)]


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    rotary: Rotary,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_ids: Sequence[int] = (),
    vocabulary: int | None = None,
    generator: torch.Generator | None = None,
    form: str | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield new token ids one by one; ends after `max_new_tokens`, after a stop id, or at `rotary.length` positions.

    vocabulary: ids from here on are padding rows of the embedding and are never produced. form: see `new_caches`.
    use_cache False computes the whole text anew for every token (the definition), in the naive form. Raises ModelError
    as `check_request` and `new_caches` do.
    """
    limit = check_request(model, prompt, rotary, temperature, vocabulary)
    if not use_cache and form == "absorbed":
        raise ModelError("generate: form 'absorbed' reads a cache, and use_cache is False")
    room = min(len(prompt) + max_new_tokens, rotary.length)
    caches = new_caches(model.config, len(model.layers), form, room)
    text, done = list(prompt), 0
    for _ in range(max_new_tokens):
        tokens_BT = torch.tensor([text[done:]], device=model.embed.device)
        states_BTd, _ = model.states(
            tokens_BT, rotary=rotary, caches=caches if use_cache else None, first_position=done
        )
        done = len(text) if use_cache else 0
        token = sample(model.logits(states_BTd[0, -1])[:limit], temperature, generator)
        text.append(token)
        yield token
        if token in stop_ids or len(text) > rotary.length:
            return

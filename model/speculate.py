"""Speculative decoding: the MTP depths draft tokens, the main model judges them all in one forward (V3 sections 2.2 and
5.4.3).

The text is x_0, x_1, ...; h^0_i is the main model's normed state at position i and h^k_i that of depth k (from 1),
which joins h^(k-1)_i with the embedding of x_(i+k), at position i, to predict x_(i+k+1).

Shape letters: B sequences, T positions, d hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
import torch.nn.functional as F

from model.errors import ModelError
from model.generate import check_request, new_caches, sample
from model.norm import promoted
from model.rope import Rotary
from model.transformer import Transformer


@dataclass
class DraftCounts:
    """drafted, accepted: by depth from 1; a depth's draft counts as accepted if all before it in its round are, too.
    forwards: of the main model, the prompt's included. tokens: handed out.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    forwards: int = 0
    tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted, all depths together; 0 without drafts."""
        return sum(self.accepted) / max(sum(self.drafted), 1)

    @property
    def forwards_per_token(self) -> float:
        """Main forwards over tokens: 1 without drafts, 1 / (D + 1) at best."""
        return self.forwards / max(self.tokens, 1)


class Drafter:
    """The MTP depths with a cache each.

    With the certain tokens x_0..x_n, depth k keeps the positions whose x_(i+k) is certain: the first n - k + 1. What it
    computed further on, from drafts, is forgotten and comes anew in the next round, accepted or not.
    """

    def __init__(self, model: Transformer, rotary: Rotary, depths: int, form: str | None, capacity: int) -> None:
        self.model, self.rotary = model, rotary
        self.caches = new_caches(model.config, depths, form, capacity)
        embed = model.embed
        # Depth k lags one position behind depth k - 1: the input states that the latter will not hand over again.
        self.carried = [embed.new_empty(1, 0, embed.shape[1]) for _ in range(depths)]

    def draft(
        self,
        text: Sequence[int],
        states_BTd: torch.Tensor,
        number: int,
        limit: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[list[int], list[torch.Tensor]]:
        """`number` drafts, one of each depth in turn, and the logits [limit] that they were chosen by.

        text: x_0..x_n. states_BTd: the main model's, of the positions since the last call up to n - 1. `number` may
        fall from call to call, not rise: a depth once left out has missed states.
        """
        n, tokens, chosen_by = len(text) - 1, list(text), []
        for k in range(1, number + 1):
            cache, depth = self.caches[k - 1], self.model.mtp[k - 1]
            first = cache.length
            inputs_BTd = torch.cat((self.carried[k - 1], states_BTd), dim=1)
            ahead_BT = torch.tensor([tokens[first + k :]], device=inputs_BTd.device)
            cos_TP, sin_TP = self.rotary.tables(torch.arange(first, n, device=inputs_BTd.device), inputs_BTd.dtype)
            states_BTd, _ = depth(
                inputs_BTd,
                F.embedding(ahead_BT, self.model.embed),
                cos_TP,
                sin_TP,
                self.rotary.softmax_scale,
                cache=cache,
            )
            logits_V = self.model.logits(states_BTd[0, -1])[:limit]
            tokens.append(sample(logits_V, temperature, generator))
            chosen_by.append(logits_V)
            certain = max(n - k + 1, 0)
            cache.truncate(certain)
            self.carried[k - 1] = inputs_BTd[:, certain - first : max(n - k + 2, 0) - first]
        return tokens[n + 1 :], chosen_by


def judge(
    logits_V: torch.Tensor,
    draft: int,
    draft_logits_V: torch.Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> int:
    """The main model's token where `draft` stands: `draft` itself if it is accepted.

    temperature 0: its likeliest token. Otherwise, with p the main model's and q the draft's probabilities, `draft` with
    probability min(1, p / q), else one drawn from max(p - q, 0): distributed as p (Leviathan et al. 2023, theorem 1).
    """
    if temperature == 0:
        return sample(logits_V, 0)
    p_V, q_V = ((x.to(promoted(x.dtype)) / temperature).softmax(-1) for x in (logits_V, draft_logits_V))
    if torch.rand((), dtype=p_V.dtype, device=p_V.device, generator=generator) * q_V[draft] < p_V[draft]:
        return draft
    residual_V = (p_V - q_V).clamp(min=0)
    # Nothing left over: p and q differ by rounding only.
    return int(torch.multinomial(residual_V, 1, generator=generator)) if residual_V.any() else draft


def judged(
    logits_TV: torch.Tensor,
    drafts: Sequence[int],
    chosen_by: Sequence[torch.Tensor],
    temperature: float,
    generator: torch.Generator | None,
) -> list[int]:
    """The drafts up to the first that is not accepted, then one token of the main model's own. logits: one row for each
    draft and one after the last.
    """
    made = []
    for logits_V, draft, draft_logits_V in zip(logits_TV, drafts, chosen_by):
        made.append(judge(logits_V, draft, draft_logits_V, temperature, generator))
        if made[-1] != draft:
            return made
    return [*made, sample(logits_TV[-1], temperature, generator)]


@torch.no_grad()
def speculate(
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
    depths: int | None = None,
    counts: DraftCounts | None = None,
) -> Iterator[int]:
    """Yield what `generate` yields with the same arguments, in fewer main forwards: token by token the same at
    temperature 0, of the same distribution above it.

    Both hold up to rounding: a forward over several positions may round otherwise than one over a single position.
    depths: how many MTP depths draft (all if None). counts: filled while tokens are drawn. Raises ModelError as
    `generate` does, and for a model without that many MTP depths.
    """
    limit = check_request(model, prompt, rotary, temperature, vocabulary)
    held = len(model.mtp)
    if not held:
        raise ModelError("generate: speculative decoding drafts with MTP depths, and this model has none")
    depths = held if depths is None else depths
    if not 1 <= depths <= held:
        raise ModelError(f"generate: {depths} drafting depths, must be 1..{held}")
    counts = counts if counts is not None else DraftCounts()
    counts.drafted, counts.accepted, counts.forwards, counts.tokens = [0] * depths, [0] * depths, 0, 0
    room = min(len(prompt) + max_new_tokens, rotary.length)
    caches = new_caches(model.config, len(model.layers), form, room)
    drafter = Drafter(model, rotary, depths, form, room)
    text, drafts, chosen_by = list(prompt), list[int](), list[torch.Tensor]()
    while counts.tokens < max_new_tokens:
        done = caches[0].length
        tokens_BT = torch.tensor([text[done:] + drafts], device=model.embed.device)
        states_BTd, _ = model.states(tokens_BT, rotary=rotary, caches=caches, first_position=done)
        logits_TV = model.logits(states_BTd[0, -len(drafts) - 1 :])[:, :limit]
        made = judged(logits_TV, drafts, chosen_by, temperature, generator)
        counts.forwards += 1
        for k, (draft, token) in enumerate(zip_longest(drafts, made[: len(drafts)])):
            counts.drafted[k] += 1
            counts.accepted[k] += draft == token
        for token in made:
            text.append(token)
            counts.tokens += 1
            yield token
            if token in stop_ids or len(text) > rotary.length:
                return
        n = len(text) - 1
        for cache in caches:
            cache.truncate(n)
        # No more than can be handed out: the last forward brings a token of its own.
        number = min(depths, rotary.length - len(text), max_new_tokens - counts.tokens - 1)
        drafts, chosen_by = drafter.draft(text, states_BTd[:, : n - done], number, limit, temperature, generator)
        stops = [place for place, draft in enumerate(drafts) if draft in stop_ids]
        drafts = drafts[: stops[0] + 1] if stops else drafts

"""The smallest set of choices under which every rank fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from launch.ledger.choices import COSTLY, FREE, Choices
from launch.ledger.ledger import Plan, RankTimeline, Sizes, peak


@dataclass(frozen=True)
class Remedy:
    """choices: the smallest set that fits (None: not even all of them together). largest: bytes of the fullest rank
    with it, or with all of them."""

    choices: Choices | None
    largest: int


def distinct(ranks: Sequence[RankTimeline]) -> list[RankTimeline]:
    """One of those that hold the same in the same situations: a rank and its mirror."""
    found = {(t.stages, t.micro_batches, frozenset(t.situations)): t for t in ranks}
    return list(found.values())


def largest(plan: Plan, ranks: Sequence[RankTimeline], choices: Choices) -> int:
    """Bytes of the fullest rank."""
    sizes = Sizes(plan, choices)
    return max(peak(timeline, sizes).total for timeline in ranks)


def smallest_remedy(plan: Plan, ranks: Sequence[RankTimeline], choices: Choices, budget: int) -> Remedy:
    """Sets are tried by the number of costly choices in them, then by their size, then in the order of `FREE` and
    `COSTLY`."""
    kept = distinct(ranks)
    free, costly = ([r for r in group if _changes(choices, *r)] for group in (FREE, COSTLY))
    for bought in range(len(costly) + 1):
        for number in range(len(free) + 1):
            for paid in combinations(costly, bought):
                for chosen in combinations(free, number):
                    tried = replace(choices, **dict(chosen + paid))
                    found = largest(plan, kept, tried)
                    if found <= budget:
                        return Remedy(tried, found)
    return Remedy(None, largest(plan, kept, replace(choices, **dict(free + costly))))


def _changes(choices: Choices, key: str, value: str) -> bool:
    """Whether a remedy changes these choices, and means something with them."""
    return getattr(choices, key) != value and (choices.fp8 or key not in ("attention_output", "weights"))

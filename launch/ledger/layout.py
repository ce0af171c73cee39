"""What each stage holds, as counts: all that the ledger needs to know of a layout."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from parallel.layout import Layout, edges


@dataclass(frozen=True)
class Contents:
    """One stage: main layers [first, last), of them `dense` and `moe`. head: with the final norm and `mtp` MTP depths,
    which look up in the embedding. embed: the first stage's lookup."""

    first: int
    last: int
    dense: int
    moe: int
    mtp: int
    embed: bool
    head: bool

    def layers(self, config: ModelConfig) -> list[tuple[bool, int]]:
        """(MoE, number) of the kinds of layers here, those of MTP depths among them."""
        dense = self.dense + (0 if config.has_experts else self.mtp)
        moe = self.moe + (self.mtp if config.has_experts else 0)
        return [(kind, number) for kind, number in ((False, dense), (True, moe)) if number]

    def describe(self) -> str:
        """`embedding + 3 dense + 1 MoE`."""
        words = ["embedding"] if self.embed else []
        words += [f"{self.dense} dense"] if self.dense else []
        words += [f"{self.moe} MoE"] if self.moe else []
        words += ["head"] if self.head else []
        words += [f"{self.mtp} MTP"] if self.mtp else []
        return " + ".join(words) or "nothing"


def stage_contents(config: ModelConfig, layout: Layout) -> list[Contents]:
    """The stages of a layout, in order."""
    found = []
    for stage, (first, last) in zip(layout, edges(layout), strict=True):
        dense = max(0, min(last, config.dense_layers) - first)
        found.append(Contents(first, last, dense, last - first - dense, stage.mtp, stage.embedding, stage.output))
    return found

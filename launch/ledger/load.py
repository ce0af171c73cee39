"""How many rows a rank works on: tokens of a micro-batch, rows received, rows of each local expert.

Letters: E experts in G groups, of which a token reaches M; R expert ranks with l experts each; K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb

from kernels.quantize import padded_rows
from model.config import ModelConfig


@dataclass(frozen=True)
class Load:
    """A chunk on one rank. moved: rows sent, and rows received (a token goes once to a rank). counts: rows of each
    local expert. alone: the rank holds every expert, so no row is picked for another."""

    sequences: int
    length: int
    moved: int
    counts: tuple[int, ...]
    alone: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def expanded(self) -> int:
        return sum(self.counts)

    @property
    def padded(self) -> int:
        """Rows in a matrix quantised by columns: each expert's padded to a multiple of 128."""
        return sum(map(padded_rows, self.counts))


def ranks_per_token(config: ModelConfig, ranks: int) -> float:
    """Expected number of different ranks that a token's experts live on, all allowed choices equally likely: M groups
    of G, then K of their experts. V3 over 64 ranks: 7.36 of 8. A dense model sends none."""
    if not config.has_experts:
        return 0.0
    E, G, M, K = (
        config.num_routed_experts,
        config.num_expert_groups,
        config.groups_per_token,
        config.experts_per_token,
    )
    local, group = E // ranks, E // G
    if local % group and group % local:
        raise ValueError(f"expert={ranks}: a rank's {local} experts and a group's {group} must divide one another")
    reach = M * group
    if local <= group:
        return ranks * M / G * (1 - comb(reach - local, K) / comb(reach, K))
    held = local // group
    none = sum(
        comb(held, j) * comb(G - held, M - j) * comb(reach - j * group, K) for j in range(min(held, M) + 1) if M >= j
    )
    return ranks * (1 - none / (comb(G, M) * comb(reach, K)))


def balanced_load(config: ModelConfig, sequences: int, length: int, ranks: int) -> Load:
    """The load of a rank when all experts get the same number of tokens, as auxiliary-loss-free balancing aims at."""
    if not config.has_experts:
        return Load(sequences, length, 0, ())
    tokens, local = sequences * length, config.num_routed_experts // ranks
    rows = tokens * config.experts_per_token
    counts = tuple(rows // local + (e < rows % local) for e in range(local))
    return Load(sequences, length, ceil(tokens * ranks_per_token(config, ranks)), counts, ranks == 1)

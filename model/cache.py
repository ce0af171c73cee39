"""What decoding keeps of one layer's attention. Shape letters: B sequences, S positions kept, T new ones, L key-value
rank, R rotary dimensions, G key-value heads, h head dimensions.
"""

from __future__ import annotations

import torch

from model.config import ModelConfig


class Cache:
    """Two tensors with their positions in dimension `positions`, growing by `append`."""

    positions: int

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.second: torch.Tensor | None = None

    def append(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T positions; returns all S positions kept so far."""
        if self.first is not None and self.second is not None:
            first = torch.cat((self.first, first), dim=self.positions)
            second = torch.cat((self.second, second), dim=self.positions)
        self.first, self.second = first, second
        return first, second


class LatentCache(Cache):
    """MLA: normalised latents [B, S, L] and rotated shared keys [B, S, R], nothing per head."""

    positions = 1


class KeyValueCache(Cache):
    """GQA: rotated keys and values [B, G, S, h]."""

    positions = 2


def new_cache(config: ModelConfig) -> Cache:
    """An empty cache for one layer."""
    return KeyValueCache() if config.attention == "gqa" else LatentCache()

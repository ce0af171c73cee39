"""What decoding keeps of one layer's attention. Shape letters: B sequences, S positions kept, T new ones, L key-value
rank, R rotary dimensions, G key-value heads, h head dimensions.
"""

from __future__ import annotations

import torch

from model.config import ModelConfig


class Cache:
    """Two tensors with their positions in dimension `positions`, written in place into room that doubles when full.

    capacity: positions to make room for at first, so that a text of known length is never copied.
    """

    positions: int

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def first(self) -> torch.Tensor | None:
        """The S positions kept of the first tensor; None before the first `append`."""
        return None if self._room is None else self._room[0].narrow(self.positions, 0, self.length)

    @property
    def second(self) -> torch.Tensor | None:
        """The S positions kept of the second tensor; None before the first `append`."""
        return None if self._room is None else self._room[1].narrow(self.positions, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the positions kept, without room to spare."""
        return sum(kept.numel() * kept.element_size() for kept in (self.first, self.second) if kept is not None)

    def append(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T positions; returns all S positions kept so far, as views that later calls may overwrite. ValueError:
        another batch, width or number of positions than fits.
        """
        start, new = self.length, first.shape[self.positions]
        self.capacity = max(self.capacity, start + new)
        room = self._room
        if room is None:
            room = (self._empty(first), self._empty(second))
        elif room[0].shape[self.positions] < start + new:
            self.capacity = max(self.capacity, 2 * start)
            room = (self._empty(room[0]), self._empty(room[1]))
            for wide, kept in zip(room, (self.first, self.second)):
                assert kept is not None
                wide.narrow(self.positions, 0, start).copy_(kept)
        for wide, given in zip(room, (first, second)):
            place = wide.narrow(self.positions, start, new)
            if place.shape != given.shape:
                raise ValueError(f"cache: found {tuple(given.shape)} to append, must be {tuple(place.shape)}")
            place.copy_(given)
        self._room, self.length = room, start + new
        return room[0].narrow(self.positions, 0, self.length), room[1].narrow(self.positions, 0, self.length)

    def truncate(self, length: int) -> None:
        """Forget all positions but the first `length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cache: truncate to {length}, must be 0..{self.length}")
        self.length = length

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        shape = list(like.shape)
        shape[self.positions] = self.capacity
        return like.new_empty(shape)


class LatentCache(Cache):
    """MLA: normalised latents [B, S, L] and rotated shared keys [B, S, R], nothing per head.

    absorbed: attention works on the latents themselves (True), or keys and values of all heads are projected up anew
    from every position kept (False), or each forward does what takes fewer multiplications (None).
    """

    positions = 1

    def __init__(self, capacity: int = 0, absorbed: bool | None = False) -> None:
        super().__init__(capacity)
        self.absorbed = absorbed


class KeyValueCache(Cache):
    """GQA: rotated keys and values [B, G, S, h]."""

    positions = 2


def new_cache(config: ModelConfig, capacity: int = 0, absorbed: bool | None = False) -> Cache:
    """An empty cache for one layer. absorbed: see `LatentCache`; GQA has one form only."""
    return KeyValueCache(capacity) if config.attention == "gqa" else LatentCache(capacity, absorbed)

"""The order of one source's sequences over endless epochs.

Each epoch is a permutation of all blocks, seeded by (seed, source, epoch); within a block its packed sequences follow
one another. A sequence's block is found by its place among the prefix sums of the plan's counts, 16 bytes a block and
epoch, so a permutation that needs no memory would save nothing.

Shape letters: N samples, B blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from data.errors import UsageError
from data.hashing import key64, permutation

EPOCHS_KEPT = 4
# Where epochs differ, each before a sample has to be counted to find it.
MAX_COUNTED = 10_000


class BlockOrder:
    """counts: epoch -> sequences per block, int [B]. steady: they are the same in every epoch. first_block: blocks
    passed over at the start, counted through the epochs. Error: UsageError where a whole epoch has no sequence.
    """

    def __init__(
        self, name: str, blocks: int, counts: Callable[[int], np.ndarray], steady: bool, seed: int, first_block: int
    ) -> None:
        self.name, self.blocks, self.seed, self.first_block = name, blocks, seed, first_block
        self._counts, self._steady = counts, steady
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self.first_epoch, begun = divmod(first_block, blocks)
        first_B = self._epoch(self.first_epoch)[1]
        # Sequences of the first epoch that are passed over, and where each epoch from the first on ends.
        self.skipped = int(first_B[begun])
        self._end_E = [int(first_B[-1]) - self.skipped]

    def locate(self, count_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, block, sequence of the block), int64 [N] each, of samples that come after `count_N` others."""
        epoch_N, rest_N = self._in_epoch(count_N)
        epochs = set(epoch_N.tolist())
        if len(epochs) == 1:
            return epoch_N, *self._within(epochs.pop(), rest_N)
        block_N, sequence_N = np.empty_like(rest_N), np.empty_like(rest_N)
        for epoch in epochs:
            here = epoch_N == epoch
            block_N[here], sequence_N[here] = self._within(epoch, rest_N[here])
        return epoch_N, block_N, sequence_N

    def _within(self, epoch: int, rest_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, sequence of the block), int64 [N] each, of places among an epoch's sequences."""
        block_B, first_B = self._epoch(epoch)
        place_N = first_B.searchsorted(rest_N, side="right") - 1
        return block_B[place_N], rest_N - first_B[place_N]

    def blocks_begun(self, count: int) -> int:
        """Blocks, counted through the epochs from the first, that the first `count` samples have touched or passed
        over.
        """
        if not count:
            return self.first_block
        epoch_N, rest_N = self._in_epoch(np.array([count - 1], dtype=np.int64))
        epoch = int(epoch_N[0])
        return epoch * self.blocks + int(np.searchsorted(self._epoch(epoch)[1], rest_N[0], side="right"))

    def following(self, count: int, blocks: int) -> tuple[int, list[int]]:
        """(epoch, the block that sample `count` lies in and those after it: `blocks`, or to the end of the epoch)."""
        epoch_N, rest_N = self._in_epoch(np.array([count], dtype=np.int64))
        block_B, first_B = self._epoch(int(epoch_N[0]))
        place = int(np.searchsorted(first_B, rest_N[0], side="right")) - 1
        return int(epoch_N[0]), block_B[place : place + blocks].tolist()

    def passed(self, count: int) -> float:
        """How often the source was read through after `count` samples, in epochs."""
        epoch_N, rest_N = self._in_epoch(np.array([count], dtype=np.int64))
        return float(epoch_N[0] + rest_N[0] / self._epoch(int(epoch_N[0]))[1][-1])

    def _in_epoch(self, count_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, place among all of its sequences), int64 [N] each."""
        if self._steady:
            whole = self._end_E[0] + self.skipped
            turn_N, rest_N = np.divmod(count_N + self.skipped, whole)
            return turn_N + self.first_epoch, rest_N
        while self._end_E[-1] <= count_N.max(initial=0):
            epoch = self.first_epoch + len(self._end_E)
            ahead = (int(count_N.max()) - self._end_E[-1]) // int(self._epoch(epoch)[1][-1])
            if (epochs := len(self._end_E) + ahead) > MAX_COUNTED:
                raise UsageError(
                    f"source {self.name}: its sample {count_N.max()} comes after some {epochs} epochs; allowed "
                    f"{MAX_COUNTED} where fill-in-the-middle makes each another"
                )
            self._end_E.append(self._end_E[-1] + int(self._epoch(epoch)[1][-1]))
        if len(self._end_E) == 1:
            return np.full_like(count_N, self.first_epoch), count_N + self.skipped
        end_E = np.array(self._end_E)
        turn_N = end_E.searchsorted(count_N, side="right")
        start_E = np.concatenate([[-self.skipped], end_E[:-1]])
        return turn_N + self.first_epoch, count_N - start_E[turn_N]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the order of `epoch` [B], and how many sequences come before each [B + 1]."""
        if epoch not in self._epochs:
            count_B = self._counts(epoch)
            block_B = permutation(self.blocks, key64("blocks", self.seed, self.name, epoch))
            first_B = np.concatenate([[0], np.cumsum(count_B[block_B], dtype=np.int64)])
            if not first_B[-1]:
                raise UsageError(f"source {self.name}: none of its documents is of the lengths asked for")
            self._epochs[epoch] = (block_B, first_B)
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

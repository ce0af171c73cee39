"""What a stage makes of one block's documents in one epoch, from their lengths alone: which are read, how long they are
as read, which are rearranged for fill-in-the-middle and where.

Shape letters: D documents of the block, C chosen ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.contract import MAX_LENGTH, Source
from data.errors import UsageError
from data.hashing import key64
from data.store.table import block_table
from data.stream.fim import ADDED, draw_fim

NO_LIMIT = 2**31 - 1
# A block of the usual size; packing takes memory by the length of a sequence.


@dataclass(frozen=True)
class Documents:
    """The documents that are read. index_C: within the block. start_C: first stored token. stored_C: stored tokens.
    length_C: tokens as read. fim_C: bool, rearranged. cut_C2: where.
    """

    index_C: np.ndarray
    start_C: np.ndarray
    stored_C: np.ndarray
    length_C: np.ndarray
    fim_C: np.ndarray
    cut_C2: np.ndarray


@dataclass(frozen=True)
class PlanKey:
    """All that the number of a block's sequences depends on besides its documents.

    length: tokens of a sequence. shortest, longest: stored tokens (BOS and EOS included) of the documents that are
    read. seed and epoch matter only where fim_rate is above 0.
    """

    source: str
    length: int
    shortest: int = 0
    longest: int = NO_LIMIT
    fim_rate: float = 0.0
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.length <= MAX_LENGTH:
            raise UsageError(f"sequence length: found {self.length}, need at least 2 and at most {MAX_LENGTH}")
        if not 0 <= self.shortest <= self.longest:
            raise UsageError(
                f"document lengths of {self.source}: found {self.shortest} to {self.longest}, need 0 <= shortest <= "
                "longest"
            )
        if not self.fim_rate:
            object.__setattr__(self, "seed", 0)
            object.__setattr__(self, "epoch", 0)

    def at(self, epoch: int) -> PlanKey:
        """The key of another epoch."""
        return replace(self, epoch=epoch)

    def documents(self, offset_D: np.ndarray, first_document: int) -> Documents:
        """offset_D: document offsets of the block, int64 [D + 1]. first_document: number of its first document in the
        source.
        """
        stored_D = np.diff(offset_D)
        if self.shortest > 0 or self.longest < NO_LIMIT:
            index_C = np.flatnonzero((stored_D >= self.shortest) & (stored_D <= self.longest))
        else:
            index_C = np.arange(len(stored_D))
        stored_C = stored_D[index_C]
        if self.fim_rate:
            key = key64("fim", self.seed, self.source, self.epoch)
            fim_C, cut_C2 = draw_fim(stored_C, index_C + first_document, key, self.fim_rate, self.length)
        else:
            fim_C, cut_C2 = np.zeros(len(index_C), dtype=bool), np.zeros((len(index_C), 2), dtype=np.int64)
        return Documents(index_C, offset_D[index_C], stored_C, stored_C + ADDED * fim_C, fim_C, cut_C2)


def first_documents(source: Source) -> np.ndarray:
    """How many documents of the source come before each block, uint64 [blocks]."""
    return block_table(source.name, source.blocks).first_document_B

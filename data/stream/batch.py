"""Sequences of packed blocks as one micro-batch: whole runs of tokens are copied, nothing is done token by token.

Shapes: b sequences, T tokens, D MTP depths, P pieces of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.contract import IGNORE, MicroBatch
from data.stream.documents import Documents
from data.stream.fim import apply_fim, write_fim
from data.stream.packing import PackedBlock


@dataclass(frozen=True)
class ReadyBlock:
    """A packed block with what reading it needs. tokens_N: its stored tokens. first_document: number of its first
    document in the source. piece_P5: per piece (document in the source, start in the document as read, length, start in
    the block or -1 if rearranged, place in `documents`). fim_C4: per document (start in the block, stored tokens, the
    two cuts). Both int64.
    """

    packed: PackedBlock
    documents: Documents
    tokens_N: np.ndarray
    first_document: int
    piece_P5: np.ndarray
    fim_C4: np.ndarray

    @staticmethod
    def of(packed: PackedBlock, documents: Documents, tokens_N: np.ndarray, first_document: int) -> ReadyBlock:
        """Put together from its parts."""
        chosen_P = packed.document_P
        stored_P = np.where(documents.fim_C[chosen_P], -1, documents.start_C[chosen_P] + packed.start_P)
        number_P = documents.index_C[chosen_P] + first_document
        piece_P5 = np.stack([number_P, packed.start_P, packed.length_P, stored_P, chosen_P], axis=1)
        fim_C4 = np.column_stack([documents.start_C, documents.stored_C, documents.cut_C2])
        return ReadyBlock(packed, documents, tokens_N, first_document, piece_P5, fim_C4)

    def pieces(self, sequence: int) -> list[list[int]]:
        """Rows of `piece_P5` of one sequence."""
        first_S = self.packed.first_S
        rows: list[list[int]] = self.piece_P5[first_S[sequence] : first_S[sequence + 1]].tolist()
        return rows


class BatchMaker:
    """Micro-batches of one sequence length. pad: token on padding. fim_ids: begin, hole, end."""

    def __init__(self, length: int, mtp_depth: int, pad: int, fim_ids: tuple[int, ...]) -> None:
        self.length, self.mtp_depth, self.pad, self.fim_ids = length, mtp_depth, pad, fim_ids
        self._positions: dict[int, np.ndarray] = {}

    def batch(self, places: list[tuple[ReadyBlock, int]], source_b: np.ndarray) -> MicroBatch:
        """places: (block, sequence of it) by row. source_b: source index by row."""
        b, T, D = len(places), self.length, self.mtp_depth
        tokens_bT = np.empty((b, T), dtype=np.int64)
        tokens_N = tokens_bT.reshape(-1)
        numbers, lengths, ends = [], [], []
        place = 0
        for row, (block, sequence) in enumerate(places, start=1):
            stored_N = block.tokens_N
            for number, start, length, stored, chosen in block.pieces(sequence):
                end = place + length
                if stored >= 0:
                    tokens_N[place:end] = stored_N[stored : stored + length]
                else:
                    at, stored, first, second = block.fim_C4[chosen].tolist()
                    write_fim(
                        tokens_N[place:end], stored_N[at : at + stored], stored, (first, second), start, self.fim_ids
                    )
                numbers.append(number)
                lengths.append(length)
                ends.append(end)
                place = end
            if place < (end := row * T):
                tokens_N[place:end] = self.pad
                numbers.append(-1)
                lengths.append(end - place)
                ends.append(end)
                place = end
        number_P, length_P, end_P = (np.array(column, dtype=np.int64) for column in (numbers, lengths, ends))
        documents_bT = number_P.repeat(length_P).reshape(b, T)
        padding = [slice(ends[i] - lengths[i], ends[i]) for i in np.flatnonzero(number_P < 0).tolist()]
        real_bT = np.ones((b, T), dtype=bool)
        for span in padding:
            real_bT.reshape(-1)[span] = False
        labels_bT = np.empty((b, T), dtype=np.int64)
        mtp_tokens_DbT = np.full((D, b, T), self.pad, dtype=np.int64)
        mtp_labels_DbT = np.empty((D, b, T), dtype=np.int64)
        for distance, into_bT in enumerate((labels_bT, *mtp_labels_DbT), start=1):
            into_N = into_bT.reshape(-1)
            into_N[:-distance], into_N[-distance:] = tokens_N[distance:], IGNORE
            for back in range(1, distance + 1):
                into_N[end_P[length_P >= back] - back] = IGNORE
            for span in padding:
                into_N[span] = IGNORE
        for depth, seen_bT in enumerate(mtp_tokens_DbT, start=1):
            seen_bT[:, :-depth] = tokens_bT[:, depth:]
        return MicroBatch(
            tokens=tokens_bT,
            labels=labels_bT,
            positions=self._positions_bT(b),
            documents=documents_bT,
            mtp_tokens=mtp_tokens_DbT,
            mtp_labels=mtp_labels_DbT,
            real=real_bT,
            source=source_b,
        )

    def reference(self, places: list[tuple[ReadyBlock, int]], source_b: np.ndarray) -> MicroBatch:
        """What `batch` returns, by its definition: document by document and token by token."""
        shape = (len(places), self.length)
        tokens_bT = np.full(shape, self.pad, dtype=np.int64)
        documents_bT = np.full(shape, -1, dtype=np.int64)
        piece_bT = np.full(shape, -1, dtype=np.int64)
        for row, (block, sequence) in enumerate(places):
            place, first_S = 0, block.packed.first_S
            for piece in range(first_S[sequence], first_S[sequence + 1]):
                chosen, start = block.packed.document_P[piece], block.packed.start_P[piece]
                stored = block.documents.start_C[chosen]
                document_N = block.tokens_N[stored : stored + block.documents.stored_C[chosen]]
                if block.documents.fim_C[chosen]:
                    first, second = block.documents.cut_C2[chosen].tolist()
                    document_N = apply_fim(document_N, first, second, self.fim_ids)
                for token in document_N[start : start + block.packed.length_P[piece]]:
                    tokens_bT[row, place] = token
                    documents_bT[row, place] = block.first_document + block.documents.index_C[chosen]
                    piece_bT[row, place] = piece
                    place += 1
        shifts = [shifted(tokens_bT, piece_bT, distance) for distance in range(1, self.mtp_depth + 2)]
        seen_DbT = np.full((self.mtp_depth, *shape), self.pad, dtype=np.int64)
        for depth in range(1, self.mtp_depth + 1):
            seen_DbT[depth - 1, :, :-depth] = tokens_bT[:, depth:]
        return MicroBatch(
            tokens=tokens_bT,
            labels=shifts[0],
            positions=np.broadcast_to(np.arange(self.length), shape).copy(),
            documents=documents_bT,
            mtp_tokens=seen_DbT,
            mtp_labels=np.stack(shifts[1:]) if self.mtp_depth else np.empty((0, *shape), dtype=np.int64),
            real=piece_bT >= 0,
            source=source_b,
        )

    def _positions_bT(self, b: int) -> np.ndarray:
        if b not in self._positions:
            self._positions[b] = np.broadcast_to(np.arange(self.length), (b, self.length)).copy()
        return self._positions[b]


def shifted(tokens_bT: np.ndarray, piece_bT: np.ndarray, distance: int) -> np.ndarray:
    """Labels [b, T]: the token `distance` later in the same piece, else IGNORE. piece_bT: -1 on padding."""
    label_bT = np.full_like(tokens_bT, IGNORE)
    same = (piece_bT[:, :-distance] == piece_bT[:, distance:]) & (piece_bT[:, :-distance] >= 0)
    label_bT[:, :-distance][same] = tokens_bT[:, distance:][same]
    return label_bT

"""The token stream: sample k is a pure function of (manifest, plan, seed, weights, k), whoever asks and in whatever
order.

Global sample -> source and its count so far (mixture table) -> epoch and block (seeded permutation of blocks per
source and epoch, prefix sums of the plan) -> sequence of the packed block -> tokens. Nothing is stateful but caches.

Shapes: b sequences, T tokens, D MTP depths, N samples, B blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from data.config import parse_weight
from data.contract import IGNORE, MicroBatch, Plan, StepCounts, StreamState
from data.errors import DataError, UsageError
from data.hashing import json_sha256, key64, permutation
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest, verify_files
from data.stream.mixture import Mixture
from data.stream.packing import PackedBlock, pack
from data.stream.plan import load_plan

PACKED_BLOCKS = 64


def open_stream(
    directory: str | Path,
    length: int,
    *,
    mtp_depth: int,
    seed: int,
    stage: str,
    weights: Mapping[str, str] | None = None,
    start_blocks: Mapping[str, int] | None = None,
    verify: bool = True,
) -> Stream:
    """The stream of one stage over the corpus in `directory`.

    length: tokens of a sequence. weights: rationals by source name; sources left out give nothing; None takes the
    manifest's. start_blocks: blocks already read of each source (`Stream.blocks_read` of an earlier stage with the
    same seed), so that nothing repeats before its epoch ends. verify: check the digests of all block files, not only
    sizes. Errors: DataError, UsageError.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    verify_files(directory, manifest, digests=verify)
    if length < 2:
        raise UsageError(f"sequence length: found {length}, need at least 2")
    given = dict(weights) if weights is not None else {source.name: source.weight for source in manifest.sources}
    if unknown := sorted(set(given) - {source.name for source in manifest.sources}):
        raise UsageError(
            f"weights for unknown sources {', '.join(unknown)}; found {', '.join(s.name for s in manifest.sources)}"
        )
    parsed = {s.name: parse_weight(given[s.name], f"weight of {s.name}") for s in manifest.sources if s.name in given}
    store = BlockStore(directory, manifest)
    plan = load_plan(store, length)
    return Stream(
        store, plan, mtp_depth=mtp_depth, seed=seed, stage=stage, weights=parsed, start_blocks=start_blocks or {}
    )


class Stream:
    """Implements `data.contract.TokenStream` for one stage; see `open_stream`."""

    def __init__(
        self,
        store: BlockStore,
        plan: Plan,
        *,
        mtp_depth: int,
        seed: int,
        stage: str,
        weights: Mapping[str, Fraction],
        start_blocks: Mapping[str, int],
    ) -> None:
        self.manifest = store.manifest
        self.length, self.mtp_depth, self.seed, self.stage = plan.length, mtp_depth, seed, stage
        self.mixture = Mixture(weights)
        self.source_names = self.mixture.names
        by_name = {source.name: source for source in store.manifest.sources}
        if unknown := sorted(set(start_blocks) - set(self.source_names)):
            raise UsageError(f"starting blocks for sources that are not in the mixture: {', '.join(unknown)}")
        self._store = store
        self._sources = [by_name[name] for name in self.source_names]
        self._orders = [
            BlockOrder(name, plan.sequences[name], seed, start_blocks.get(name, 0)) for name in self.source_names
        ]
        self._first_document = [
            np.cumsum([0, *(block.documents for block in source.blocks)]) for source in self._sources
        ]
        self._packed: OrderedDict[tuple[int, int, int], PackedBlock] = OrderedDict()
        self.digest = json_sha256(
            {
                "length": plan.length,
                "weights": [
                    [name, int(share)] for name, share in zip(self.source_names, self.mixture.share, strict=True)
                ],
                "start_blocks": [[order.name, order.first_block] for order in self._orders],
            }
        )

    def counts(self, first_sample: int, samples: int) -> StepCounts:
        """Denominators of samples [first_sample, first_sample + samples), from the index alone."""
        distances = range(self.mtp_depth + 2)
        total = np.zeros(len(distances), dtype=np.int64)
        main = dict.fromkeys(self.source_names, 0)
        source_N, count_N = self.mixture.locate(np.arange(first_sample, first_sample + samples, dtype=np.int64))
        for source, order in enumerate(self._orders):
            for epoch, block, sequences in order.groups(count_N[source_N == source]):
                packed = self._pack(source, epoch, block)
                labels = np.array([packed.labels(distance)[sequences].sum() for distance in distances])
                total += labels
                main[self.source_names[source]] += int(labels[1])
        return StepCounts(
            main=int(total[1]),
            mtp=tuple(int(count) for count in total[2:]),
            sequences=samples,
            tokens=int(total[0]),
            sources=main,
        )

    def read(self, samples: list[int]) -> MicroBatch:
        """The given samples as one micro-batch, in the order given. Error: DataError for a damaged block."""
        shape = (len(samples), self.length)
        tokens_bT = np.full(shape, self.manifest.pad_id, dtype=np.int64)
        documents_bT = np.full(shape, -1, dtype=np.int64)
        piece_bT = np.full(shape, -1, dtype=np.int64)
        source_b, count_b = self.mixture.locate(np.array(samples, dtype=np.int64))
        for row, (source, count) in enumerate(zip(source_b.tolist(), count_b.tolist(), strict=True)):
            epoch, block, sequence = self._orders[source].locate(count)
            packed = self._pack(source, epoch, block)
            stored_N = self._store.tokens(self._sources[source].blocks[block])
            place = 0
            for piece in range(packed.first_S[sequence], packed.first_S[sequence + 1]):
                start, length = int(packed.start_P[piece]), int(packed.length_P[piece])
                span = slice(place, place + length)
                tokens_bT[row, span] = stored_N[start : start + length]
                documents_bT[row, span] = self._first_document[source][block] + packed.document_P[piece]
                piece_bT[row, span] = piece
                place += length
        shifts = [shifted(tokens_bT, piece_bT, distance) for distance in range(1, self.mtp_depth + 2)]
        seen_DbT = np.full((self.mtp_depth, *shape), self.manifest.pad_id, dtype=np.int64)
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

    def state(self, sample: int) -> StreamState:
        """State after `sample` samples were consumed."""
        taken = dict(zip(self.source_names, self.mixture.taken(sample).tolist(), strict=True))
        return StreamState(self.manifest.digest, self.seed, self.stage, sample, taken, self.digest)

    def resume(self, state: StreamState) -> int:
        """The sample to go on with. Error: DataError if the state belongs to other data or another order."""
        expected = self.state(state.sample)
        if state.manifest_digest != expected.manifest_digest:
            raise DataError(
                f"stream state is of manifest {state.manifest_digest}, this data has {expected.manifest_digest}"
            )
        if state != expected:
            raise DataError(
                f"stream state {state} is of another stream: at sample {state.sample} this one has {expected}"
            )
        return state.sample

    def epochs(self, sample: int) -> dict[str, float]:
        """How often each source was read through after `sample` samples."""
        taken = self.mixture.taken(sample).tolist()
        return {o.name: (o.skipped + n) / o.epoch_sequences for o, n in zip(self._orders, taken, strict=True)}

    def blocks_read(self, sample: int) -> dict[str, int]:
        """Blocks begun of each source after `sample` samples, for the `start_blocks` of a next stage."""
        taken = self.mixture.taken(sample).tolist()
        return {o.name: o.blocks_begun(n) for o, n in zip(self._orders, taken, strict=True)}

    def _pack(self, source: int, epoch: int, block: int) -> PackedBlock:
        place = (source, epoch, block)
        if place in self._packed:
            self._packed.move_to_end(place)
            return self._packed[place]
        name = self.source_names[source]
        listed = self._sources[source].blocks[block]
        packed = pack(self._store.offsets(listed), self.length, key64("documents", self.seed, name, epoch, block))
        planned = self._orders[source].count_B[block]
        if packed.sequences != planned:
            raise DataError(f"{listed.index_file}: packs into {packed.sequences} sequences, the plan has {planned}")
        self._packed[place] = packed
        if len(self._packed) > PACKED_BLOCKS:
            self._packed.popitem(last=False)
        return packed


def shifted(tokens_bT: np.ndarray, piece_bT: np.ndarray, distance: int) -> np.ndarray:
    """Labels [b, T]: the token `distance` later in the same piece, else IGNORE. piece_bT: -1 on padding."""
    label_bT = np.full_like(tokens_bT, IGNORE)
    same = (piece_bT[:, :-distance] == piece_bT[:, distance:]) & (piece_bT[:, :-distance] >= 0)
    label_bT[:, :-distance][same] = tokens_bT[:, distance:][same]
    return label_bT


class BlockOrder:
    """Order of one source's blocks over endless epochs; each epoch is a permutation of all blocks seeded by (seed,
    name, epoch).

    first_block: blocks passed over at the start, counted through the epochs.
    """

    def __init__(self, name: str, sequences: Sequence[int], seed: int, first_block: int) -> None:
        self.name, self.seed, self.first_block = name, seed, first_block
        self.count_B = np.array(sequences, dtype=np.int64)
        self.epoch_sequences = int(self.count_B.sum())
        if not self.epoch_sequences:
            raise DataError(f"source '{name}' is empty: its plan holds no sequences")
        if first_block < 0:
            raise UsageError(f"starting block of '{name}': found {first_block}, need at least 0")
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        epoch, place = divmod(first_block, len(self.count_B))
        self.skipped = epoch * self.epoch_sequences + int(self._epoch(epoch)[1][place])

    def locate(self, count: int) -> tuple[int, int, int]:
        """(epoch, block, sequence in the block) of this source's sample number `count`."""
        epoch, block, sequences = next(self.groups(np.array([count])))
        return epoch, block, int(sequences[0])

    def groups(self, count_N: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """The samples `count_N` by block: (epoch, block, sequences in the block)."""
        epoch_N, rest_N = np.divmod(count_N + self.skipped, self.epoch_sequences)
        for epoch in np.unique(epoch_N).tolist():
            block_B, first_B = self._epoch(epoch)
            sequence_N = rest_N[epoch_N == epoch]
            place_N = np.searchsorted(first_B, sequence_N, side="right") - 1
            for place in np.unique(place_N).tolist():
                yield epoch, int(block_B[place]), sequence_N[place_N == place] - first_B[place]

    def blocks_begun(self, count: int) -> int:
        """Blocks, counted through the epochs from the first, that the first `count` samples have touched or passed
        over.
        """
        if not count:
            return self.first_block
        epoch, rest = divmod(self.skipped + count - 1, self.epoch_sequences)
        _, first_B = self._epoch(epoch)
        return epoch * len(self.count_B) + int(np.searchsorted(first_B, rest, side="right"))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the order of `epoch` [B], and how many sequences come before each [B + 1]."""
        if epoch not in self._epochs:
            block_B = permutation(len(self.count_B), key64("blocks", self.seed, self.name, epoch))
            self._epochs[epoch] = (block_B, np.concatenate([[0], np.cumsum(self.count_B[block_B])]))
            if len(self._epochs) > 4:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

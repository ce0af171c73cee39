"""The token stream: sample k is a pure function of (manifest, seed, the stage's settings, k), whoever asks and in
whatever order.

Served sample -> raw sample (skip list) -> source and its count so far (mixture table) -> epoch and block (seeded
permutation of blocks per source and epoch, prefix sums of the plan) -> sequence of the packed block -> tokens. Nothing
is stateful but caches, which a lock guards.

Shapes: b sequences, T tokens, D MTP depths, N samples, B blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import RLock

import numpy as np

from data.config import parse_weights
from data.contract import STATE_VERSION, Manifest, MicroBatch, StepCounts, StreamState
from data.errors import DataError, UsageError
from data.hashing import json_sha256, key64
from data.store.blocks import BlockStore, Identities
from data.store.location import Location, Remote, open_location
from data.store.manifest import load_manifest, verify_files
from data.stream.batch import BatchMaker, ReadyBlock
from data.stream.documents import NO_LIMIT, PlanKey, first_documents
from data.stream.fim import check_fim
from data.stream.mixture import Mixture
from data.stream.order import BlockOrder
from data.stream.packing import pack
from data.stream.plan import load_plan
from data.stream.skip import SkipList

READY_BLOCKS = 64
PLANS_KEPT = 4
BLOCKS_AHEAD = 16
# What an int64 holds.
MAX_SAMPLES = 1 << 63


def open_stream(
    corpus: str | Path | Location,
    length: int,
    *,
    mtp_depth: int,
    seed: int,
    stage: str,
    weights: Mapping[str, str] | None = None,
    start_blocks: Mapping[str, int] | None = None,
    fim_rate: float = 0.0,
    document_lengths: Mapping[str, tuple[int, int]] | None = None,
    skip: Sequence[tuple[int, int]] = (),
    verify: bool = True,
    remote: Remote | None = None,
) -> Stream:
    """The stream of one stage over a corpus: a directory, a URL (then `remote` says where to cache it) or a
    location.

    length: tokens of a sequence. weights: rationals by source name; sources left out give nothing; None takes the
    manifest's. start_blocks: blocks already read of each source (`Stream.blocks_read` of an earlier stage with the
    same seed), so that nothing repeats before its epoch ends. fim_rate: share of documents rearranged for
    fill-in-the-middle. document_lengths: (shortest, longest) stored tokens, BOS and EOS included, of the documents read
    from a source; the others are passed over. skip: ranges [first, end) of samples that are never served. verify: check
    the digests of all block files now, not each when it is first read. Errors: DataError, UsageError.
    """
    location = corpus if isinstance(corpus, Location) else open_location(corpus, remote)
    manifest = load_manifest(location)
    if verify:
        verify_files(location, manifest, digests=True)
    check_fim(fim_rate, manifest.fim_ids, location.shown(""))
    given = dict(weights) if weights is not None else {source.name: source.weight for source in manifest.sources}
    limits = dict(document_lengths or {})
    known = [source.name for source in manifest.sources]
    for what, names in (("weights", given), ("document lengths", limits), ("starting blocks", start_blocks or {})):
        if unknown := sorted(set(names) - set(known)):
            raise UsageError(f"{what} for unknown sources {', '.join(unknown)}; found {', '.join(known)}")
    keys = {
        name: PlanKey(name, length, *limits.get(name, (0, NO_LIMIT)), fim_rate=fim_rate, seed=seed) for name in known
    }
    return Stream(
        BlockStore(location, manifest, verified=verify),
        parse_weights({name: given[name] for name in known if name in given}, "weights"),
        keys,
        SkipList(skip),
        mtp_depth=mtp_depth,
        seed=seed,
        stage=stage,
        start_blocks=start_blocks or {},
    )


class Stream:
    """Implements `data.contract.TokenStream` for one stage; see `open_stream`. keys: of every source of the manifest,
    all of one length.
    """

    def __init__(
        self,
        store: BlockStore,
        weights: Mapping[str, Fraction],
        keys: Mapping[str, PlanKey],
        skip: SkipList,
        *,
        mtp_depth: int,
        seed: int,
        stage: str,
        start_blocks: Mapping[str, int],
    ) -> None:
        self.manifest: Manifest = store.manifest
        self.length = next(iter(keys.values())).length
        self.mtp_depth, self.seed, self.stage = mtp_depth, seed, stage
        self.mixture = Mixture(weights)
        self.source_names = tuple(source.name for source in store.manifest.sources)
        self._lock = RLock()
        self._store, self._skip = store, skip
        self._sources = store.manifest.sources
        self._keys = [keys[name] for name in self.source_names]
        self._start_blocks = {name: start_blocks.get(name, 0) for name in self.source_names}
        # The mixture numbers only the sources that give something.
        self._source_M = np.array([self.source_names.index(name) for name in self.mixture.names], dtype=np.int64)
        self._plans: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._orders = {number: self._order(number) for number in self._source_M.tolist()}
        self._first_documents = {number: first_documents(self._sources[number]) for number in self._orders}
        self._ready: OrderedDict[tuple[int, int, int], ReadyBlock] = OrderedDict()
        self._maker = BatchMaker(self.length, mtp_depth, self.manifest.pad_id, self.manifest.fim_ids)
        self._settings = {
            "length": self.length,
            "fim_rate": self._keys[0].fim_rate,
            "weights": [[name, int(share)] for name, share in zip(self.mixture.names, self.mixture.share, strict=True)],
            "documents": [[key.shortest, key.longest] for key in self._keys],
            "start_blocks": list(self._start_blocks.values()),
        }

    def counts(self, first_sample: int, samples: int) -> StepCounts:
        """Denominators of samples [first_sample, first_sample + samples), from the index alone."""
        source_N, epoch_N, block_N, sequence_N = self._locate(
            np.arange(first_sample, first_sample + samples, dtype=np.int64)
        )
        distances = range(self.mtp_depth + 2)
        total = np.zeros(len(distances), dtype=np.int64)
        main = dict.fromkeys(self.source_names, 0)
        place_N3 = np.stack([source_N, epoch_N, block_N], axis=1)
        for source, epoch, block in np.unique(place_N3, axis=0).tolist():
            sequences = sequence_N[(place_N3 == (source, epoch, block)).all(axis=1)]
            packed = self._ready_block(source, epoch, block).packed
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

    def read(self, samples: Sequence[int]) -> MicroBatch:
        """The given samples as one micro-batch, in the order given. Error: DataError for a damaged block."""
        return self._maker.batch(*self._places(samples))

    def read_reference(self, samples: Sequence[int]) -> MicroBatch:
        """What `read` returns, token by token."""
        return self._maker.reference(*self._places(samples))

    def place(self, sample: int) -> tuple[int, int, int, int, ReadyBlock]:
        """Where a served sample comes from: (source index, epoch, block, sequence of it, the packed block). Error:
        UsageError for a number that no sample has.
        """
        if not 0 <= sample < MAX_SAMPLES:
            raise UsageError(f"sample: found {sample}, allowed 0 to {MAX_SAMPLES - 1}")
        source, epoch, block, sequence = (int(column[0]) for column in self._locate(np.array([sample], dtype=np.int64)))
        return source, epoch, block, sequence, self._ready_block(source, epoch, block)

    def identities(self, source: int, block: int) -> Identities | None:
        """Identities of a block's documents, None where the corpus was made without. Error: DataError."""
        listed = self._sources[source].blocks[block]
        return self._store.identities(listed) if listed.ids_sha256 else None

    def prefetch(self, sample: int) -> None:
        """Have the store fetch, in the background, the blocks that come at `sample` and after it."""
        taken = self.mixture.taken(self._skip.raw_end(sample)).tolist()
        each = max(1, BLOCKS_AHEAD // len(taken))
        with self._lock:
            wanted = []
            for number, count in zip(self._source_M.tolist(), taken, strict=True):
                epoch, blocks = self._orders[number].following(count, each)
                wanted += [(number, block) for block in blocks if (number, epoch, block) not in self._ready]
        self._store.prefetch([self._sources[number].blocks[block] for number, block in wanted])

    def close(self) -> None:
        """Let go of the store's blocks and threads."""
        self._store.close()

    def state(self, sample: int) -> StreamState:
        """State after `sample` samples were served."""
        raw = self._skip.raw_end(sample)
        per_source = np.zeros(len(self._sources), dtype=np.int64)
        per_source[self._source_M] = self.mixture.taken(raw)
        digest = json_sha256({**self._settings, "skipped": self._skip.before(raw)})
        return StreamState(
            STATE_VERSION, self.manifest.digest, self.seed, self.stage, sample, per_source.tolist(), digest
        )

    def resume(self, state: StreamState) -> int:
        """The sample to go on with. Error: DataError if the state belongs to other data or another order. Ranges to
        skip may have been added after the samples served so far.
        """
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
        """How often each source of the mixture was read through after `sample` samples."""
        taken = self.mixture.taken(self._skip.raw_end(sample)).tolist()
        with self._lock:
            return {
                name: self._orders[number].passed(count)
                for name, number, count in zip(self.mixture.names, self._source_M.tolist(), taken, strict=True)
            }

    def blocks_read(self, sample: int) -> dict[str, int]:
        """Blocks begun of each source of the manifest after `sample` samples: the `start_blocks` of a next stage."""
        taken = self.mixture.taken(self._skip.raw_end(sample)).tolist()
        with self._lock:
            begun = {
                name: self._orders[number].blocks_begun(count)
                for name, number, count in zip(self.mixture.names, self._source_M.tolist(), taken, strict=True)
            }
        return {**self._start_blocks, **begun}

    def _locate(self, sample_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, block, sequence of the block) of served samples, int64 [N] each."""
        mixed_N, count_N = self.mixture.locate(self._skip.raw(sample_N))
        source_N = self._source_M[mixed_N]
        numbers = set(source_N.tolist())
        with self._lock:
            if len(numbers) == 1:
                return source_N, *self._orders[numbers.pop()].locate(count_N)
            place_3N = np.empty((3, len(sample_N)), dtype=np.int64)
            for number in numbers:
                here = source_N == number
                place_3N[:, here] = self._orders[number].locate(count_N[here])
        return source_N, place_3N[0], place_3N[1], place_3N[2]

    def _places(self, samples: Sequence[int]) -> tuple[list[tuple[ReadyBlock, int]], np.ndarray]:
        source_b, *place = self._locate(np.array(samples, dtype=np.int64))
        places = zip(source_b.tolist(), *(column.tolist() for column in place), strict=True)
        return [
            (self._ready_block(source, epoch, block), sequence) for source, epoch, block, sequence in places
        ], source_b

    def _order(self, number: int) -> BlockOrder:
        name, key = self.source_names[number], self._keys[number]
        blocks, steady = len(self._sources[number].blocks), not key.fim_rate
        return BlockOrder(name, blocks, partial(self._plan, number), steady, self.seed, self._start_blocks[name])

    def _plan(self, number: int, epoch: int) -> np.ndarray:
        key = self._keys[number].at(epoch)
        place = (number, key.epoch)
        if place not in self._plans:
            self._plans[place] = load_plan(self._store, self._sources[number], key)
            if len(self._plans) > PLANS_KEPT * len(self._sources):
                self._plans.popitem(last=False)
        return self._plans[place]

    def _ready_block(self, number: int, epoch: int, block: int) -> ReadyBlock:
        place = (number, epoch, block)
        with self._lock:
            if place in self._ready:
                self._ready.move_to_end(place)
                return self._ready[place]
            listed, first = self._sources[number].blocks[block], int(self._first_documents[number][block])
            documents = self._keys[number].at(epoch).documents(self._store.offsets(listed), first)
            key = key64("documents", self.seed, self.source_names[number], epoch, block)
            packed = pack(documents.length_C, self.length, key)
            planned = int(self._plan(number, epoch)[block])
            if packed.sequences != planned:
                where = self._store.location.shown(listed.index_file)
                raise DataError(f"{where}: packs into {packed.sequences} sequences, the plan has {planned}")
            self._ready[place] = ready = ReadyBlock.of(packed, documents, self._store.tokens(listed), first)
            if len(self._ready) > READY_BLOCKS:
                self._ready.popitem(last=False)
            return ready

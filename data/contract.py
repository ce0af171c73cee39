"""What the token stream promises: the manifest, the plan, step batches with their denominators, and the state.

The stream is a function `(manifest, seed, stage's settings, sample index) -> tokens`. Order, packing, mixture and
fill-in-the-middle never depend on how many ranks read it. Batch metadata (labels, positions, MTP tokens, document ids)
is read by index at every stage that needs it and never travels between stages.

Documents are stored as `BOS + tokens + EOS`. A packed sequence holds whole documents (or pieces of documents longer
than the sequence); position i predicts token i + 1. A label is IGNORE where the next token belongs to another document
or piece, or is padding. MTP depth k (1-based) at position i sees the embedding of token i + k and predicts token
i + k + 1; its label is IGNORE unless both lie in the same document piece as i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.store.names import block_stem

IGNORE = -100
MAX_LENGTH = 1 << 24  # of a sequence; a mistyped one must not ask for all memory
# What a weight may be. No exponents: to work out 1e999999999 takes all memory.
WEIGHT = re.compile(r"(?=[0.]*[1-9])[0-9]{1,20}(\.[0-9]{1,20}|/0{0,19}[1-9][0-9]{0,19})?")
WEIGHT_NEEDED = "a rational above 0 such as 3, 0.25 or 1/3, at most 20 digits a number"


@dataclass(frozen=True)
class Block:
    """A token block: whole documents of one source. Its files are named by the source and the number of the block.

    sha256, index_sha256, ids_sha256: of `file` (uint32 little-endian tokens), `index_file` (document offsets) and
    `ids_file` (identities of the documents; "" where the corpus has none).
    """

    source: str
    number: int
    documents: int
    tokens: int
    sha256: str
    index_sha256: str
    ids_sha256: str = ""

    @property
    def file(self) -> str:
        return f"{block_stem(self.source, self.number)}.bin"

    @property
    def index_file(self) -> str:
        return f"{block_stem(self.source, self.number)}.npy"

    @property
    def ids_file(self) -> str:
        return f"{block_stem(self.source, self.number)}.ids.json"


@dataclass(frozen=True)
class Source:
    """One language or domain of the mixture.

    tokens counts BOS and EOS. text_bytes: UTF-8 bytes of the texts, 0 where they are not known. blocks: in the order of
    their numbers; a `BlockTable` where read from disk. weight: relative share in the mixture where a stage names none,
    a rational ("1/3").
    """

    name: str
    language: str
    documents: int
    tokens: int
    text_bytes: int
    blocks: Sequence[Block]
    weight: str = "1"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a tokenised corpus. digest: sha256 over everything else in it. fim_ids: the tokenizer's begin,
    hole and end for fill-in-the-middle; empty if it has none."""

    version: int
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    sources: tuple[Source, ...]
    digest: str
    fim_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of one step. b sequences of T tokens, D MTP depths; all arrays int64 unless said.

    tokens, labels, positions, documents: [b, T]. positions restart at 0 only at the start of the sequence (V3 has no
    cross-document mask in pre-training); batches of one shape share them: do not write there. documents: number of the
    document within its source, -1 on padding.
    mtp_tokens, mtp_labels: [D, b, T]; mtp_tokens[k - 1, :, i] is tokens[:, i + k], PAD beyond the end. real: [b, T]
    bool, False on padding. source: [b] index into `TokenStream.source_names`.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    mtp_tokens: np.ndarray
    mtp_labels: np.ndarray
    real: np.ndarray
    source: np.ndarray


@dataclass(frozen=True)
class StepCounts:
    """Denominators of a whole step over all ranks and micro-batches, from the index alone.

    main: labels that count. mtp: the same per depth. sequences: for the sequence-wise balance loss. tokens: real
    (unpadded) tokens, which advance the schedules. sources: main labels per source name.
    """

    main: int
    mtp: tuple[int, ...]
    sequences: int
    tokens: int
    sources: dict[str, int] = field(default_factory=dict)


STATE_VERSION = 2


@dataclass(frozen=True)
class StreamState:
    """Position in the stream, the same on every rank, plain JSON, under 2 KB.

    sample: samples served. per_source: samples taken from each source of the manifest, skipped ones included.
    stream_digest: of everything else that fixes the order so far (length, weights, FIM rate, document lengths, starting
    blocks, ranges skipped).
    """

    version: int
    manifest_digest: str
    seed: int
    stage: str
    sample: int
    per_source: list[int]
    stream_digest: str

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> StreamState:
        """The inverse of `asdict`. Error: DataError for another version of the format or a damaged state."""
        if value.get("version") != STATE_VERSION:
            raise DataError(f"stream state has version {value.get('version')}, this program reads {STATE_VERSION}")
        try:
            state = StreamState(**value)
        except TypeError as error:
            raise DataError(f"damaged stream state: {error}") from None
        counts = [state.sample, *state.per_source] if isinstance(state.per_source, list) else [None]
        if any(type(count) is not int or count < 0 for count in counts) or type(state.seed) is not int:
            raise DataError("damaged stream state: sample, per_source and seed must be whole numbers, counts from 0")
        for name in ("manifest_digest", "stage", "stream_digest"):
            if not isinstance(getattr(state, name), str):
                raise DataError(f"damaged stream state: {name} must be text")
        return state


class TokenStream(Protocol):
    """One stage's stream (one sequence length). source_names: all sources of the manifest."""

    source_names: tuple[str, ...]

    def counts(self, first_sample: int, samples: int) -> StepCounts:
        """Denominators of samples [first_sample, first_sample + samples)."""
        ...

    def read(self, samples: list[int]) -> MicroBatch:
        """The given samples as one micro-batch."""
        ...

    def state(self, sample: int) -> StreamState:
        """State after `sample` samples were consumed."""
        ...

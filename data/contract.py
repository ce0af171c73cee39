"""What the token stream promises: the manifest, the plan, step batches with their denominators, and the state.

The stream is a function `(manifest, plan, seed, sample index) -> tokens`. Order, packing and mixture never depend on
how many ranks read it. Batch metadata (labels, positions, MTP tokens, document ids) is read by index at every stage
that needs it and never travels between stages.

Documents are stored as `BOS + tokens + EOS`. A packed sequence holds whole documents (or pieces of documents longer
than the sequence); position i predicts token i + 1. A label is IGNORE where the next token belongs to another document
or piece, or is padding. MTP depth k (1-based) at position i sees the embedding of token i + k and predicts token
i + k + 1; its label is IGNORE unless both lie in the same document piece as i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

IGNORE = -100


@dataclass(frozen=True)
class Block:
    """A token block on disk: `file` (uint32 little-endian tokens), its document offsets, and digests that guard it."""

    file: str
    documents: int
    tokens: int
    sha256: str
    index_file: str
    index_sha256: str


@dataclass(frozen=True)
class Source:
    """One language or domain of the mixture.

    tokens counts BOS and EOS. text_bytes: UTF-8 bytes of the texts. weight: relative share in the mixture where a
    stage names none, a rational ("1/3").
    """

    name: str
    language: str
    documents: int
    tokens: int
    text_bytes: int
    blocks: tuple[Block, ...]
    weight: str = "1"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a tokenised corpus. digest: sha256 over everything else in it."""

    version: int
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    sources: tuple[Source, ...]
    digest: str


@dataclass(frozen=True)
class Plan:
    """Packed sequences per block for one sequence length: `sequences[source name][block]`, blocks in manifest order.

    Counts depend on document lengths alone, so they hold for every seed and epoch.
    """

    manifest_digest: str
    length: int
    sequences: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of one step. b sequences of T tokens, D MTP depths; all arrays int64 unless said.

    tokens, labels, positions, documents: [b, T]. positions restart at 0 only at the start of the sequence (V3 has no
    cross-document mask in pre-training). documents: number of the document within its source, -1 on padding.
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


@dataclass(frozen=True)
class StreamState:
    """Position in the stream, the same on every rank, plain JSON, under 2 KB.

    per_source: samples taken from each. stream_digest: of everything else that fixes the order (length, weights,
    starting blocks).
    """

    manifest_digest: str
    seed: int
    stage: str
    sample: int
    per_source: dict[str, int]
    stream_digest: str = ""


class TokenStream(Protocol):
    """One stage's stream (one sequence length)."""

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

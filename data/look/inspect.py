"""`python -m data inspect`: any sample of the stream, decoded, with its documents, their boundaries and the parts of
fill-in-the-middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from data.contract import IGNORE
from data.errors import UsageError
from data.store.blocks import Identities
from data.stream.batch import ReadyBlock
from data.stream.stream import Stream, open_stream
from data.tokenizer import load_tokenizer

PARTS = ("whole", "prefix", "suffix", "middle")
STYLES = {"whole": "", "prefix": "cyan", "suffix": "magenta", "middle": "green", "special": "reverse", "padding": "dim"}


@dataclass
class InspectConfig:
    """`python -m data inspect`. data: a built corpus. sample: number in the stream. length, seed, weights, fim_rate: of
    the stage, as training gives them. characters: text shown of each document, from both ends; 0 shows all."""

    data: str = "data_cache/demo"
    sample: int = 0
    length: int = 4096
    seed: int = 0
    weights: dict[str, str] = field(default_factory=dict)
    fim_rate: float = 0.0
    characters: int = 400


@dataclass(frozen=True)
class Run:
    """Tokens of one kind in a sequence, [first, end). kind: one of PARTS, or "special"."""

    kind: str
    first: int
    end: int


@dataclass(frozen=True)
class Piece:
    """One document, or a piece of one, in a sequence. number: of the document in its source. copies: documents that it
    stands for, None where that is not known. start: first of the document's tokens as read. place, length: in the
    sequence. document_tokens: as read, with BOS, EOS and FIM. fim: tokens of prefix, suffix and middle, None for a
    document that was not rearranged."""

    number: int
    id: str
    copies: int | None
    start: int
    place: int
    length: int
    document_tokens: int
    fim: tuple[int, int, int] | None
    runs: tuple[Run, ...] = field(default=())


@dataclass(frozen=True)
class Sample:
    """One sequence and where it comes from."""

    source: str
    epoch: int
    block: int
    sequence: int
    sequences: int
    tokens: tuple[int, ...]
    pieces: tuple[Piece, ...]
    labels: int

    @property
    def padding(self) -> int:
        return len(self.tokens) - sum(piece.length for piece in self.pieces)


def read_sample(stream: Stream, number: int) -> Sample:
    """Sample `number`, described. Errors: DataError for damaged data, UsageError for a negative number."""
    if number < 0:
        raise UsageError(f"sample: found {number}, need at least 0")
    source, epoch, block, sequence, ready = stream.place(number)
    batch = stream.read([number])
    identities = stream.identities(source, block)
    pieces, place = [], 0
    for row in ready.pieces(sequence):
        pieces.append(_piece(ready, row, place, identities))
        place += pieces[-1].length
    return Sample(
        stream.source_names[source],
        epoch,
        block,
        sequence,
        ready.packed.sequences,
        tuple(batch.tokens[0].tolist()),
        tuple(pieces),
        int((batch.labels[0] != IGNORE).sum()),
    )


def _piece(ready: ReadyBlock, row: Sequence[int], place: int, identities: Identities | None) -> Piece:
    number, start, length, _, chosen = row
    documents = ready.documents
    read, stored = int(documents.length_C[chosen]), int(documents.stored_C[chosen])
    fim = None
    if documents.fim_C[chosen]:
        first, second = documents.cut_C2[chosen].tolist()
        fim = (first, stored - 2 - second, second - first)
    runs = tuple(
        Run(kind, place + max(a, start) - start, place + min(b, start + length) - start)
        for kind, a, b in document_runs(read, fim)
        if max(a, start) < min(b, start + length)
    )
    name, copies, inside = "", None, number - ready.first_document
    if identities is not None:
        name = identities.id[inside]
        copies = identities.copies[inside] if identities.copies is not None else None
    return Piece(number, name, copies, start, place, length, read, fim, runs)


def document_runs(length: int, fim: tuple[int, int, int] | None) -> list[tuple[str, int, int]]:
    """(kind, first, end) of the runs of a document as read: BOS, content or the parts of FIM with its three tokens,
    EOS."""
    if fim is None:
        inner = [("whole", 1, length - 1)]
    else:
        prefix, suffix, middle = fim
        hole, end = 2 + prefix, 3 + prefix + suffix
        inner = [("special", 1, 2), ("prefix", 2, hole), ("special", hole, hole + 1), ("suffix", hole + 1, end)]
        inner += [("special", end, end + 1), ("middle", end + 1, end + 1 + middle)]
    return [("special", 0, 1), *inner, ("special", length - 1, length)]


def inspect(config: InspectConfig, console: Console) -> dict[str, Any]:
    """Print one sample; returns it as JSON gives it. Errors: UsageError, DataError."""
    if config.characters < 0:
        raise UsageError(f"characters: found {config.characters}, need at least 0")
    stream = open_stream(
        config.data,
        config.length,
        mtp_depth=0,
        seed=config.seed,
        stage="inspect",
        weights=config.weights or None,
        fim_rate=config.fim_rate,
        verify=False,
    )
    sample = read_sample(stream, config.sample)
    tokenizer = load_tokenizer(Path(config.data), stream.manifest.tokenizer_sha256)
    console.print(
        f"sample {config.sample}: source {sample.source}, epoch {sample.epoch}, block {sample.block}, sequence "
        f"{sample.sequence} of {sample.sequences}; {len(sample.tokens):,} tokens, {sample.labels:,} labels, "
        f"{sample.padding:,} of padding"
    )
    console.print(_table(sample))
    for piece in sample.pieces:
        console.print(_text(sample, piece, tokenizer, config.characters))
    if sample.padding:
        console.print(Text(f"[{sample.padding} x padding]", style=STYLES["padding"]))
    shown = [
        {
            "id": p.id,
            "document": p.number,
            "copies": p.copies,
            "at": p.place,
            "tokens": p.length,
            "start": p.start,
            "fim": p.fim,
        }
        for p in sample.pieces
    ]
    return {
        "sample": config.sample,
        "source": sample.source,
        "epoch": sample.epoch,
        "block": sample.block,
        "sequence": sample.sequence,
        "documents": shown,
        "labels": sample.labels,
        "padding": sample.padding,
    }


def _table(sample: Sample) -> Table:
    table = Table(title="documents of the sequence")
    for column in ("id", "copies", "at", "tokens", "of the document", "prefix / suffix / middle"):
        table.add_column(column, justify="left" if column == "id" else "right")
    for piece in sample.pieces:
        whole = piece.length == piece.document_tokens
        part = "whole" if whole else f"{piece.start:,}-{piece.start + piece.length:,} of {piece.document_tokens:,}"
        fim = " / ".join(f"{count:,}" for count in piece.fim) if piece.fim else ""
        name = piece.id or f"document {piece.number}"
        copies = "" if piece.copies is None else f"{piece.copies:,}"
        table.add_row(Text(name), copies, f"{piece.place:,}", f"{piece.length:,}", part, fim)
    return table


def _text(sample: Sample, piece: Piece, tokenizer: Tokenizer, characters: int) -> Text:
    out = Text()
    for run in piece.runs:
        ids = list(sample.tokens[run.first : run.end])
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if run.kind != "special" and characters and len(text) > 2 * characters:
            text = f"{text[:characters]} [... {len(text) - 2 * characters:,} characters ...] {text[-characters:]}"
        out.append(text, style=STYLES[run.kind])
    return out

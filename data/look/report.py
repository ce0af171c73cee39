"""`python -m data report`: one page on a built corpus, for people to look at before they train on it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from data.baselines import heldout_documents, heldout_languages
from data.contract import Manifest
from data.errors import DataError
from data.fertility import compare
from data.look.figures import copies_figure, fertility_figure, lengths_figure, shares_figure, steps_figure
from data.look.html import Picture, html_page, picture_section, table_section
from data.publish import make_directory, write_file
from data.store.blocks import BlockStore
from data.store.manifest import load_manifest
from data.tokenizer import load_tokenizer

REPORT_FILE = "report.json"
EXAMPLES_FILE, REMOVED_FILE = "dedup/examples.json", "dedup/removed.parquet"
# The corpus's own tokenizer in the comparison.
OURS = "this corpus"
EXAMPLES = 8
MOST_CURVES = 6
STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin: 8px 0 18px; font-size: 13px; }
.pair div { border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
mark { background: #fde0c5; }
"""


@dataclass
class ReportConfig:
    """`python -m data report`. data: a built corpus. out: directory of the page, `data`/report if empty. tokenizers:
    name -> folder (or tokenizer.json) to compare fertility with."""

    data: str = "data_cache/demo"
    out: str = ""
    tokenizers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """What the page is made of. length_D: tokens of each document, by source. removed: the copies, one row each.
    examples: some of them, with the place where the texts differ."""

    manifest: Manifest
    report: dict[str, Any]
    length_D: dict[str, np.ndarray]
    fertility: dict[str, dict[str, dict[str, float]]]
    removed: pa.Table
    examples: list[dict[str, Any]]


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page and its pictures; returns the figures. Errors: DataError, CannotWriteError."""
    directory = Path(config.data)
    out = Path(config.out) if config.out else directory / "report"
    corpus = read_corpus(directory, {name: Path(folder) for name, folder in config.tokenizers.items()})
    pictures = draw(corpus)
    make_directory(out)
    for picture in pictures:
        write_file(out / f"{picture.name}.png", picture.png)
    write_file(out / "index.html", page(directory.name, corpus, pictures).encode())
    return {
        "page": str(out / "index.html"),
        "pictures": [picture.name for picture in pictures],
        "sources": {s.name: {"documents": s.documents, "tokens": s.tokens} for s in corpus.manifest.sources},
        "fertility": corpus.fertility,
    }


def read_corpus(directory: Path, tokenizers: Mapping[str, Path]) -> Corpus:
    """Errors: DataError for a corpus that is none, or tokenizers that cannot be read."""
    manifest = load_manifest(directory)
    load_tokenizer(directory, manifest.tokenizer_sha256)
    store = BlockStore(directory, manifest)
    lengths = {
        source.name: np.concatenate([np.diff(store.offsets(block)) for block in source.blocks])
        for source in manifest.sources
    }
    told, examples = _json(directory / REPORT_FILE), _json(directory / EXAMPLES_FILE)
    if not isinstance(told, dict) or not {"steps", "languages", "plan_lengths", "dropped"} <= set(told):
        raise DataError(f"{directory / REPORT_FILE}: not as a build of this version leaves it; build it again")
    shown = {"kind", "removed", "kept", "jaccard", "difference"}
    if not isinstance(examples, list) or not all(isinstance(one, dict) and shown <= set(one) for one in examples):
        raise DataError(f"{directory / EXAMPLES_FILE}: not as a build of this version leaves it; build it again")
    try:
        removed = pq.read_table(directory / REMOVED_FILE)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{directory / REMOVED_FILE}: cannot read what was removed: {error}") from None
    texts = {
        language: [document.text for document in heldout_documents(directory, language)]
        for language in heldout_languages(directory)
    }
    return Corpus(manifest, told, lengths, compare({OURS: directory, **tokenizers}, texts), removed, examples)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read what the build left: {error}") from None


def groups_of_copies(removed: pa.Table) -> dict[int, int]:
    """Size of a group of copies, the one that stays included -> groups."""
    if not len(removed):
        return {}
    sizes = removed.group_by(["kept_source", "kept_id"]).aggregate([("id", "count")])["id_count"].to_numpy() + 1
    return {int(size): int(count) for size, count in zip(*np.unique(sizes, return_counts=True), strict=True)}


def draw(corpus: Corpus) -> list[Picture]:
    """The pictures there is something to show for."""
    told, plans = corpus.report, corpus.report["plan_lengths"]
    found = [
        Picture(
            "Languages",
            "Of the text that was read, of what is left of it, of its tokens, and of the samples that training draws "
            "where a stage names no weights.",
            "languages",
            _png(shares_figure(language_shares(corpus))),
        ),
        Picture(
            "What each step kept",
            "Text left after each step of the build, by language; the documents dropped are listed below.",
            "steps",
            _png(steps_figure(told["steps"])),
        ),
        Picture(
            "Lengths of documents",
            "Dotted: the sequence lengths that were planned for; documents to the right of one are cut at it.",
            "lengths",
            _png(lengths_figure(curves(corpus), plans)),
        ),
        Picture(
            "Fertility",
            "Held-out text in bytes per token: what this corpus's tokenizer makes of it, beside others.",
            "fertility",
            _png(fertility_figure(corpus.fertility)),
        ),
    ]
    if len(corpus.removed):
        alike = corpus.removed["jaccard"].drop_null().to_pylist()
        text = "Groups of copies of which one was kept, and how alike pairs are; far below the threshold is a fault."
        picture = copies_figure(groups_of_copies(corpus.removed), alike)
        found.insert(3, Picture("Copies", text, "copies", _png(picture)))
    return found


def language_shares(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Bytes, tokens and weights by language. A source counts for the language it was declared to have."""
    told = corpus.report
    read = next(iter(told["steps"].values()))
    weights: dict[str, float] = {}
    for source in corpus.manifest.sources:
        weights[source.language] = weights.get(source.language, 0.0) + float(Fraction(source.weight))
    return {
        "text read": {language: row["bytes"] for language, row in read.items()},
        "text kept": {language: row["bytes"] for language, row in told["languages"].items()},
        "tokens": {language: row["tokens"] for language, row in told["languages"].items()},
        "samples": weights,
    }


def curves(corpus: Corpus) -> dict[str, np.ndarray]:
    """Lengths by source, or by language where there are more sources than a picture can tell apart."""
    sources = corpus.manifest.sources
    if len(sources) <= MOST_CURVES:
        return corpus.length_D
    languages = sorted({source.language for source in sources})
    return {
        language: np.concatenate([corpus.length_D[s.name] for s in sources if s.language == language])
        for language in languages
    }


def page(name: str, corpus: Corpus, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    told, manifest = corpus.report, corpus.manifest
    tokens = sum(source.tokens for source in manifest.sources)
    head = (
        f'<h1>Corpus {escape(name)} <span class="faint">{tokens:,} tokens, manifest {manifest.digest[:12]}, '
        f"tokenizer {manifest.tokenizer_sha256[:12]}</span></h1>"
    )
    shares = table_section(
        "Sources",
        "Weight is the share of samples a source gives where a stage names none.",
        ("source", "language", "weight", "documents", "tokens", "share of tokens", "blocks"),
        [
            (s.name, s.language, s.weight, s.documents, s.tokens, f"{100 * s.tokens / tokens:.1f} %", len(s.blocks))
            for s in manifest.sources
        ],
    )
    sections = [head, shares, *(picture_section(picture) for picture in pictures)]
    sections += change_tables(told)
    sections += examples(corpus.examples)
    return html_page(f"Corpus {name}", STYLE, sections)


def change_tables(told: Mapping[str, Any]) -> list[str]:
    """Documents dropped by step, language and, where a step gives them, reason; documents repeated."""
    rows = [
        (step, language, counts["dropped_documents"], round(counts["dropped_bytes"] / 1e6, 3))
        for step, row in told["steps"].items()
        for language, counts in row.items()
        if counts["dropped_documents"] or counts["dropped_bytes"]
    ]
    tables = [table_section("Dropped", "By step.", ("step", "language", "documents", "MB"), rows)] if rows else []
    reasons = [
        (reason, language, documents, round(size / 1e6, 3))
        for reason, row in told["dropped"].items()
        for language, (documents, size) in row.items()
    ]
    if reasons:
        text = "By the first rule that a document broke."
        tables.append(table_section("Reasons", text, ("rule", "language", "documents", "MB"), sorted(reasons)))
    added = ("repeated_documents", "added_documents", "added_tokens")
    repeated = [
        (language, *(row[key] for key in added))
        for language, row in told["languages"].items()
        if row["repeated_documents"]
    ]
    if repeated:
        text = "Documents that stand for many copies, stored more than once."
        tables.append(table_section("Repeated", text, ("language", "documents", "added", "tokens added"), repeated))
    return tables


def examples(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Removed documents beside the ones that were kept, where they first differ."""
    if not found:
        return []
    out = ["<h2>Removed beside kept</h2>"]
    for example in found[:EXAMPLES]:
        removed, kept = (" ".join(example[key]) for key in ("removed", "kept"))
        alike = "" if example["jaccard"] is None else f", Jaccard {example['jaccard']:.2f}"
        out.append(
            f'<p class="faint">{escape(example["kind"])}: {escape(removed)}, a copy of {escape(kept)}{alike}</p>'
        )
        shown = example["difference"]
        sides = (
            f"<div>{escape(shown['before'])}<mark>{escape(shown[side])}</mark>{escape(shown['after'])}</div>"
            for side in ("removed", "kept")
        )
        out.append(f'<div class="pair">{"".join(sides)}</div>')
    return out


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

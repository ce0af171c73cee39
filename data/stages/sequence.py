"""The stages of a build in order, and what each hands to the next."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.config import DataConfig, parse_weight
from data.contract import Manifest
from data.dedup.resolve import EXACT, NEAR, OLD
from data.ledger import Ledger
from data.stages.cleaning import Reasons, clean_shards, left_by_step, reasons
from data.stages.decontaminating import drop_contaminated
from data.stages.deduplicating import Deduplicated, remove_duplicates
from data.stages.importing import Inventory, import_sources
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import total
from data.stages.shuffling import shuffle_documents
from data.stages.splitting import hold_out
from data.stages.storing import lay_out, make_manifest, make_plans
from data.stages.tokenising import TokeniseSettings, repetitions, tokenise_shards
from data.stages.tokenizer_training import make_tokenizer
from data.tokenizer import CONFIG_FILE, TOKENIZER_FILE

STORE = "store"
Shards = dict[str, list[Done]]


@dataclass
class Corpus:
    """A build on its way. Shards are those of each source after the last stage run; ledger: what each step left.
    decontaminated: files of that stage for the corpus, by name: path.
    """

    config: DataConfig
    runner: Runner
    inventory: Inventory
    ledger: Ledger = field(default_factory=Ledger)
    shards: Shards = field(default_factory=dict)
    heldout: list[Done] = field(default_factory=list)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: Reasons = field(default_factory=dict)
    edited: Reasons = field(default_factory=dict)
    decontaminated: dict[str, str] = field(default_factory=dict)
    dedup: Deduplicated | None = None
    tokenizer: Done | None = None
    blocks: Shards = field(default_factory=dict)
    manifest: Manifest | None = None
    files: dict[str, str] = field(default_factory=dict)
    plans: list[Done] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Fraction]:
        return {name: parse_weight(source.weight, name) for name, source in self.config.sources.items()}

    @property
    def languages(self) -> dict[str, str]:
        return {name: source.language for name, source in self.config.sources.items()}

    @property
    def store(self) -> Path:
        """The corpus before it is published."""
        return self.runner.work / STORE

    def counts(self) -> list[dict[str, Any]]:
        """Counts of all shards."""
        return [part.counts for parts in self.shards.values() for part in parts]


def run_import(corpus: Corpus) -> None:
    config = corpus.config
    corpus.shards = import_sources(corpus.runner, config.sources, corpus.inventory, config.engine.shard_bytes)
    for name, parts in corpus.shards.items():
        counts: Counter[str] = Counter()
        for part in parts:
            counts.update(part.counts["skipped"])
        if counts:
            corpus.skipped[name] = dict(sorted(counts.items()))


def run_clean(corpus: Corpus) -> None:
    corpus.shards = clean_shards(corpus.runner, corpus.shards, corpus.config.clean.config())
    corpus.dropped, corpus.edited = (reasons(corpus.counts(), key) for key in ("dropped", "edited"))
    # Noted now and not at import: a source that declares no language has one only since it was looked at.
    for step, left in left_by_step(corpus.counts()):
        corpus.ledger.record(step, left)


def run_decontaminate(corpus: Corpus) -> None:
    if not corpus.config.decontaminate.paths:
        return
    found = drop_contaminated(corpus.runner, corpus.shards, corpus.config.decontaminate)
    corpus.shards, corpus.decontaminated = found.shards, found.files
    corpus.ledger.record("benchmarks", total(corpus.counts()))


def run_dedup(corpus: Corpus) -> None:
    dumps = {name: source.dump for name, source in corpus.config.sources.items()}
    found = remove_duplicates(corpus.runner, corpus.shards, corpus.config.dedup, dumps)
    corpus.shards, corpus.dedup = found.shards, found
    corpus.ledger.record("exact dedup", found.left[EXACT])
    corpus.ledger.record("near dedup", found.left[NEAR])
    if corpus.config.dedup.earlier:
        corpus.ledger.record("earlier corpus", found.left[OLD])


def run_split(corpus: Corpus) -> None:
    config = corpus.config
    corpus.shards, corpus.heldout = hold_out(
        corpus.runner, corpus.shards, config.heldout_share, config.seed, corpus.languages
    )
    corpus.ledger.record("held out", total(corpus.counts()))


def run_tokenizer(corpus: Corpus) -> None:
    config = corpus.config
    corpus.tokenizer = make_tokenizer(corpus.runner, corpus.shards, corpus.weights, config.tokenizer, config.seed)


def run_tokenise(corpus: Corpus) -> None:
    assert corpus.tokenizer is not None
    config = corpus.config
    upsample = tuple(sorted(config.dedup.upsample.items()))
    settings = TokeniseSettings(config.seed, config.tokenizer.encoder, config.tokenizer.boundary_split, upsample)
    corpus.shards = tokenise_shards(corpus.runner, corpus.shards, corpus.tokenizer, settings)
    if upsample:
        added = {language: more[1:3] for language, more in repetitions(corpus.counts()).items()}
        corpus.ledger.record("upsampled", total(corpus.counts()), added)
    for chosen in sorted({part.counts["encoder"] for parts in corpus.shards.values() for part in parts}):
        corpus.runner.progress.console.print(f"encoder: {chosen}", highlight=False)


def run_shuffle(corpus: Corpus) -> None:
    store = corpus.config.store
    corpus.blocks = shuffle_documents(corpus.runner, corpus.shards, store.block_tokens, store.partition_documents)


def run_plan(corpus: Corpus) -> None:
    assert corpus.tokenizer is not None and corpus.dedup is not None
    manifest = make_manifest(corpus.blocks, corpus.shards, corpus.tokenizer, corpus.languages, corpus.weights)
    corpus.manifest = manifest
    files = {f"heldout/{done.name}.jsonl": done.file(f"{done.name}.jsonl") for done in corpus.heldout}
    files |= (
        {name: corpus.tokenizer.file(name) for name in (TOKENIZER_FILE, CONFIG_FILE)}
        | corpus.dedup.files
        | corpus.decontaminated
    )
    lay_out(corpus.store, manifest, corpus.blocks, files)
    corpus.files = {name: corpus.runner.digest(path) for name, path in files.items()}
    corpus.plans = make_plans(corpus.runner, corpus.store, manifest, corpus.config.store.plan_lengths)
    corpus.files |= {name: sha256 for done in corpus.plans for name, (_, sha256) in done.outputs.items()}


STAGES: dict[str, Callable[[Corpus], None]] = {
    "import": run_import,
    "clean": run_clean,
    "decontaminate": run_decontaminate,
    "dedup": run_dedup,
    "split": run_split,
    "tokenizer": run_tokenizer,
    "tokenise": run_tokenise,
    "shuffle": run_shuffle,
    "plan": run_plan,
}


def report(corpus: Corpus) -> dict[str, Any]:
    """What is said of a finished build, written beside it as report.json."""
    assert corpus.manifest is not None and corpus.tokenizer is not None and corpus.dedup is not None
    near = [example for example in corpus.dedup.examples if example["kind"] == NEAR]
    counts = total([done.counts for done in corpus.heldout], "heldout")
    return {
        "manifest_digest": corpus.manifest.digest,
        "tokenizer_sha256": corpus.manifest.tokenizer_sha256,
        "vocabulary": corpus.tokenizer.counts["vocabulary"],
        "vocabulary_padded": corpus.manifest.vocab_size,
        "skipped": corpus.skipped,
        "dropped": corpus.dropped,
        "edited": corpus.edited,
        "steps": corpus.ledger.steps,
        "dedup": corpus.dedup.counts,
        "near_duplicates": [
            {"source": pair["removed"][0], "removed": pair["removed"][1], "kept": pair["kept"][1]} for pair in near
        ],
        "languages": {
            language: _summary(corpus, language, counts.get(language, [0, 0])) for language in total(corpus.counts())
        },
        "mixture": {source.name: source.weight for source in corpus.manifest.sources},
        "plan_lengths": list(corpus.config.store.plan_lengths),
        "files": corpus.files,
    }


def _summary(corpus: Corpus, language: str, heldout: list[int]) -> dict[str, Any]:
    documents, size = total(corpus.counts())[language]
    tokens = sum(count["tokens"].get(language, 0) for count in corpus.counts())
    rows = [row[language] for row in corpus.ledger.steps.values()]
    dropped = {step: row[language]["dropped_documents"] for step, row in corpus.ledger.steps.items()}
    repeated, added, _, added_tokens = repetitions(corpus.counts()).get(language, [0, 0, 0, 0])
    if rows[0]["documents"] + added != documents + sum(dropped.values()):
        raise AssertionError(f"{language}: documents kept and dropped do not add up: {rows}")
    holding = [name for name, parts in corpus.shards.items() if language in total([part.counts for part in parts])]
    return {
        "documents_read": rows[0]["documents"],
        "exact_duplicates": dropped["exact dedup"],
        "near_duplicates": dropped["near dedup"],
        "heldout_documents": heldout[0],
        "heldout_bytes": heldout[1],
        "repeated_documents": repeated,
        "added_documents": added,
        "added_tokens": added_tokens,
        "documents": documents,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / (tokens - 2 * documents),
        "blocks": sum(len(corpus.blocks[name]) for name in holding),
    }


def report_json(content: dict[str, Any]) -> bytes:
    """Content of report.json."""
    return json.dumps(content, ensure_ascii=False, indent=1).encode()

"""Dedup: the documents of all shards to those of which no copy stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import DedupConfig
from data.dedup.minhash import MinHash
from data.dedup.resolve import EXACT, NEAR, OLD
from data.dedup.settings import DedupSettings
from data.dedup.stages import deduplicate
from data.stages.contract import Counts
from data.stages.marker import Done
from data.stages.runner import Runner
from data.stages.shards import SHARD_FILE, Totals, add

INDEX = "index"
KINDS = (EXACT, NEAR, OLD)


@dataclass(frozen=True)
class Deduplicated:
    """shards: of survivors, one for each given. left: totals after each kind of copy was removed. examples: pairs side
    by side. files: for the corpus, by name: path. counts: of the whole.
    """

    shards: dict[str, list[Done]]
    left: dict[str, Totals]
    examples: list[dict[str, Any]]
    files: dict[str, str]
    counts: Counts


def remove_duplicates(
    runner: Runner, shards: Mapping[str, list[Done]], config: DedupConfig, dumps: Mapping[str, str]
) -> Deduplicated:
    """Run all stages of dedup. dumps: of each source, "" where it has the source's name."""
    parts = [(name, part) for name, group in shards.items() for part in group]
    settings = DedupSettings(
        MinHash(config.shingle, config.bands, config.rows, config.seed),
        config.threshold,
        config.scope,
        tuple((name, dump) for name, dump in dumps.items() if dump),
    )
    kept: list[Done] = []

    def run(stage: str, *arguments: Any) -> list[Done]:
        done = runner.run(stage, *arguments)
        if stage == "dedup/remove":
            kept.extend(done)
        return done

    earlier = Path(config.earlier) if config.earlier else None
    found = deduplicate(run, [part.file(SHARD_FILE) for _, part in parts], settings, earlier)
    by_source: dict[str, list[Done]] = {name: [] for name in shards}
    for (name, _), done in zip(parts, kept, strict=True):
        by_source[name].append(done)
    left: dict[str, Totals] = {}
    for number, kind in enumerate(KINDS):
        left[kind] = {}
        for done in kept:
            add(left[kind], done.counts["documents"])
            for later in KINDS[number + 1 :]:
                add(left[kind], done.counts["removed"][later])
    files = {f"dedup/{Path(path).name}": path for path in (found.removed, found.examples)}
    if config.keep_index:
        files |= {f"dedup/{INDEX}/{Path(path).name}": path for path in found.index}
    examples = json.loads(Path(found.examples).read_bytes())
    return Deduplicated(by_source, left, examples, files, found.counts)

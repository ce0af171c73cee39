"""A small bilingual corpus that every process takes for English and Chinese, and the configuration of its build."""

from __future__ import annotations

import random
from pathlib import Path

from data.config import DataConfig, DedupConfig, EngineConfig, SourceConfig, StoreConfig, TokenizerConfig
from data.documents import Document
from tests.data.synthetic import chinese, edited

WORDS = """the of and to in a is that for it was on are as with they be at this have from or one had by but not what all
were we when your can said there use an each which she do how their if will up other about out many then them these so
some her would make like him into time has look two more write go see number no way could people my than first water
been call who oil its now find long down day did get come made may part over new sound take only little work know place
year live me back give most very after thing our just name good sentence man think say great where help through much
before line right too mean old any same tell boy follow came want show also around form three small set put end does
another well large must big even such because turn here why ask went men read need land different home us move try
kind hand picture again change off play spell air away animal house point page letter mother answer found study still
learn should america world high every near add food between own below country plant last school father keep tree never
start city earth eye light thought head under story saw left don't few while along might close something seem next
hard open example begin life always those both paper together got group often run""".split()


def documents(seed: int = 3, bases: int = 40) -> list[Document]:
    """Two languages; of each fifth document an exact copy and one with 2 % of its units changed."""
    rng = random.Random(seed)
    found = []
    for language in ("en", "zh"):
        for number in range(bases):
            units = chinese(rng, 250) if language == "zh" else [f"{word} " for word in rng.choices(WORDS, k=120)]
            found.append(Document(f"{number}", "".join(units), language, language))
            if number % 5 == 0:
                found.append(Document(f"{number}/same", "".join(units), language, language))
                found.append(Document(f"{number}/near", "".join(edited(rng, units, 0.02)), language, language))
    return found


def settings(out: Path, paths: dict[str, list[Path]], workers: int = 1, shard_bytes: int = 10_000) -> DataConfig:
    """The build of `paths` (by language) into `out`."""
    sources = {
        language: SourceConfig(language=language, paths=[str(path) for path in files])
        for language, files in paths.items()
    }
    return DataConfig(
        out=str(out),
        sources=sources,
        heldout_share=0.1,
        dedup=DedupConfig(bands=8, rows=2),  # misses no copy at any seed
        tokenizer=TokenizerConfig(vocab_size=400),
        store=StoreConfig(block_tokens=3000, plan_lengths=[64], partition_documents=20),
        engine=EngineConfig(workers=workers, shard_bytes=shard_bytes),
    )

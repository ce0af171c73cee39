"""Configuration of the data room: what `python -m data` is told. One dataclass per subject; YAML in conf/data fills
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from omegaconf import MISSING

from data.errors import UsageError

MAX_WEIGHT_PERIOD = 100_000
SPECIAL_TOKENS = 6
BYTES = 256


@dataclass
class FetchConfig:
    """`python -m data fetch`. out: directory for what is fetched. wheels: cache of downloads, `out`/wheels if empty.
    cap_bytes: English text kept of the demo's corpus. corpus: demo, standard or tokenizers.
    """

    out: str = "data_cache/raw"
    wheels: str = ""
    cap_bytes: int = 1_800_000
    corpus: str = "demo"


@dataclass
class SourceConfig:
    """One source of the mixture. path: jsonl file. language: ISO 639-1; documents found to be in another are dropped.

    weight: share in the mixture relative to the other sources, a rational written as 3, 0.25 or 1/3.
    """

    path: str = MISSING
    language: str = MISSING
    weight: str = "1"


@dataclass
class DedupConfig:
    """MinHash near-dedup: `bands` x `rows` hashes of `shingle`-token shingles, pairs verified at exact Jaccard >=
    threshold (0: not verified).
    """

    shingle: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.7
    seed: int = 1


@dataclass
class TokenizerConfig:
    """Byte-level BPE. vocab_size: entries, special tokens included; the model's vocabulary is this padded to a
    multiple of 128.

    han_run: longest run of Han or kana seen as one piece in training. sample_bytes: bound of the training sample,
    shared out by mixture weight.
    """

    vocab_size: int = 8192
    min_frequency: int = 2
    max_token_length: int = 64
    han_run: int = 8
    sample_bytes: int = 200_000_000


@dataclass
class DataConfig:
    """`python -m data build`. raw: where `fetch` wrote. out: the directory to make. heldout_share: of documents, per
    language.

    block_tokens: aimed size of a block. plan_lengths: sequence lengths whose packing plans are written beforehand.
    """

    raw: str = "data_cache/raw"
    out: str = MISSING
    seed: int = 17
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    heldout_share: float = 0.04
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    block_tokens: int = 131_072
    plan_lengths: list[int] = field(default_factory=lambda: [128, 1024, 4096])


@dataclass
class BaselinesConfig:
    """`python -m data baselines`. data: a directory made by `build`."""

    data: str = "data_cache/demo"


def parse_weight(text: str, where: str) -> Fraction:
    """A positive rational. `where` names the key in the error (UsageError)."""
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{where}: found '{text}', need a rational such as 3, 0.25 or 1/3") from None
    if weight <= 0:
        raise UsageError(f"{where}: found {text}, need more than 0")
    return weight


def validate(config: DataConfig) -> None:
    """Refuse values that cannot work, all problems in one line (UsageError)."""
    problems = []
    smallest = SPECIAL_TOKENS + BYTES
    checks: list[tuple[str, float, float, float]] = [
        ("dedup.shingle", config.dedup.shingle, 1, 64),
        ("dedup.bands", config.dedup.bands, 1, 1024),
        ("dedup.rows", config.dedup.rows, 1, 64),
        ("dedup.threshold", config.dedup.threshold, 0.0, 1.0),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, smallest, 2**31),
        ("tokenizer.min_frequency", config.tokenizer.min_frequency, 1, 2**31),
        ("tokenizer.max_token_length", config.tokenizer.max_token_length, 2, 2**31),
        ("tokenizer.han_run", config.tokenizer.han_run, 1, 2**31),
        ("tokenizer.sample_bytes", config.tokenizer.sample_bytes, 1, 2**62),
        ("block_tokens", config.block_tokens, 1, 2**31),
        *((f"plan_lengths.{i}", length, 2, 2**31) for i, length in enumerate(config.plan_lengths)),
    ]
    problems += [
        f"{key}: found {found}, allowed {low} to {high}" for key, found, low, high in checks if not low <= found <= high
    ]
    if not 0 < config.heldout_share < 1:
        problems.append(f"heldout_share: found {config.heldout_share}, need more than 0 and less than 1")
    if not config.sources:
        problems.append("sources: none given")
    for name, source in config.sources.items():
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            problems.append(f"sources: name '{name}' may hold only letters, digits, - and _")
        if not source.language.isalnum():
            problems.append(f"sources.{name}.language: found '{source.language}', need a code such as en")
        parse_weight(source.weight, f"sources.{name}.weight")
    if problems:
        raise UsageError("; ".join(problems))

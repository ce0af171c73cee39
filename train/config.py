"""The run's configuration: the schema that the YAML groups in `conf/` fill. Everything that advances is counted in
tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from kernels.backends import KernelsConfig
from model.balance import BalanceWeights
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig


@dataclass
class PrecisionConfig:
    """compute: `bfloat16`, `float32` or `float64`. fp8: DeepSeek's FP8 recipe for the linears (V3 section 3.3).
    recompute: RMSNorm, MLA's up-projections and SwiGLU are computed again in the backward (section 3.2.3); false keeps
    their results. The same numbers either way."""

    compute: str = "bfloat16"
    fp8: bool = False
    recompute: bool = True


@dataclass
class Ramp:
    """From the piece before (or token 0) to `until` tokens of the stage: `linear` or `cosine` from `start` to `end`,
    or `constant` at `start`. The last piece holds on after its end."""

    until: int = MISSING
    shape: str = "constant"
    start: float = MISSING
    end: float = 0.0


@dataclass
class StepValue:
    """`value` up to `until` tokens of the stage; the last one holds on."""

    until: int = MISSING
    value: float = MISSING


@dataclass
class DocumentLengths:
    """Documents of a source that a stage reads: stored tokens, BOS and EOS included."""

    shortest: int = 0
    longest: int = 2**31 - 1


@dataclass
class SampleRange:
    """Samples [first, end) of a stage, numbered as if nothing were skipped."""

    first: int = MISSING
    end: int = MISSING


@dataclass
class StageConfig:
    """One stage of the run. length: tokens of a sequence (YaRN is on when it exceeds
    model.rope_scaling.original_length).

    tokens: real tokens the stage trains on. sequences: sequences per step, by tokens. micro_batch: sequences of a
    micro-batch. learning_rate; mtp_weight (lambda); bias_update (gamma of the router bias): by tokens.
    balance: weights of the balance losses. weights: mixture weight (a rational) per source; empty means
    data.weights. documents: by source, which of its documents are read, for stages of long sequences. skip: samples
    that are never served.
    """

    name: str = MISSING
    length: int = MISSING
    tokens: int = MISSING
    micro_batch: int = 1
    sequences: list[StepValue] = field(default_factory=list)
    learning_rate: list[Ramp] = field(default_factory=list)
    mtp_weight: list[StepValue] = field(default_factory=list)
    bias_update: list[StepValue] = field(default_factory=list)
    balance: BalanceWeights = field(default_factory=lambda: BalanceWeights(sequence=0.0001))
    weights: dict[str, str] = field(default_factory=dict)
    documents: dict[str, DocumentLengths] = field(default_factory=dict)
    skip: list[SampleRange] = field(default_factory=list)


@dataclass
class DataConfig:
    """directory: a corpus built by `python -m data build`, or the URL of one. weights: mixture weight (a rational) per
    source; empty means the corpus's own. fim_rate: share of documents rearranged for fill-in-the-middle.

    verify: read the whole corpus once at the start and compare its digests; false compares each block when it is first
    read. cache: directory in which a corpus at a URL is kept, at most cache_bytes of it.
    """

    directory: str = MISSING
    weights: dict[str, str] = field(default_factory=dict)
    fim_rate: float = 0.0
    verify: bool = True
    cache: str = ""
    cache_bytes: int = 64 * 2**30


@dataclass
class CheckpointConfig:
    """every: steps between checkpoints (0: only at the end of a stage). keep: newest ones kept beside the stages'
    ends."""

    every: int = 100
    keep: int = 3


@dataclass
class LoggingConfig:
    """wandb: `offline`, `online` or `disabled`. timeline_step: step of each stage whose pipeline is recorded for the
    report. audit_step: step of the first stage whose products are recorded in audit.json (0: none). trace_steps: steps
    of the run whose actions, communications and waits every rank writes to trace/ (see docs/tracing.md)."""

    wandb: str = "offline"
    project: str = "bireme"
    console: bool = True
    timeline_step: int = 5
    audit_step: int = 0
    trace_steps: list[int] = field(default_factory=list)


@dataclass
class RunConfig:
    """A run. root/name is its directory: made of names, never of the clock.

    initial_weights: a Hugging Face folder of exactly this model, which the first stage starts from; empty: fresh values
    by `seed`. A run that resumes does not look at it.
    """

    name: str = MISSING
    root: str = "runs"
    seed: int = 1234
    resume: str = "auto"
    initial_weights: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[StageConfig] = field(default_factory=list)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

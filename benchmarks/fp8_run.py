"""One training run of the FP8 loss study: what it is made of, its steps, and the file its losses are kept in."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fp8_variants import quantised_as
from data.contract import IGNORE
from data.store.manifest import load_manifest
from data.stream.stream import open_stream
from parallel.config import ParallelConfig
from train.checkpoint import Checkpoint, save_checkpoint
from train.checkpoint_format import step_name
from train.compose import compose_run
from train.config import RunConfig
from train.engine import Engine, StepPlan
from train.errors import CannotWriteError, ConfigError
from train.run_checkpoints import restore

# The recipe's name here and in `fp8_variants.FORMATS`; BF16 has no quantiser.
VARIANTS = {"bf16": None, "fp8": "recipe", "e4m1": "e4m1", "per_tensor": "per_tensor"}
# The run in BF16 that every variant of its seed goes on from.
START = "start"
WARM_UP, LAST_RATE, BIAS_UPDATE = 0.05, 0.02, 0.003


@dataclass(frozen=True)
class Run:
    """One variant with one seed. tokens: of a step; length: of a sequence; rate: the largest learning rate. start:
    steps of the run in BF16 that it goes on from, weights and moments and data; 0: from fresh weights. distinct: how
    many sequences are read before they come again; 0: as many as the corpus has.

    Runs of one seed start from the same weights and read the same data in the same order.
    """

    variant: str
    seed: int
    corpus: str
    steps: int
    tokens: int
    length: int
    rate: float
    start: int = 0
    distinct: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    def config(self) -> RunConfig:
        """Raises ConfigError."""
        return compose_run(["experiment=demo", "model=study", f"data.directory={self.corpus}", *self.overrides])

    def settings(self) -> dict[str, Any]:
        """All that its losses depend on, as JSON gives it back. Raises ConfigError, DataError."""
        config = self.config()
        own = {key: value for key, value in asdict(self).items() if key not in ("corpus", "overrides")}
        found = own | {"corpus": load_manifest(Path(self.corpus)).digest, "model": asdict(config.model)}
        return dict(json.loads(json.dumps(found | {"optimizer": asdict(config.optimizer)})))


@dataclass(frozen=True)
class Finished:
    """losses: nats per token by step. unigram: entropy of the labels it saw, in nats: what knowing only their
    frequencies would give. seconds: of a step, the median."""

    losses: list[float]
    unigram: float
    seconds: float


def learning_rate(run: Run, step: int) -> float:
    """Linear over the first twentieth of fresh weights, then half a cosine to a fiftieth of the run's rate, at which a
    start stays instead; `step` counts from 0."""
    steps, peak = run.steps, run.rate
    warm = 0 if run.start else max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    if run.variant == START:
        return peak
    turn = math.pi * (step - warm) / max(1, steps - warm)
    return peak * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(turn)))


def train(run: Run, folder: Path) -> Iterator[tuple[float, np.ndarray]]:
    """(loss, labels) of every step. `folder` holds the starts. Raises ConfigError, DataError."""
    config, form = run.config(), VARIANTS.get(run.variant)
    stream = open_stream(run.corpus, run.length, mtp_depth=config.model.mtp_depth, seed=run.seed, stage="study")
    sources, sequences = len(stream.source_names), run.tokens // run.length
    engine = Engine(config.model, ParallelConfig(), config.optimizer, torch.bfloat16, form is not None, 0, sources)
    engine.initialize(run.seed)
    starts = folder / f"{START}-seed{run.seed}"
    if run.start:
        restore(Checkpoint(starts / step_name(run.start)), engine, config.optimizer)
        engine.optimizer.updates = run.start
        engine.ops.new_step()
    with quantised_as(form) if form else nullcontext():
        for step in range(run.steps):
            first = (run.start + step) * sequences % (run.distinct or sys.maxsize)
            order = engine.sample_order(first, sequences, sequences)
            batches = {key: stream.read(chosen) for key, chosen in order.items()}
            rate = learning_rate(run, step)
            balance = config.stages[0].balance
            plan = StepPlan(stream.counts(first, sequences), rate, 0.0, balance, BIAS_UPDATE)
            labels = np.concatenate([batch.labels.ravel() for batch in batches.values()])
            yield engine.step(batches, 1, plan).main, labels[labels != IGNORE]
    if run.variant == START:
        optimizer, biases = engine.optimizer, dict(engine.owned_biases())
        save_checkpoint(starts, run.steps, optimizer.shards(), optimizer.shapes(), biases, {})


def save(run: Run, folder: Path) -> Iterator[float]:
    """Train, giving each loss once it is written; the finished file gets its name at the end.

    `folder/NAME.jsonl`: the settings, a line for every step, the summary. Until then `NAME.jsonl.part`.
    """
    part, seen, seconds, start = folder / f"{run.name}.jsonl.part", [], [], time.perf_counter()
    try:
        with part.open("w", encoding="utf-8") as file:
            print(json.dumps({"settings": run.settings()}), file=file, flush=True)
            for step, (loss, labels) in enumerate(train(run, folder), 1):
                now = time.perf_counter()
                seen.append(labels)
                seconds.append(now - start)
                start = now
                print(json.dumps({"step": step, "loss": loss}), file=file, flush=True)
                yield loss
            counts = np.bincount(np.concatenate(seen)).astype(float)
            shares = counts[counts > 0] / counts.sum()
            summary = {"unigram": float(-(shares * np.log(shares)).sum()), "seconds": float(np.median(seconds))}
            print(json.dumps({"summary": summary}), file=file, flush=True)
            os.fsync(file.fileno())
        part.replace(part.with_suffix(""))
    except OSError as error:
        raise CannotWriteError(f"{part}: {error.strerror}") from None


def load(run: Run, folder: Path) -> Finished | None:
    """What `save` has finished; None when it has not. Raises ConfigError when other settings made the file."""
    path = folder / f"{run.name}.jsonl"
    if not path.exists():
        return None
    first, *steps, last = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    settings, found = run.settings(), first["settings"]
    if settings != found:
        keys = ", ".join(key for key in settings | found if settings.get(key) != found.get(key))
        raise ConfigError(f"{path}: made with another {keys}; give another --out, or what this one was made with")
    return Finished([line["loss"] for line in steps], **last["summary"])

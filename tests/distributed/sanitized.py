"""The engine of a run on the sanitizer's device, and tiny steps for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from data.contract import IGNORE, MicroBatch, StepCounts
from model.balance import BalanceWeights
from parallel.config import ParallelConfig
from parallel.optimizer.config import OptimizerConfig
from parallel.pipeline.executor import Executor
from parallel.sanitizer.collectives import check_collectives
from parallel.sanitizer.device import SanitizerDevice
from parallel.sanitizer.executor import WatchedExecutor
from parallel.sanitizer.findings import Finding
from parallel.schedule.transfers import forward_only
from tests.model.models import model_config
from train.engine import ORDERS, Engine, StepPlan

LENGTH = 6
FP8_WIDTHS = {"kv_lora_rank": 16, "qk_rope_head_dim": 16}  # all widths multiples of 16


class SanitizedEngine(Engine):
    """The real engine; its executors name their actions."""

    device: SanitizerDevice
    executor_class: type[WatchedExecutor] = WatchedExecutor

    def _executor(self, micro_batches: int, training: bool) -> Executor:
        table = self.table(micro_batches)
        return self.executor_class(
            table if training else forward_only(table),
            self.topology.pipeline_rank,
            dict(self.stages),
            self.store,
            self.dtype,
            self.order,
            self.topology.pipeline_peer,
            self.device,
        )


def engine_of(rank: int, parallel: ParallelConfig) -> SanitizedEngine:
    """A tiny model with three layers, experts and MTP, initialised, on a fresh device."""
    config = replace(model_config("tiny", mtp_depth=1), num_layers=3, **FP8_WIDTHS)
    optimizer = OptimizerConfig(moment_dtype="float32")
    engine = SanitizedEngine(config, parallel, optimizer, torch.float32, False, rank, 2, SanitizerDevice())
    engine.initialize(seed=3)
    return engine


def batches_of(engine: Engine, micro_batches: int) -> tuple[dict[tuple[int, int], MicroBatch], StepPlan]:
    """One sequence for each micro-batch of this rank, with padding and ignored labels."""
    depths, vocabulary = engine.config.mtp_depth, engine.config.vocab_size
    sequences = micro_batches * engine.topology.replicas
    generator = np.random.default_rng(7)
    tokens = generator.integers(0, vocabulary, (sequences, LENGTH))
    real = generator.random((sequences, LENGTH)) > 0.1
    labels = np.where(real, generator.integers(0, vocabulary, (sequences, LENGTH)), IGNORE)

    def rows(index: list[int]) -> MicroBatch:
        some, one = np.array(index), len(index)
        positions = np.broadcast_to(np.arange(LENGTH), (one, LENGTH)).copy()
        mtp = np.broadcast_to(labels[some], (depths, one, LENGTH)).copy()
        return MicroBatch(
            tokens[some],
            labels[some],
            positions,
            np.zeros_like(positions),
            np.broadcast_to(tokens[some], (depths, one, LENGTH)).copy(),
            mtp,
            real[some],
            some % 2,
        )

    counted = int((labels != IGNORE).sum())
    counts = StepCounts(counted, (counted,) * depths, sequences, int(real.sum()))
    order = engine.sample_order(0, sequences, micro_batch=1)
    plan = StepPlan(counts, 1e-3, mtp_weight=0.3, balance=BalanceWeights(sequence=0.05), bias_update=0.01)
    return {key: rows(samples) for key, samples in order.items()}, plan


def sanitized_step(engine: SanitizedEngine, micro_batches: int, fp8: bool, order: str | None = None) -> list[Finding]:
    """One training step; what the device found on this rank, and in the order of collectives of all ranks.

    order: of pairs; the engine's own if not given.
    """
    engine.ops.fp8 = fp8
    if order is not None:
        engine.order = ORDERS[order]
    engine.ops.new_step()
    batches, plan = batches_of(engine, micro_batches)
    engine.step(batches, micro_batches, plan)
    return findings_of(engine)


def evaluate(engine: SanitizedEngine, micro_batches: int) -> None:
    """One forward-only step."""
    batches, plan = batches_of(engine, micro_batches)
    engine.evaluate(batches, micro_batches, plan.counts)


def findings_of(engine: SanitizedEngine) -> list[Finding]:
    """All so far; the device forgets them."""
    device = engine.device
    device.findings.extend(check_collectives(device.log))
    return device.findings.take()

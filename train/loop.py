"""The training loop: stages in turn, one step at a time, checkpoints, metrics, and a stop that loses nothing."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from data.contract import StepCounts, StreamState
from data.store.location import Remote
from data.stream.ahead import ReadAhead, Wanted
from data.stream.stream import Stream, open_stream
from kernels.backends import BackendError, Kernels, resolve
from model.groups import group_table
from model.names import canonical_shapes, moe_layers
from model.precision import in_fp8
from parallel.device import HOST
from parallel.layout import describe
from parallel.optimizer.config import dtype_of
from parallel.pipeline.executor import Measured
from parallel.schedule.simulator import simulate
from parallel.trace.chrome import write_rank
from parallel.trace.clock import ClockOffset, clock_offset
from parallel.trace.recorder import Recorder
from train.agree import gather_json, together
from train.audit import StepAudit, write_audit
from train.compose import config_digest, config_json
from train.config import RunConfig, StageConfig
from train.engine import Engine, StepPlan, StepResult
from train.errors import PREEMPTED, CannotWriteError, ConfigError, NumericError
from train.initial_weights import InitialWeights
from train.metrics import RunMetrics, new_tracker_id, open_metrics, write_status
from train.notes import notes
from train.run_checkpoints import RunCheckpoints, restore
from train.rundir import RunDirectory
from train.schedules import ramp_value, step_value
from train.state import RunState
from train.timeline import write_timeline

MAX_BAD_STEPS = 5


class Preempted(Exception):
    """A stop was asked for; a checkpoint has been saved."""


class Trainer:
    """One rank of a run. Raises RunError kinds for what a user can mend, Preempted after a requested stop."""

    def __init__(self, config: RunConfig, rank: int, directory: RunDirectory) -> None:
        self.config, self.rank, self.directory = config, rank, directory
        self._agree()
        self.sources = self._source_names()
        self.kernels = together(self._resolve_kernels)
        self.engine = Engine(
            config.model,
            config.parallel,
            config.optimizer,
            dtype_of(config.precision.compute),
            config.precision.fp8,
            rank,
            len(self.sources),
            recompute=config.precision.recompute,
            kernels=self.kernels,
        )
        self._layers = tuple(moe_layers(config.model))
        self.checkpoints = RunCheckpoints(directory.path, config.checkpoint.keep)
        self.state = RunState()
        self._announced: set[int] = set()
        self._recorder = Recorder(rank)
        self._restore()
        self.metrics: RunMetrics = open_metrics(
            directory.path,
            rank=rank,
            step=self.state.step,
            total_tokens=sum(stage.tokens for stage in config.stages),
            tracker_id=self.state.tracker_id,
            wandb=config.logging.wandb,
            project=config.logging.project,
            console=config.logging.console,
            run_config=json.loads(config_json(config)),
        )

    def _agree(self) -> None:
        digests = gather_json(config_digest(self.config))
        if len(set(digests)) > 1:
            raise ConfigError(f"configuration: ranks were started with different ones: {sorted(set(digests))}")

    def _resolve_kernels(self) -> Kernels:
        shapes = canonical_shapes(self.config.model) if self.config.precision.fp8 else {}
        linears = [(name, shape[-2], shape[-1]) for name, shape in shapes.items() if in_fp8(name)]
        try:
            return resolve(self.config.kernels, HOST.where, linears)
        except BackendError as error:
            raise ConfigError(str(error).replace("\n", "; ")) from None

    def _source_names(self) -> tuple[str, ...]:
        verify = self.config.data.verify and self.rank == 0
        stream = together(lambda: self._open(self.config.stages[0], {}, verify))
        stream.close()
        return stream.source_names

    def _open(self, stage: StageConfig, started: dict[str, int], verify: bool = False) -> Stream:
        """verify: every byte of the corpus, once, by one rank; otherwise each block when it is first read."""
        data = self.config.data
        stream = open_stream(
            data.directory,
            stage.length,
            mtp_depth=self.config.model.mtp_depth,
            seed=self.config.seed,
            stage=stage.name,
            weights=stage.weights or data.weights or None,
            start_blocks=started,
            fim_rate=data.fim_rate,
            document_lengths={name: (found.shortest, found.longest) for name, found in stage.documents.items()},
            skip=[(samples.first, samples.end) for samples in stage.skip],
            verify=verify,
            remote=Remote(data.cache, data.cache_bytes),
        )
        if stream.manifest.vocab_size > self.config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: found {self.config.model.vocab_size}, the data's tokenizer needs at least "
                f"{stream.manifest.vocab_size}"
            )
        return stream

    # State ------------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        latest = None
        if self.config.resume == "auto":
            found = together(lambda: self.checkpoints.latest([s.name for s in self.config.stages]))
            latest = found.checkpoint
            for line in found.refused if self.rank == 0 else []:
                print(f"bireme: warning: {line}", file=sys.stderr, flush=True)
        later = together(lambda: self._set_aside(latest.step if latest else 0))
        for path in later:
            print(f"bireme: warning: {path} is of a later step than this run starts from; set aside", file=sys.stderr)
        if latest is None:
            self._initialize()
            self.state.tracker_id = str(gather_json(new_tracker_id())[0])
            return
        restore(latest, self.engine, self.config.optimizer)
        self.state = RunState.from_json(latest.state["run"])
        self.engine.optimizer.updates = self.state.updates

    def _initialize(self) -> None:
        """Fresh values, or those of the folder that the run starts from: refused before any is read."""
        if not self.config.initial_weights:
            self.engine.initialize(self.config.seed)
            return
        weights = together(lambda: InitialWeights(Path(self.config.initial_weights), self.config.model))
        together(lambda: weights.check_values() if self.rank == 0 else None)
        self.engine.load_weights(weights.rows)

    def _set_aside(self, step: int) -> list[Path]:
        return self.checkpoints.rewind(step) if self.rank == 0 else []

    def _check_stream(self, stage: StageConfig, stream: Stream) -> None:
        """The data and the seed are the ones the run began with, and the stage is the one it stopped in."""
        state = self.state
        if not state.stream:
            return
        saved, now = StreamState.from_json(state.stream), stream.state(state.sample)
        if saved.stage == stage.name:
            stream.resume(saved)
        elif state.sample:
            raise ConfigError(
                f"stages.{state.stage}.name: found '{stage.name}', the run stopped within '{saved.stage}'"
            )
        elif (saved.manifest_digest, saved.seed) != (now.manifest_digest, now.seed):
            raise ConfigError(
                f"data or seed: the run began with manifest {saved.manifest_digest} and seed {saved.seed}, found "
                f"{now.manifest_digest} and {now.seed}"
            )

    def _save(self, position: StreamState, stage: str | None = None) -> None:
        """A checkpoint of the state as it is now. stage: the end of that stage, kept for good."""
        started = time.perf_counter()
        self.state.updates = self.engine.optimizer.updates
        self.state.stream = asdict(position)
        state = {"run": self.state.to_json(), "config": json.loads(config_json(self.config))}
        path = self.checkpoints.save(self.state.step, self.engine, state, stage)
        seconds = round(time.perf_counter() - started, 3)
        self.metrics.event("checkpoint", step=self.state.step, path=str(path), stage=stage, seconds=seconds)

    # Run --------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train every stage that is left."""
        state = self.state
        self._status("starting")
        if self.rank == 0:
            groups = group_table(self.config.model, self.config.optimizer)
            self.metrics.event("optimizer_groups", groups=[asdict(group) for group in groups])
            self.metrics.event("kernels", table=self.kernels.table)
            for line in notes(self.config, self.kernels.table):
                self.metrics.event("note", text=line)
        ranks, layout = self.config.parallel.world_size, describe(self.engine.model.layout)
        self.metrics.event("started", step=state.step, tokens=state.tokens, ranks=ranks, layout=layout)
        while state.stage < len(self.config.stages):
            stage = self.config.stages[state.stage]
            stream = together(partial(self._open, stage, state.started))
            together(partial(self._check_stream, stage, stream))
            self.metrics.event("stage", name=stage.name, step=state.step, length=stage.length)
            if state.step == 0:
                self._save(stream.state(0), stage="initial")
            with ReadAhead[tuple[int, int]](stream) as ahead:
                while state.stage_tokens < stage.tokens:
                    self._step(stage, ahead)
                    self._after_step(stream)
            self._end_stage(stage, stream)
            stream.close()
        self._status("done", exit_code=0)

    def _end_stage(self, stage: StageConfig, stream: Stream) -> None:
        """Save with the state already at the beginning of the next stage."""
        state = self.state
        position, state.started = stream.state(state.sample), stream.blocks_read(state.sample)
        state.stage, state.stage_step, state.stage_tokens, state.sample = state.stage + 1, 0, 0, 0
        self._save(position, stage=stage.name)

    def _after_step(self, stream: Stream) -> None:
        every, state = self.config.checkpoint.every, self.state
        requests = gather_json(self.directory.requests())
        stop, save = (any(asked) for asked in zip(*requests, strict=True))
        if stop or save or (every and state.step % every == 0):
            self._save(stream.state(state.sample))
        if stop:
            self._status("preempted", exit_code=PREEMPTED)
            raise Preempted(f"stopped on request after step {state.step}; a checkpoint is saved")

    def _wanted(self, stage: StageConfig, sample: int, tokens: int) -> Wanted[tuple[int, int]]:
        """The step that begins at `sample`, `tokens` into the stage."""
        sequences = int(step_value(stage.sequences, tokens))
        return Wanted(sample, sequences, self.engine.sample_order(sample, sequences, stage.micro_batch))

    def _step(self, stage: StageConfig, ahead: ReadAhead[tuple[int, int]]) -> None:
        state, begin = self.state, time.perf_counter()
        tokens = state.stage_tokens
        wanted = self._wanted(stage, state.sample, tokens)
        sequences = wanted.sequences
        step = ahead.step(wanted)
        counts, batches = step.counts, step.batches
        if tokens + counts.tokens < stage.tokens:
            ahead.announce(self._wanted(stage, state.sample + sequences, tokens + counts.tokens))
        waited = time.perf_counter() - begin
        plan = StepPlan(
            counts,
            ramp_value(stage.learning_rate, tokens),
            step_value(stage.mtp_weight, tokens),
            stage.balance,
            step_value(stage.bias_update, tokens),
        )
        micro_batches = sequences // (self.engine.topology.replicas * stage.micro_batch)
        self._announce(micro_batches)
        audited = state.stage == 0 and state.stage_step + 1 == self.config.logging.audit_step
        audit = StepAudit(self.engine.ops) if audited else None
        traced = state.step + 1 in self.config.logging.trace_steps
        if traced:
            self.engine.record(self._recorder)
        with audit.watching() if audit else nullcontext():
            result = self.engine.step(batches, micro_batches, plan)
        state.step += 1
        if traced:
            self._trace()
        state.stage_step += 1
        state.tokens += counts.tokens
        state.stage_tokens += counts.tokens
        state.sample += sequences
        state.skipped += result.optimizer.skipped
        state.bad_steps = state.bad_steps + 1 if result.optimizer.skipped else 0
        self._report(plan, counts, result, time.perf_counter() - begin, waited, sequences)
        if state.stage_step == self.config.logging.timeline_step:
            self._timeline(micro_batches, result)
        if audit is not None:
            write_audit(self.directory.path / "audit.json", state.step, audit, self.rank)
        if state.bad_steps >= MAX_BAD_STEPS:
            raise NumericError(f"step {state.step}: {MAX_BAD_STEPS} steps in a row had a gradient that is not finite")

    # Watching ---------------------------------------------------------------------------------------------------------

    def _report(
        self, plan: StepPlan, counts: StepCounts, result: StepResult, seconds: float, waited: float, sequences: int
    ) -> None:
        if self.rank != 0:
            return
        state = self.state
        values: dict[str, Any] = {
            "train/loss": result.main,
            "train/loss_total": result.total,
            "train/stage": float(state.stage),
            "train/sequences": float(sequences),
            "aux/balance": result.balance,
            "optim/lr": plan.learning_rate,
            "optim/grad_norm": result.optimizer.grad_norm,
            "optim/clip": result.optimizer.clip_coefficient,
            "optim/skipped": float(state.skipped),
            "perf/step_seconds": seconds,
            "perf/tokens_per_s": counts.tokens / seconds,
            "perf/data_wait_s": waited,
        }
        if self._layers:
            load_LE = result.load_LE.double().numpy()
            vio_L = load_LE.max(1) / np.maximum(load_LE.mean(1), 1e-9) - 1
            values["moe/max_vio"] = float(vio_L.mean())
            values["moe/max_vio_worst_layer"] = float(vio_L.max())
            values["moe/dead_experts"] = float((load_LE == 0).sum())
        for k, value in enumerate(result.mtp):
            values["train/loss_mtp" if k == 0 else f"train/loss_mtp_{k + 1}"] = value
        for name, total in zip(self.sources, result.source_sums, strict=True):
            if counts.sources.get(name):
                values[f"train/loss/{name}"] = total / counts.sources[name]
        self.metrics.log(state.step, state.tokens, values)
        self.metrics.expert_load(state.step, dict(zip(self._layers, result.load_LE.tolist(), strict=True)))
        self._status("running")

    def _announce(self, micro_batches: int) -> None:
        """Say once for each number of micro-batches what its schedule costs, at unit costs (F 1, B 2, W 1, F&B 3)."""
        if self.rank != 0 or micro_batches in self._announced:
            return
        self._announced.add(micro_batches)
        table = self.engine.table(micro_batches)
        simulation = simulate(table)
        bubble = max(simulation.bubble(rank) for rank in range(table.ranks)) / simulation.makespan
        self.metrics.event(
            "schedule", name=table.name, ranks=table.ranks, micro_batches=micro_batches, bubble=f"{bubble:.1%}"
        )

    def _status(self, word: str, **fields: object) -> None:
        if self.rank == 0:
            write_status(self.directory.path, word, step=self.state.step, tokens=self.state.tokens, **fields)

    def failed(self, exit_code: int, reason: str) -> None:
        """Note the end of a run that did not finish."""
        self._status("failed", exit_code=exit_code, reason=reason)
        self.metrics.event("failed", step=self.state.step, exit_code=exit_code, reason=reason)

    def _timeline(self, micro_batches: int, result: StepResult) -> None:
        """Of the pipeline of replica 0, for the report."""
        mine = [asdict(m) for m in result.measured] if self.engine.topology.replica == 0 else []
        rows = [m for part in gather_json(mine) for m in part]
        if self.rank == 0:
            name = "timeline.json" if self.state.stage == 0 else f"timeline.{self.state.stage}.json"
            measured = [Measured(**m) for m in rows]
            write_timeline(self.directory.path / name, self.engine.table(micro_batches), measured)

    def _trace(self) -> None:
        """Leave off recording; after the last step that is asked for, every rank writes its own file."""
        self.engine.record(None)
        if self.state.step == max(self.config.logging.trace_steps):
            clock = clock_offset()
            together(lambda: self._write_trace(clock))
            self._recorder.clear()
            if self.rank == 0:
                self.metrics.event("trace", step=self.state.step, directory=str(self.directory.path / "trace"))

    def _write_trace(self, clock: ClockOffset) -> None:
        try:
            write_rank(self._recorder, self.directory.path, clock)
        except OSError as error:
            raise CannotWriteError(f"{self.directory.path}/trace: cannot write: {error.strerror or error}") from None

    def close(self, exit_code: int) -> None:
        """Close the metrics; the process group is the caller's."""
        self.metrics.close(exit_code)
        if dist.is_initialized():
            dist.barrier()


def run_path(config: RunConfig) -> Path:
    """root/name."""
    return Path(config.root) / config.name

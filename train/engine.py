"""One training step over the layout: model parts, pipeline executor and sharded optimizer of this rank, wired together.

Shape letters: L MoE layers, E experts, D MTP depths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist

from data.contract import MicroBatch, StepCounts
from kernels.backends import Kernels, torch_kernels
from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.initialize import initial_rows
from model.names import canonical_shapes, moe_layers
from model.ops import Ops
from model.partition import RankModel, stage_layout
from model.rope import Rotary
from model.router import update_bias
from model.segments import ChunkContext
from model.stage import Chunk, LossScales
from parallel.config import ParallelConfig
from parallel.device import HOST, Device
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.optimizer.config import OptimizerConfig
from parallel.optimizer.contract import OptimizerStep
from parallel.optimizer.zero1 import Zero1
from parallel.pipeline.contract import ORDERS
from parallel.pipeline.executor import Executor, Measured
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.actions import Table
from parallel.schedule.registry import build
from parallel.schedule.transfers import forward_only
from parallel.topology import Groups, Topology
from parallel.trace.recorder import NO_RECORDER, Recorder


@dataclass(frozen=True)
class StepPlan:
    """What a step needs beside its tokens: denominators, loss weights, learning rate."""

    counts: StepCounts
    learning_rate: float
    mtp_weight: float
    balance: BalanceWeights
    bias_update: float


@dataclass(frozen=True)
class Evaluation:
    """Losses of a forward-only step, as in `StepResult`."""

    main: float
    mtp: tuple[float, ...]
    source_sums: tuple[float, ...]


@dataclass(frozen=True)
class StepResult:
    """Reduced over all ranks, the same on every one. Losses are means over their labels, in natural logarithm.

    source_sums: the main loss summed over each source's labels (their counts are the stream's to say). load_LE: real
    tokens sent to each expert, MoE layer by MoE layer.
    """

    main: float
    mtp: tuple[float, ...]
    balance: float
    total: float
    source_sums: tuple[float, ...]
    load_LE: torch.Tensor
    optimizer: OptimizerStep
    measured: list[Measured] = field(default_factory=list)


class Engine:
    """This rank's share of the model, driven step by step.

    sources: number of mixture sources. kernels: back ends of the FP8 recipe, the definitions if None.
    Raises ValueError when layout and model do not fit.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        fp8: bool,
        rank: int,
        sources: int,
        device: Device = HOST,
        recompute: bool = True,
        kernels: Kernels | None = None,
    ) -> None:
        kernels = kernels or torch_kernels()
        self.config, self.parallel, self.dtype, self.sources, self.device = model, parallel, dtype, sources, device
        self.topology = Topology.of(parallel, rank)
        self.order = ORDERS[parallel.order]
        self._tables: dict[int, Table] = {}
        self._executors: dict[tuple[int, bool], Executor] = {}
        self._recorder: Recorder | None = NO_RECORDER
        shape = self.table(2)
        self.model = RankModel(model, self.topology, shape, stage_layout(model, shape, parallel.layout), dtype)
        self.groups = Groups(rank, self.model.replica_groups(), parallel.timeout_seconds)
        # Apart even where the same ranks hold replicas: on one communicator a reduction would hold up an all-to-all.
        expert_groups = Groups(rank, self.topology.expert_groups(), parallel.timeout_seconds)
        mine = next(g for g in self.topology.expert_groups() if rank in g)
        self.dispatcher = AllToAllDispatcher(model.num_routed_experts, expert_groups[mine], device, kernels.permute)
        self.optimizer = Zero1(self.model.specs(), optimizer, self.groups, rank)
        self.store = WeightGradStore(self.optimizer)
        self.ops = Ops(self.store, dtype, fp8, model.rms_norm_eps, recompute, kernels)
        self.stages = self.model.build_stages(self.ops, self.dispatcher)
        self.moe_layers = list(moe_layers(model).values())
        self._rotaries: dict[int, Rotary] = {}

    def record(self, recorder: Recorder | None) -> None:
        """Trace every action, communication and wait of the steps that follow; None ends it."""
        self._recorder = self.dispatcher.recorder = recorder
        for bucket in self.optimizer.buckets:
            bucket.recorder = recorder

    def table(self, micro_batches: int) -> Table:
        """The schedule for this many micro-batches; ValueError when there is none."""
        if micro_batches not in self._tables:
            p = self.parallel
            self._tables[micro_batches] = build(p.schedule, p.pipeline, micro_batches, p.stages_per_rank or None)
        return self._tables[micro_batches]

    def initialize(self, seed: int) -> None:
        """Fresh values by (seed, canonical name)."""
        shapes = canonical_shapes(self.config)
        std = self.config.init_std
        self.optimizer.initialize(lambda name, first, last: initial_rows(name, shapes[name], std, seed, first, last))
        self.ops.new_step()

    def load_weights(self, rows: Callable[[str, int, int], torch.Tensor]) -> None:
        """Weights and router biases from `rows(canonical name, first row, last row)`: what this rank owns, and the
        biases of its layers. The optimizer starts afresh."""
        columns = {name: prod(shape[1:]) for name, shape in self.optimizer.shapes().items()}
        self.optimizer.initialize(
            lambda name, first, last: rows(name, first, last).reshape(last - first, columns[name])
        )
        self.load_biases(lambda name: rows(name, 0, self.config.num_routed_experts))

    # Samples ----------------------------------------------------------------------------------------------------------

    def sample_order(self, first: int, sequences: int, micro_batch: int) -> dict[tuple[int, int], list[int]]:
        """(direction, chunk) -> sample indices of this rank's pipeline, for a step of `sequences` samples from
        `first`."""
        table = self.table(sequences // (self.topology.replicas * micro_batch))
        per_direction = table.micro_batches // table.directions
        found = {}
        for direction, _ in table.stages_of(self.topology.pipeline_rank):
            for chunk in range(per_direction):
                at = (self.topology.replica * table.micro_batches + direction * per_direction + chunk) * micro_batch
                found[direction, chunk] = list(range(first + at, first + at + micro_batch))
        return found

    def _chunk(self, batch: MicroBatch, balance: BalanceWeights) -> Chunk:
        sequences, length = batch.tokens.shape
        if length not in self._rotaries:
            self._rotaries[length] = Rotary(self.config, length)
        rotary = self._rotaries[length]
        cos, sin = rotary.tables(torch.arange(length), self.dtype)
        geometry = Geometry(sequences, length, cos, sin, rotary.softmax_scale)
        context = ChunkContext(geometry, torch.from_numpy(batch.real).flatten(), balance)
        depths = self.config.mtp_depth
        return Chunk(
            context,
            torch.from_numpy(batch.tokens).flatten(),
            torch.from_numpy(batch.labels).flatten(),
            torch.from_numpy(batch.mtp_tokens[:depths]).flatten(1),
            torch.from_numpy(batch.mtp_labels[:depths]).flatten(1),
            torch.from_numpy(batch.source),
        )

    # Step -------------------------------------------------------------------------------------------------------------

    def step(self, batches: dict[tuple[int, int], MicroBatch], micro_batches: int, plan: StepPlan) -> StepResult:
        """Forward, backward and update over `batches` (this rank's, by direction and chunk)."""
        depths = self.config.mtp_depth
        mtp = tuple(plan.mtp_weight / (depths * max(c, 1)) for c in plan.counts.mtp[:depths])
        scales = LossScales(1.0 / max(plan.counts.main, 1), mtp)
        per_direction = self._begin(batches, micro_batches, scales, plan.balance.over(plan.counts.sequences))
        self.optimizer.begin_step({d: per_direction for d, _ in self.stages})
        executor = self._executor(micro_batches, training=True)
        executor.run()
        stepped = self.optimizer.step(plan.learning_rate)
        self.ops.new_step()
        load_LE = self._reduce_load()
        if not stepped.skipped:
            self._update_biases(load_LE, plan.bias_update)
        main, mtp_losses, balance, source_sums = self._reduce_losses(plan.counts)
        weighted = sum(loss * max(c, 1) * s for loss, c, s in zip(mtp_losses, plan.counts.mtp, mtp, strict=False))
        total = main + balance + weighted
        return StepResult(main, mtp_losses, balance, total, source_sums, load_LE, stepped, executor.measured)

    def evaluate(
        self, batches: dict[tuple[int, int], MicroBatch], micro_batches: int, counts: StepCounts
    ) -> Evaluation:
        """Forward only: no gradient, no router load, no change of any state."""
        scales = LossScales(1.0, (1.0,) * self.config.mtp_depth)
        self._begin(batches, micro_batches, scales, BalanceWeights())
        self._executor(micro_batches, training=False).run()
        main, mtp, _, source_sums = self._reduce_losses(counts)
        return Evaluation(main, mtp, source_sums)

    def _begin(
        self,
        batches: dict[tuple[int, int], MicroBatch],
        micro_batches: int,
        scales: LossScales,
        balance: BalanceWeights,
    ) -> int:
        """Hand every stage its micro-batches; returns how many there are in each direction."""
        chunks = {key: self._chunk(batch, balance) for key, batch in batches.items()}
        per_direction = micro_batches // self.table(micro_batches).directions
        for (direction, _), stage in self.stages.items():
            stage.begin_step([chunks[direction, c] for c in range(per_direction)], scales)
        for segmented in self.model.segmented.values():
            segmented.new_step()
        return per_direction

    def _executor(self, micro_batches: int, training: bool) -> Executor:
        key = (micro_batches, training)
        if key not in self._executors:
            table = self.table(micro_batches)
            self._executors[key] = Executor(
                table if training else forward_only(table),
                self.topology.pipeline_rank,
                dict(self.stages),
                self.store,
                self.dtype,
                self.order,
                self.topology.pipeline_peer,
                self.device,
            )
        self._executors[key].recorder = self._recorder
        return self._executors[key]

    def _reduce_load(self) -> torch.Tensor:
        """Every chunk passes every layer on exactly one rank, so a sum over the world counts each token once."""
        load_LE = torch.zeros(len(self.moe_layers), self.config.num_routed_experts, dtype=torch.int64)
        for row, name in enumerate(self.moe_layers):
            segmented = self.model.segmented.get(name)
            if segmented is not None and segmented.load_E is not None:
                load_LE[row] = segmented.load_E
        if self.topology.world_size > 1:
            dist.all_reduce(load_LE)
        return load_LE

    def _update_biases(self, load_LE: torch.Tensor, gamma: float) -> None:
        biases = self.model.router_biases()
        for row, name in enumerate(self.moe_layers):
            if gamma and f"{name}.router.bias" in biases:
                update_bias(biases[f"{name}.router.bias"], load_LE[row], gamma)

    def _reduce_losses(self, counts: StepCounts) -> tuple[float, tuple[float, ...], float, tuple[float, ...]]:
        """(main loss, MTP losses, scaled balance loss, main loss summed by source) over the world: each chunk's losses
        are on one rank, the one that holds the last stage of its direction."""
        depths = self.config.mtp_depth
        sums = torch.zeros(2 + depths + self.sources, dtype=torch.float64)
        for stage in self.stages.values():
            for _, losses in sorted(stage.losses.items()):
                sums[0] += losses.main_B.sum().to(sums.dtype)
                sums[2 : 2 + depths] += losses.mtp_D.to(sums.dtype)
                sums[2 + depths :].index_add_(0, losses.source_B, losses.main_B.to(sums.dtype))
        sums[1] = sum(float(segmented.balance) for segmented in self.model.segmented.values())
        if self.topology.world_size > 1:
            dist.all_reduce(sums)
        values = sums.tolist()
        mtp = tuple(v / max(c, 1) for v, c in zip(values[2 : 2 + depths], counts.mtp, strict=False))
        return values[0] / max(counts.main, 1), mtp, values[1], tuple(values[2 + depths :])

    # State ------------------------------------------------------------------------------------------------------------

    def owned_biases(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Router biases that this rank writes: each layer's by the first rank that holds it."""
        for name, bias in self.model.router_biases().items():
            component = name.removesuffix(".router.bias").removesuffix(".layer")
            if self.model.replicas(component)[0] == self.topology.rank:
                yield name, bias

    def load_biases(self, read: Callable[[str], torch.Tensor]) -> None:
        """Restore the router biases of this rank."""
        for name, bias in self.model.router_biases().items():
            bias.copy_(read(name))
        self.ops.new_step()

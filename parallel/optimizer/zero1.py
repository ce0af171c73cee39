"""ZeRO-1: each rank keeps masters and moments of the rows it owns; replicas exchange whole buckets.

One reduce-scatter and one all-gather per bucket and step.

The order in which the buckets of a replica group are reduced is fixed (canonical names, last first, which is about the
order of a backward pass) and not the order in which they become ready: a rank and its mirror in a bidirectional
pipeline hold the same stages in opposite order, and collectives that cross would swap equal-sized buckets in silence.
The members compare a digest of their layouts once at the start.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from kernels.adamw import adamw
from parallel.optimizer.assignment import canonical_key
from parallel.optimizer.bucket import Bucket, ContributionError, Work, label
from parallel.optimizer.config import OptimizerConfig, dtype_of
from parallel.optimizer.contract import OptimizerStep, ParameterSpec, RowRange

GATHERS_IN_FLIGHT = 2  # bounds the staging memory; two keep the network busy while the next bucket is updated


class GroupLookup(Protocol):
    """The process group of a sorted tuple of global ranks (`parallel.topology.Groups`, or a dict); None for one
    rank."""

    def __getitem__(self, ranks: tuple[int, ...], /) -> dist.ProcessGroup | None: ...


class Zero1:
    """`ShardedOptimizer` over torch.distributed (see `parallel/optimizer/contract.py`).

    specs: every parameter of this rank, each once. groups: process groups by replica ranks. rank: this global rank.
    world: the group over which the gradient norm is summed (default: all ranks, or this process alone without
    torch.distributed). `updates` counts the steps that were not skipped (Adam's bias correction) and belongs in a
    checkpoint. Collective: all ranks construct it together. ValueError: specs that contradict each other, or differ
    between replicas.
    """

    def __init__(
        self,
        specs: Iterable[ParameterSpec],
        config: OptimizerConfig,
        groups: GroupLookup,
        rank: int,
        world: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config
        self.updates = 0
        self._world = world
        self._shapes: dict[str, tuple[int, ...]] = {}
        members: dict[tuple[str, tuple[int, ...], str], list[ParameterSpec]] = {}
        for spec in specs:
            for part in spec.parts:
                if part.name in self._shapes:
                    raise ValueError(f"canonical tensor {part.name} appears twice on rank {rank}")
                self._shapes[part.name] = part.shape
            config.groups.of(spec.group)
            if list(spec.replicas) != sorted(set(spec.replicas)) or rank not in spec.replicas:
                raise ValueError(f"{label(spec)}: replicas {spec.replicas} must be sorted and hold rank {rank}")
            members.setdefault((spec.bucket, spec.replicas, str(spec.parameter.dtype)), []).append(spec)
        dtypes = [dtype_of(name) for name in (config.master_dtype, config.moment_dtype, config.accumulate_dtype)]
        keys = sorted(members, key=lambda key: (canonical_key(key[0]), key[1], key[2]), reverse=True)
        self.buckets = []
        for key in keys:
            group = groups[key[1]] if len(key[1]) > 1 else None
            self.buckets.append(Bucket(members[key], rank, group, *dtypes))
        self._place = {id(s.parameter): (b, n) for b in self.buckets for n, s in enumerate(b.specs)}
        self._waiting: dict[tuple[int, ...], deque[Bucket]] = {}
        self._in_step = False
        self._check_replicas()

    def _check_replicas(self) -> None:
        """Compare layouts over each replica group. Groups in one order everywhere, so that no two ranks wait
        crosswise."""
        for replicas in sorted({bucket.replicas for bucket in self.buckets if bucket.group is not None}):
            mine = [bucket for bucket in self.buckets if bucket.replicas == replicas]
            text = "\n".join(bucket.describe() for bucket in mine)
            digest = torch.tensor(
                list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=mine[0].device
            )
            digests = [torch.empty_like(digest) for _ in replicas]
            dist.all_gather(digests, digest, group=mine[0].group)
            other = [r for r, found in zip(replicas, digests, strict=True) if not torch.equal(found, digests[0])]
            if other:
                names = ", ".join(bucket.name for bucket in mine)
                raise ValueError(
                    f"gradient buckets of replicas {replicas} differ: ranks {other} against {replicas[0]} ({names})"
                )

    # ---- gradients

    def begin_step(self, chunks: dict[int, int]) -> None:
        """Zero the accumulators and expect `chunks[direction]` chunks of each direction."""
        if self._in_step:
            raise RuntimeError("begin_step was called again before step")
        self._in_step = True
        self._waiting = {}
        for bucket in self.buckets:
            bucket.begin(chunks)
            self._waiting.setdefault(bucket.replicas, deque()).append(bucket)
        for replicas in self._waiting:
            self._start_ready(replicas)

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        """Add `grad` (shape of `parameter`) to its accumulator. ContributionError: more than expected, or outside a
        step."""
        if id(parameter) not in self._place:
            raise KeyError(f"a gradient came for a parameter of shape {tuple(parameter.shape)} that has no spec")
        bucket, number = self._place[id(parameter)]
        if not self._in_step:
            raise ContributionError(f"{label(bucket.specs[number])} got a weight gradient outside a step")
        bucket.accumulate(number, grad)
        if bucket.complete:
            self._start_ready(bucket.replicas)

    def _start_ready(self, replicas: tuple[int, ...]) -> None:
        queue = self._waiting[replicas]
        while queue and queue[0].complete:
            queue.popleft().start_reduction()

    # ---- update

    def step(self, learning_rate: float) -> OptimizerStep:
        """Update the owned rows and publish them. `skipped`: the norm was not finite, nothing changed on any rank
        (`clip_coefficient` is then 0). ContributionError names every parameter that lacks a contribution."""
        if not self._in_step:
            raise RuntimeError("step was called without begin_step")
        missing = [line for bucket in self.buckets for line in bucket.missing()]
        if missing:
            raise ContributionError("weight-gradient contributions are missing: " + "; ".join(missing))
        for bucket in self.buckets:
            bucket.finish_reduction()
        self._in_step = False
        norm = self._global_norm()
        if not math.isfinite(norm):
            return OptimizerStep(norm, 0.0, True)
        clip = self.config.clip
        coefficient = clip / norm if clip > 0 and norm > clip else 1.0
        self.updates += 1
        self._publish(lambda bucket: self._update(bucket, learning_rate, coefficient))
        return OptimizerStep(norm, coefficient, False)

    def _global_norm(self) -> float:
        """Every element is owned once in the world, so the sum of squares of owned rows needs no weights."""
        device = self.buckets[0].device if self.buckets else torch.device("cpu")
        total = torch.zeros((), dtype=torch.float64, device=device)
        for bucket in self.buckets:
            total += torch.linalg.vector_norm(bucket.reduced, dtype=torch.float64).square()
        if dist.is_initialized():
            dist.all_reduce(total, group=self._world)
        return math.sqrt(total.item())

    def _update(self, bucket: Bucket, learning_rate: float, coefficient: float) -> None:
        config = self.config
        for first, last, group in bucket.group_runs(config.groups.of):
            if group.learning_rate_factor == 0.0:
                continue
            adamw(
                bucket.master[first:last],
                bucket.exp_avg[first:last],
                bucket.exp_avg_sq[first:last],
                bucket.reduced[first:last],
                learning_rate * group.learning_rate_factor,
                config.beta1,
                config.beta2,
                config.eps,
                config.weight_decay * group.weight_decay_factor,
                self.updates,
                coefficient,
            )

    def _publish(self, prepare: Callable[[Bucket], None]) -> None:
        """`prepare` each bucket, then gather it into the parameters while the next is prepared."""
        flying: deque[tuple[Bucket, torch.Tensor, Work | None]] = deque()
        for bucket in self.buckets:
            prepare(bucket)
            flying.append((bucket, *bucket.start_gather()))
            if len(flying) > GATHERS_IN_FLIGHT:
                done, staging, work = flying.popleft()
                done.finish_gather(staging, work)
        for done, staging, work in flying:
            done.finish_gather(staging, work)

    # ---- state

    def initialize(self, value: Callable[[str, int, int], torch.Tensor]) -> None:
        """Masters of the owned rows from `value(name, first, last)` -> (rows, columns); moments 0; publish."""

        def fill(bucket: Bucket) -> None:
            for owned in bucket.owned:
                rows = owned.rows
                found = value(rows.name, rows.first, rows.last)
                _copy(bucket.state_views(owned)["master"], found, f"initial value of {rows.name}")
            bucket.exp_avg.zero_()
            bucket.exp_avg_sq.zero_()

        self.updates = 0
        self._publish(fill)

    def shards(self) -> Iterator[tuple[RowRange, dict[str, torch.Tensor]]]:
        """Owned rows with views (rows, columns) of `master`, `exp_avg`, `exp_avg_sq`."""
        for bucket in self.buckets:
            for owned in bucket.owned:
                yield owned.rows, bucket.state_views(owned)

    def load_shards(self, read: Callable[[str, str, int, int], torch.Tensor]) -> None:
        """Owned state from `read(name, kind, first, last)`, dtypes compared, never cast; publish. `updates` is the
        caller's."""

        def fill(bucket: Bucket) -> None:
            for owned in bucket.owned:
                rows = owned.rows
                for kind, view in bucket.state_views(owned).items():
                    found = read(rows.name, kind, rows.first, rows.last)
                    what = f"{kind} of {rows.name} rows {rows.first} to {rows.last}"
                    if found.dtype != view.dtype:
                        raise ValueError(f"{what}: found {found.dtype}, this run is configured for {view.dtype}")
                    _copy(view, found, what)

        self._publish(fill)

    def named_gradients(self) -> Iterator[tuple[RowRange, torch.Tensor]]:
        """Reduced, unclipped gradients of the owned rows, (rows, columns): between `step` and the next `begin_step`."""
        for bucket in self.buckets:
            yield from bucket.owned_gradients()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """True shape of every canonical tensor that this rank holds a copy of."""
        return dict(self._shapes)


def _copy(view: torch.Tensor, found: torch.Tensor, what: str) -> None:
    if found.shape != view.shape:
        raise ValueError(f"{what}: found shape {tuple(found.shape)}, expected {tuple(view.shape)} (rows, columns)")
    view.copy_(found)

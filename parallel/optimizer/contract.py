"""Where weight gradients go: parameters by canonical name, replica groups, buckets, row-range shards, one protocol.

A *canonical tensor* is a layout-free named tensor of the model (`layers.17.experts.42.gate_up.weight`, `embed.weight`).
A rank's `nn.Parameter` is one canonical tensor, or several stacked along its first dimension (all local experts of a
layer). Replica groups belong to canonical tensors: the sorted global ranks that hold a copy.

Every element of every canonical tensor is *owned* by exactly one rank in the world, which holds its FP32 master and
BF16 moments (ZeRO-1, row ranges in units of 128 rows; small tensors whole). So the global gradient norm is a plain sum
over ranks and a checkpoint is slices of named tensors, free of layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """Rows [first_row, last_row) of a rank's parameter, flattened to two dimensions, that are canonical tensor `name`.

    `rows` x `columns` is the canonical tensor's flattened shape (one-dimensional tensors: rows = length, columns = 1).
    `shape` is its true shape.
    """

    name: str
    first_row: int
    last_row: int
    columns: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """One `nn.Parameter` of this rank.

    parts: its canonical tensors in row order. replicas: global ranks holding the same parts, sorted. bucket: name of
    the gradient bucket (`layers.3.dense`, `layers.3.experts`); the parameters of one bucket share `replicas`.
    uses: weight-gradient contributions per chunk by (direction) of the pipeline, e.g. {0: 1} or {0: 1, 1: 1}.
    group: its settings of learning rate and weight decay (`parallel.optimizer.config.GROUPS`).
    """

    parameter: nn.Parameter
    parts: tuple[Part, ...]
    replicas: tuple[int, ...]
    bucket: str
    uses: dict[int, int]
    group: str


@dataclass(frozen=True)
class RowRange:
    """Rows [first, last) of canonical tensor `name`, owned by global rank `owner`."""

    name: str
    owner: int
    first: int
    last: int


@dataclass(frozen=True)
class OptimizerStep:
    """What a step did. grad_norm: before clipping, every canonical tensor once. skipped: norm not finite, no change."""

    grad_norm: float
    clip_coefficient: float
    skipped: bool


class GradientSink(Protocol):
    """What the weight-gradient store talks to. One call per parameter, chunk and use."""

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        """Add `grad` (shape of the parameter, any float dtype) into the FP32 accumulator. The bucket's reduction starts
        when its last expected contribution of the step is in (and every earlier bucket of its group has started)."""
        ...


class ShardedOptimizer(GradientSink, Protocol):
    """ZeRO-1 behind one protocol (own implementation; DeepSpeed's is a second one).

    updates: steps that were not skipped (Adam's bias correction). Not in `shards`: the run saves and restores it.
    """

    updates: int

    def begin_step(self, chunks: dict[int, int]) -> None:
        """Zero the accumulators and set expectations: chunks per direction in this step."""
        ...

    def step(self, learning_rate: float) -> OptimizerStep:
        """Wait for the reductions, norm, clip, AdamW on owned rows, gather compute copies into the parameters."""
        ...

    def initialize(self, value: Callable[[str, int, int], torch.Tensor]) -> None:
        """Fill the masters from `value(name, first_row, last_row)` -> (rows, columns) in FP32, clear moments, publish
        to parameters."""
        ...

    def shards(self) -> Iterable[tuple[RowRange, dict[str, torch.Tensor]]]:
        """Owned state: (rows, {"master": (rows, columns) fp32, "exp_avg": bf16, "exp_avg_sq": bf16})."""
        ...

    def load_shards(self, read: Callable[[str, str, int, int], torch.Tensor]) -> None:
        """Restore owned state from `read(name, kind, first_row, last_row)`, dtypes kept exactly, then publish."""
        ...

    def named_gradients(self) -> Iterable[tuple[RowRange, torch.Tensor]]:
        """Reduced, unclipped gradients of the owned rows, (rows, columns): between `step` and the next `begin_step`."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """True shape of every canonical tensor that this rank holds a copy of."""
        ...

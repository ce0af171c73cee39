"""Loss and gradients on one process, without a process group: the stages that training runs, gradients in `.grad`.

For studies and benchmarks that bring an optimizer of their own. `train.engine` is the same programs over a layout.

Shape letters: B sequences, T positions.
"""

from __future__ import annotations

import torch
from torch import nn

from model.attention_core import Geometry
from model.balance import BalanceWeights
from model.config import ModelConfig
from model.ops import Ops
from model.partition import RankModel, stage_layout
from model.rope import Rotary
from model.segments import ChunkContext
from model.stage import Chunk, LossScales
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.pipeline.contract import DEFAULT_ORDER
from parallel.pipeline.executor import Executor
from parallel.pipeline.store import WeightGradStore
from parallel.schedule.registry import build
from parallel.topology import Topology

IGNORE = -100


class LeafGradients:
    """A `GradientSink`: sums into `parameter.grad`, as autograd would."""

    def accumulate(self, parameter: nn.Parameter, grad: torch.Tensor) -> None:
        """The first contribution becomes the gradient, others are added to it."""
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad += grad


class LocalStep:
    """Forward and backward of one batch, main cross-entropy only. `model`: the modules, to be filled and optimised.

    Router biases stay as they are and there is no balance loss. MTP depths are refused.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, recompute: bool = True) -> None:
        if config.mtp_depth:
            raise ValueError(f"a local step has the main loss only; found model.mtp_depth {config.mtp_depth}")
        self.config, self.dtype = config, dtype
        table = build("1f1b", 1, 1)
        self.model = RankModel(config, Topology(1, 1, 1, 0), table, stage_layout(config, table, ""), dtype)
        self.store = WeightGradStore(LeafGradients())
        self.ops = Ops(self.store, dtype, False, config.rms_norm_eps, recompute)
        self.stages = self.model.build_stages(self.ops, AllToAllDispatcher(config.num_routed_experts, None))
        self._executor = Executor(table, 0, dict(self.stages), self.store, dtype, DEFAULT_ORDER)

    def gradients(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        """Mean cross-entropy over labels that are not IGNORE; its gradients are added to each parameter's `.grad`."""
        sequences, length = tokens_BT.shape
        rotary = Rotary(self.config, length)
        geometry = Geometry(sequences, length, *rotary.tables(torch.arange(length), self.dtype), rotary.softmax_scale)
        tokens = tokens_BT.numel()
        none = torch.empty(0, tokens, dtype=torch.int64)
        context = ChunkContext(geometry, torch.ones(tokens, dtype=torch.bool), BalanceWeights())
        source_B = torch.zeros(sequences, dtype=torch.int64)
        chunk = Chunk(context, tokens_BT.flatten(), labels_BT.flatten(), none, none, source_B)
        count = max(int((labels_BT != IGNORE).sum()), 1)
        for stage in self.stages.values():
            stage.begin_step([chunk], LossScales(1.0 / count, ()))
        for segmented in self.model.segmented.values():
            segmented.new_step()
        self._executor.run()
        self.ops.new_step()
        (stage,) = self.stages.values()
        return float(stage.losses[0].main_B.sum()) / count

"""Attention between its projections as one differentiable operation that keeps its inputs and output only.

A core computes what it needs again in the backward (V3 section 3.2.3); the output is kept as the recipe says (E5M6 with
FP8 on) and shared with the output projection. Shape letters: N tokens (= B sequences x T positions), P rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd import Function

from model.operands import Input, Kept
from model.ops import Ops


@dataclass(frozen=True)
class Geometry:
    """A chunk's shape and rotary tables: sequences x length tokens; cos, sin [T, P]; softmax scale."""

    sequences: int
    length: int
    cos_TP: torch.Tensor
    sin_TP: torch.Tensor
    softmax_scale: float

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def heads(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """[N, number * width] -> [B, number, T, width]."""
        return x.view(self.sequences, self.length, number, -1).transpose(1, 2)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[B, number, T, width] -> [N, number * width]."""
        return x.transpose(1, 2).reshape(self.tokens, -1)


class AttentionCore(Protocol):
    """One layer's attention on one chunk, without its output projection."""

    ops: Ops

    def project(self, x: torch.Tensor, given: Input) -> tuple[torch.Tensor, ...]:
        """The core's inputs, [N, width] each, from the normed input [N, d]."""
        ...

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [N, H * value width], softmax statistics)."""
        ...

    def backward(
        self, dout: torch.Tensor, inputs: tuple[torch.Tensor, ...], out: torch.Tensor, statistics: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of the inputs; weight gradients of what the core holds go to the store."""
        ...


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, core: AttentionCore, keeps: list[Kept], *inputs: torch.Tensor) -> torch.Tensor:
        inputs = tuple(x.detach() for x in inputs)
        out, statistics = core.forward(*inputs)
        # Detached: what this node returns will point back to the node, which keeps it, and neither would be freed.
        keeps.append(core.ops.keep_attention_output(out.detach()))
        ctx.kept = core, inputs, keeps[-1], statistics
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        core, inputs, kept, statistics = ctx.kept
        return None, None, *core.backward(grads[0].detach(), inputs, kept(), statistics)


def attend(core: AttentionCore, *inputs: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """(attention output [N, H * value width], its cache, which the output projection shares)."""
    keeps: list[Kept] = []
    out = _Attend.apply(core, keeps, *inputs)
    return out, keeps[0]

"""The two ends of a model as differentiable operations: embedding, and output head with its loss.

Both stay outside the FP8 set (V3 section 3.3.1). Shape letters: N tokens, K width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from kernels import gemm
from kernels.cross_entropy import cross_entropy_and_gradient
from model.ops import Ops


class Embedding(Function):
    """table[tokens]; the table's gradient is handed to the store."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, table: nn.Parameter, tokens_N: torch.Tensor, ops: Ops) -> torch.Tensor:
        ctx.kept = table, tokens_N, ops
        return table.detach()[tokens_N]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        table, tokens_N, ops = ctx.kept
        dy = grads[0].detach()

        def grad() -> torch.Tensor:
            high = torch.promote_types(dy.dtype, torch.float32)
            return dy.new_zeros(table.shape, dtype=high).index_add_(0, tokens_N, dy.to(high))

        ops.store.put(table, grad)
        return None, None, None, None


class HeadLoss(Function):
    """Output head and cross-entropy: (n [N, K], head [V, K]) -> scalar `scale * sum of token losses`.

    The gradient of the logits is made in the forward and replaces them (DeepSeek LLM section 2.4). `losses` receives
    the per-token losses [N] (0 where the label is IGNORE).
    """

    @staticmethod
    def forward(
        ctx: Any,
        n: torch.Tensor,
        head: nn.Parameter,
        labels_N: torch.Tensor,
        scale: float,
        again: Callable[[], torch.Tensor],
        ops: Ops,
        name: str,
        losses: list[torch.Tensor],
    ) -> torch.Tensor:
        high = torch.promote_types(n.dtype, torch.float32)
        logits = gemm.fprop(n.detach(), head.detach(), high, name=name)
        token_losses, gradient = cross_entropy_and_gradient(logits, labels_N, scale, in_place=True)
        dlogits = gradient.to(n.dtype)
        losses.append(token_losses)
        ctx.kept = dlogits, head, again, ops, name
        return token_losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The gradient of the scalar is 1: its scale is already in dlogits.
        dlogits, head, again, ops, name = ctx.kept
        ops.store.put(head, lambda: gemm.wgrad(dlogits, again(), name=name))
        dn = gemm.dgrad(dlogits, head.detach(), ops.dtype, name=name)
        return (dn,) + (None,) * 7

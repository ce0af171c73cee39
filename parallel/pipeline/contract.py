"""Chunk programs and the stage protocol: what the executor drives.

A chunk's forward and backward are generators ("programs"). A program yields the *name of the step it is about to run*
at every step boundary; an `F&B` pair is two programs advanced by a fixed, declared order (`DEFAULT_ORDER`,
`PUBLISHED_ORDER`, `READY_FIRST_ORDER`). Steps a layer lacks are passed over; steps not in the order (embed, head) run
when their program's turn comes. No context manager is ever held across a yield.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch

from parallel.expert.contract import Pending

Program = Generator[str, None, Any]

DEFAULT_ORDER = tuple(
    "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) attn(W)".split()
)
PUBLISHED_ORDER = tuple(
    "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)".split()
)
# Every transfer issued as soon as its data exist. The host then waits for dispatch(F)'s receive counts before mlp(B) is
# issued, so that the device has nothing to run while counts are late.
READY_FIRST_ORDER = tuple(
    "combine(B) attn(F) dispatch(F) mlp(B) dispatch(B) mlp(W) mlp(F) combine(F) attn(B) attn(W)".split()
)

ORDERS = {"default": DEFAULT_ORDER, "published": PUBLISHED_ORDER, "ready_first": READY_FIRST_ORDER}


class PipelineStage(Protocol):
    """One stage of one direction on this rank. Holds what each live chunk keeps between F and B."""

    def boundary_shape(self, chunk: int) -> tuple[int, ...]:
        """Shape of the activation (and its gradient) that enters this stage for `chunk`: derived, not communicated."""
        ...

    def output_shape(self, chunk: int) -> tuple[int, ...]:
        """Shape of the activation that leaves this stage."""
        ...

    def forward_program(self, chunk: int, received: Pending[torch.Tensor] | None) -> Program:
        """Returns the stage's output, or None on the last stage (the loss stays there)."""
        ...

    def backward_program(
        self,
        chunk: int,
        received: Pending[torch.Tensor] | None,
        split: bool,
        emit: Callable[[torch.Tensor], None],
    ) -> Program:
        """`received`: gradient of the output (None on the last stage). `split`: queue weight gradients (I) instead of
        running them (B). `emit` takes the gradient of the input as soon as it exists."""
        ...

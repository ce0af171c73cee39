"""Values by tokens: learning rate, batch size, loss weights. Pure functions of (pieces, tokens)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.config import Ramp, StepValue

SHAPES = ("constant", "linear", "cosine")


def ramp_value(pieces: Sequence[Ramp], tokens: int) -> float:
    """The value after `tokens` tokens. Pieces follow each other; past the last one its end value holds (V3 section
    4.2)."""
    begin = 0
    for piece in pieces:
        if tokens < piece.until:
            if piece.shape == "constant":
                return piece.start
            x = (tokens - begin) / (piece.until - begin)
            if piece.shape == "cosine":
                x = 0.5 - 0.5 * math.cos(math.pi * x)
            return piece.start + (piece.end - piece.start) * x
        begin = piece.until
    last = pieces[-1]
    return last.start if last.shape == "constant" else last.end


def step_value(pieces: Sequence[StepValue], tokens: int) -> float:
    """The value in force after `tokens` tokens."""
    for piece in pieces:
        if tokens < piece.until:
            return piece.value
    return pieces[-1].value

"""Memory around what a kernel reads and writes: it must not be touched, and what is unwritten must show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.hopper import layout

BAND = 256
GARBAGE = 0xA5


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[None]:
    """Within, every result of these modules' kernels starts as garbage and lies between two bands of garbage; at the
    end the bands must be as they were."""
    buffers: list[Tensor] = []

    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffers.append(torch.full((size + 2 * BAND,), GARBAGE, dtype=torch.uint8))
        return buffers[-1][BAND : BAND + size].view(dtype).view(tuple(shape))

    with monkeypatch.context() as patch:
        for module in (layout, *modules):
            patch.setattr(module, "empty", empty)
        yield
    assert buffers
    for buffer in buffers:
        assert bool((buffer[:BAND] == GARBAGE).all()) and bool((buffer[-BAND:] == GARBAGE).all())


def surrounded(matrix: Tensor) -> Tensor:
    """The same matrix as a view into NaN (codes: 0x7F in every byte), its rows aligned."""
    bits = matrix.view(torch.uint8) if matrix.dtype == torch.float8_e4m3fn else matrix
    fill = float("nan") if bits.is_floating_point() else torch.iinfo(bits.dtype).max // (2 if bits is not matrix else 1)
    around = torch.full((bits.shape[0] + 2, bits.shape[1] + 32), fill, dtype=bits.dtype)
    inside = around[1:-1, 16:-16]
    inside.copy_(bits)
    return inside.view(matrix.dtype)

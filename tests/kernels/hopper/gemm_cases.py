"""What the tests of the Triton products share: operands, oracles, guarded results, kernels with one text changed."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.hopper import gemm_kernels, launch, layout
from kernels.quantize import Quantized, dequantize_reference, quantize_blocks, quantize_rows
from tests.kernels.oracles import calc_diff

AGAINST_BF16 = 1e-3
AGAINST_DEQUANTIZED = {torch.bfloat16: 1e-5, torch.float32: 1e-6}
# DeepSeek-V3's weights [N, K] divided by 16, then the widths that are no multiple of 128.
SHAPES = [(144, 448), (1536, 96), (2048, 32), (448, 1024), (256, 448), (448, 128), (576, 144), (48, 576), (2112, 48)]
GUARD = 4096


def random(*shape: int, seed: int = 0) -> Tensor:
    """BF16 normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def uneven(*shape: int) -> Tensor:
    """Random numbers whose size changes along rows and columns, so that no two scales are alike."""
    steps = [torch.linspace(1.0, 2.0, width) for width in shape[-2:]]
    return (random(*shape) * steps[0][:, None] * steps[1]).bfloat16()


def weight(w: Tensor) -> Quantized:
    """A weight in 128x128 blocks with its transposed copy."""
    q = quantize_blocks(w)
    transposed = q.data.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
    return Quantized(q.data, q.scale, transposed=transposed)


def rows_side_by_side(q: Quantized) -> Quantized:
    """The same rows with scales as our quantisers store them."""
    return Quantized(q.data, q.scale.t().contiguous().t(), q.counts)


def rows(x: Tensor) -> Quantized:
    return rows_side_by_side(quantize_rows(x))


def exact(a: Quantized, b: Quantized, *, transposed: bool = False) -> Tensor:
    """a b^T (or a b) of what is stored, in float64."""
    wide = dequantize_reference(b, torch.float64)
    return dequantize_reference(a, torch.float64) @ (wide if transposed else wide.mT)


def exact_groups(a: Quantized, b: Quantized, counts: Sequence[int], *, transposed: bool = False) -> Tensor:
    """Every expert's rows times its weight, in float64."""
    wide = dequantize_reference(b, torch.float64)
    parts = dequantize_reference(a, torch.float64).split(list(counts))
    return torch.cat([part @ (w if transposed else w.mT) for part, w in zip(parts, wide, strict=True)])


def agrees(found: Tensor, stored: Tensor, plain: Tensor | None = None) -> bool:
    """Both tiers: against the exact product of what is stored, and of what it was made from. NaN does not agree."""
    close = calc_diff(found, stored) < AGAINST_DEQUANTIZED[found.dtype]
    return close and (plain is None or calc_diff(found, plain) < AGAINST_BF16)


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Results lie between bands of NaN and hold NaN at first; at the end the bands are as they were.

    Yields the buffers. That every element was written shows in the result, which has no NaN then.
    """
    buffers: list[Tensor] = []

    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype, device=device))
        return buffers[-1][GUARD : GUARD + count].view(*shape)

    with monkeypatch.context() as patch:
        patch.setattr(layout, "empty", empty)
        yield buffers
    assert buffers
    for buffer in buffers:
        assert bands_untouched(buffer)


def bands_untouched(buffer: Tensor) -> bool:
    return bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all())


def use_mutant(monkeypatch: pytest.MonkeyPatch, folder: Path, old: str, new: str) -> None:
    """From now on the launches run kernels with the text `old` replaced by `new`."""
    mutant = load_changed(gemm_kernels, folder, old, new)
    for name in ("rows_by_blocks", "columns_by_columns"):
        monkeypatch.setattr(launch, name, getattr(mutant, name))


def load_changed(module: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """A module from its source with one text replaced. The interpreter reads kernels from files."""
    source = inspect.getsource(module)
    assert old in source, f"{old!r} is not in {module.__name__}"
    path = folder / "changed.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed", path)
    assert spec is not None and spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed

"""How close tiles of fused kernels are to the definition's: FP32 rounding may move a number over a boundary of BF16 or
E4M3, and with a tile's largest number its scale."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quantize import Quantized

# Codes that may differ, each by one step; scales that may differ by more than FP32 rounding, by a step of BF16.
SHARE = 1e-4
BF16_STEP = 2.0**-7
# Of sums that nearly cancel.
FP32_ROUNDING = 2.0**-17


def steps(codes: Tensor) -> Tensor:
    """E4M3 codes as integers in the order of their values."""
    bits = codes.view(torch.uint8).to(torch.int16)
    return torch.where(bits >= 128, 128 - bits, bits)


def assert_close(found: Quantized, expected: Quantized) -> None:
    """`found` is `expected` but for a few neighbours."""
    assert found.shape == expected.shape and found.scale.shape == expected.scale.shape
    assert found.counts == expected.counts
    apart = (steps(found.data) - steps(expected.data)).abs()
    ratio = (found.scale / expected.scale - 1.0).abs()
    if found.scale.numel():
        assert float(ratio.max()) <= BF16_STEP
        moved = ratio > FP32_ROUNDING
        assert int(moved.sum()) <= moved.numel() * SHARE
        assert int(apart.max()) <= 1
        assert int((apart > 0).sum()) <= apart.numel() * SHARE


def assert_rows(found: Quantized, expected: Quantized, padding: bool = True) -> None:
    """Close, and stored as `layout.row_scales` says, the padding written (garbage is negative) unless groups end in
    it."""
    assert_close(found, expected)
    assert found.data.is_contiguous()
    tiles, stride = found.scale.shape[1], found.scale.stride(1)
    if found.scale.numel():
        assert found.scale.stride(0) == 1 and stride % 16 == 0
    if found.scale.numel() and padding:
        whole = found.scale.t().as_strided((tiles, stride), (stride, 1))
        assert bool((whole[:, found.rows :] >= 0).all()) and bool(whole[:, found.rows :].isfinite().all())


def assert_columns(found: Quantized, expected: Quantized) -> None:
    """Close, with the tokens contiguous and padded with zeros to whole tiles."""
    assert_close(found, expected)
    features, tokens = found.shape
    if tokens:
        padded = found.data.stride(0)
        assert padded % 128 == 0 and padded - tokens < 128 and found.data.stride(1) == 1
        whole = found.data.view(torch.uint8).as_strided((features, padded), (padded, 1))
        assert not whole[:, tokens:].any()
        assert found.scale.stride() == (1, features)

"""Oracles and measures shared by the kernel tests, written without the code under test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def calc_diff(x: Tensor, y: Tensor) -> float:
    """DeepGEMM's measure: 1 - 2 x.y / (x.x + y.y) in float64; about half the squared relative error."""
    x, y = x.double(), y.double()
    return float(((x - y) ** 2).sum() / (x * x + y * y).sum())


def minifloat_values(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Values of all codes of a sign-exponent-mantissa format, read as if every exponent were an ordinary one."""
    values = []
    for code in range(1 << (1 + exponent_bits + mantissa_bits)):
        mantissa = code & ((1 << mantissa_bits) - 1)
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
        if exponent == 0:
            values.append(sign * math.ldexp(mantissa, 1 - bias - mantissa_bits))
        else:
            values.append(sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits))
    return np.array(values)


def round_by_search(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Codes of the nearest of the ascending `magnitudes` (index = code), ties to the even code, saturating."""
    size = np.abs(x.astype(np.float64))
    upper = np.clip(np.searchsorted(magnitudes, size), 1, len(magnitudes) - 1)
    below, above = size - magnitudes[upper - 1], magnitudes[upper] - size
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(take_upper, upper, upper - 1)


def quantize_tiles(
    x: np.ndarray, row_tile: int, column_tile: int, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(E4M3 bytes, FP32 scales) of a matrix, tile by tile."""
    magnitudes = minifloat_values(4, 3, 7)[:127]
    rows, columns = x.shape
    codes = np.zeros(x.shape, dtype=np.uint8)
    scales = np.zeros((-(-rows // row_tile), -(-columns // column_tile)), dtype=np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = np.s_[i * row_tile : (i + 1) * row_tile, j * column_tile : (j + 1) * column_tile]
            tile = x[where].astype(np.float32)
            scale = np.maximum(np.abs(tile).max(), np.float32(2.0**-100)) / np.float32(448)
            if power_of_two:
                mantissa, exponent = math.frexp(scale)
                scale = np.float32(math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))
            scaled = tile * (np.float32(1) / scale)
            codes[where] = round_by_search(scaled, magnitudes) | (np.signbit(scaled).astype(np.uint8) << 7)
            scales[i, j] = scale
    return codes, scales


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradients of `function(*inputs)` in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream.double())


def largest_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300))

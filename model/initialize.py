"""Initial values: a function of (seed, canonical name, row) alone, so that no layout or shard changes them.

Rows are drawn in blocks of 128, each from its own counter-based generator, so a rank draws only the rows it owns.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from model.config import ModelConfig
from model.names import canonical_shapes, is_norm, is_router_bias, load_canonical

BLOCK_ROWS = 128


def _block(name: str, block: int, columns: int, rows: int, seed: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal((rows, columns), dtype=np.float32)


def initial_rows(
    name: str, shape: tuple[int, ...], std: float, seed: int, first_row: int, last_row: int
) -> torch.Tensor:
    """Rows [first_row, last_row) of a canonical tensor of `shape`, flattened to two dimensions: [rows, columns]
    float32.

    Normal(0, std); norms are 1 and router biases 0. One-dimensional tensors have one column.
    """
    total, columns = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    if not 0 <= first_row <= last_row <= total:
        raise ValueError(f"{name}: rows {first_row}..{last_row} are not within 0..{total}")
    rows = last_row - first_row
    if is_norm(name) or is_router_bias(name):
        return torch.full((rows, columns), 1.0 if is_norm(name) else 0.0)
    values = np.empty((rows, columns), dtype=np.float32)
    for block in range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        drawn = _block(name, block, columns, min(BLOCK_ROWS, total - start), seed)
        low, high = max(first_row, start), min(last_row, start + len(drawn))
        values[low - first_row : high - first_row] = drawn[low - start : high - start]
    values *= np.float32(std)
    return torch.from_numpy(values)


def initial_tensor(name: str, config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole canonical tensor `name` in float32 and in its true shape."""
    shapes = canonical_shapes(config)
    if name not in shapes:
        raise ValueError(f"{name}: not a tensor of model {config.name!r}")
    shape = shapes[name]
    return initial_rows(name, shape, config.init_std, seed, 0, shape[0]).view(shape)


def initialize(module: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill a module (a layer, a depth, the whole model) with its initial values; `prefix` is its place, with its
    dot.
    """
    shapes = canonical_shapes(config)

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        return initial_rows(name, shape, config.init_std, seed, 0, shape[0]).view(shape)

    load_canonical(module, read, prefix)

"""The memory-bound kernels as they are benched: ours, the definition, and arguments of DeepSeek-V3's sizes.

Shapes: M tokens, D model width, F expert width, X rows of experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels import e5m6, norm, permute, quantize, swiglu
from kernels.e5m6 import E5M6
from kernels.quantize import Quantized


@dataclass(frozen=True)
class Sizes:
    """tokens: a rank's share of a step. hidden, expert: widths. weight: of an expert's gate and up. repeats: experts of
    a token."""

    tokens: int = 16384
    hidden: int = 7168
    expert: int = 2048
    weight: tuple[int, int] = (4096, 7168)
    repeats: int = 2


@dataclass(frozen=True)
class Stream:
    """arguments(device, dtype, seed) for both functions. exact: the same bits as the definition's."""

    name: str
    ours: Callable[..., Any]
    definition: Callable[..., Any]
    arguments: Callable[[torch.device, torch.dtype, int], tuple[Any, ...]]
    exact: bool = False


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors of arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Quantized):
        yield from tensors((tree.data, tree.scale, tree.transposed))
    elif isinstance(tree, E5M6):
        yield from (tree.codes, tree.scale)
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors(each)


def streams(package: str = "kernels.hopper", sizes: Sizes | None = None) -> list[Stream]:
    """Every one whose op has a module in `package`."""
    s = sizes or Sizes()
    tokens, hidden, expert = s.tokens, s.hidden, s.expert
    ours = {op: import_module(f"{package}.{op}") for op in ("quantize", "norm", "swiglu", "permute", "e5m6")}
    definitions = {"quantize": quantize, "norm": norm, "swiglu": swiglu, "permute": permute, "e5m6": e5m6}

    def rows(*widths: int) -> Callable[[torch.device, torch.dtype, int], tuple[Any, ...]]:
        return lambda device, dtype, seed: tuple(
            _normal(device, dtype, seed + i, tokens, w) for i, w in enumerate(widths)
        )

    def weight(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return (_normal(device, dtype, seed, *s.weight),)

    def tiles(width: int) -> Callable[[torch.device, torch.dtype, int], tuple[Any, ...]]:
        return lambda device, dtype, seed: (quantize.quantize_rows(_normal(device, dtype, seed, tokens, width)),)

    def norm_arguments(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return _normal(device, dtype, seed, tokens, hidden), _normal(device, dtype, seed + 1, hidden), 1e-6

    def norm_backward(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return (_normal(device, dtype, seed + 2, tokens, hidden), *norm_arguments(device, dtype, seed))

    def hidden_tiles(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return (*tiles(2 * expert)(device, dtype, seed), _weights(device, seed, tokens))

    def hidden_backward(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return (_normal(device, dtype, seed + 2, tokens, expert), *hidden_tiles(device, dtype, seed))

    def gate_up(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return _normal(device, dtype, seed, tokens, 2 * expert), _weights(device, seed, tokens)

    def taken(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return (*tiles(hidden)(device, dtype, seed), _index(device, seed, tokens, s.repeats))

    def summed(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        index = _index(device, seed, tokens, s.repeats)
        return _normal(device, dtype, seed, len(index), hidden), index, tokens

    def encoded(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
        return (e5m6.encode(_normal(device, dtype, seed, tokens, hidden)),)

    described: list[tuple[str, str, Any, bool]] = [
        ("quantize", "quantize_rows", rows(hidden), True),
        ("quantize", "quantize_columns", rows(hidden), True),
        ("quantize", "quantize_both", rows(hidden), True),
        ("quantize", "quantize_blocks", weight, True),
        ("quantize", "requantize_columns", tiles(hidden), True),
        ("norm", "rmsnorm", norm_arguments, False),
        ("norm", "rmsnorm_rows", norm_arguments, False),
        ("norm", "rmsnorm_columns", norm_arguments, False),
        ("norm", "rmsnorm_backward", norm_backward, False),
        ("swiglu", "swiglu_tiles", gate_up, False),
        ("swiglu", "swiglu_columns", hidden_tiles, False),
        ("swiglu", "swiglu_backward_tiles", hidden_backward, False),
        ("permute", "take_rows", taken, True),
        ("permute", "sum_rows", summed, False),
        ("e5m6", "encode", rows(hidden), True),
        ("e5m6", "decode", encoded, True),
        ("e5m6", "decode_columns", encoded, True),
    ]
    return [
        Stream(f"{op}.{name}", getattr(ours[op], name), getattr(definitions[op], name), arguments, exact)
        for op, name, arguments, exact in described
    ]


def _normal(device: torch.device, dtype: torch.dtype, seed: int, *size: int) -> Tensor:
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=draw, device=device, dtype=torch.float32).to(dtype)


def _weights(device: torch.device, seed: int, tokens: int) -> Tensor:
    """Router weights [M], FP32."""
    return torch.rand(tokens, generator=torch.Generator(device).manual_seed(seed), device=device)


def _index(device: torch.device, seed: int, tokens: int, repeats: int) -> Tensor:
    """int64 [X]: every token `repeats` times, in any order."""
    order = torch.randperm(tokens * repeats, generator=torch.Generator(device).manual_seed(seed), device=device)
    return order % tokens

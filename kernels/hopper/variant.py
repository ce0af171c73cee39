"""One compiled form of a Triton kernel, said in the terms of the ahead-of-time compiler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants fixed. Every module of this package lists its own in `variants()`.

    name: unique over all modules, e.g. `gemm fprop ws 128x192`. kernel: the `@triton.jit` function. signature: type of
    every argument that is not a constant, as the compiler writes it (`*fp8e4nv`, `*fp32`, `i32`). constants: value of
    every `tl.constexpr`. aligned: arguments that are divisible by 16 at every launch, pointers and widths: the launcher
    specialises on it, and vector loads depend on it. An integer argument that is always 1 belongs in `constants`.
    tile: (rows, columns, depth) of a GEMM's tile. plain_twin: name of the variant that computes the same without warp
    specialisation.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    tile: tuple[int, int, int] | None = None
    warp_specialised: bool = False
    plain_twin: str | None = None

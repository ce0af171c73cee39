"""The products of DeepSeek-V3 that GEMMs are timed with: DeepGEMM's own list (its tests), and one rank's share of V3's
training step, 4 sequences of 4,096 tokens.

A product is result [rows, columns] summed over `depth`. M tokens; N output and K input features of a weight [N, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.compiled.cost import BF16_WRITTEN, FP32_ACCUMULATED, Problem
from kernels.hopper.tile import DGRAD, FPROP, GROUPED_DGRAD, GROUPED_FPROP, GROUPED_WGRAD, WGRAD

# Weights of V3 by what they compute, (N, K).
WEIGHTS: dict[str, tuple[int, int]] = {
    "q_a and kv_a": (2112, 7168),
    "kv_a": (576, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o_proj": (7168, 16384),
    "gate, up": (4096, 7168),
    "down": (7168, 2048),
}
EXPERT_WEIGHTS = ("gate, up", "down")


@dataclass(frozen=True)
class Shape:
    """One product. counts: rows of each group as it is run; empty for a dense one. published: DeepGEMM's TFLOPS on H800
    (README at commit 327ec92; weight gradients: PR 95)."""

    name: str
    problem: Problem
    counts: tuple[int, ...] = ()
    published: float | None = None

    @property
    def size(self) -> str:
        found = self.problem
        groups = f" in {found.groups} groups" if found.groups > 1 else ""
        return f"{found.rows}x{found.columns}x{found.depth}{groups}"

    @property
    def label(self) -> str:
        return f"{self.problem.kind} {self.size}"


PUBLISHED: dict[tuple[str, int, int, int, int], float] = {
    (FPROP, 4096, 2112, 7168, 1): 1127,
    (FPROP, 4096, 24576, 1536, 1): 1212,
    (FPROP, 4096, 32768, 512, 1): 775,
    (FPROP, 4096, 7168, 16384, 1): 1520,
    (FPROP, 4096, 4096, 7168, 1): 1410,
    (FPROP, 4096, 7168, 2048, 1): 1168,
    (GROUPED_FPROP, 32768, 4096, 7168, 4): 1346,
    (GROUPED_FPROP, 32768, 7168, 2048, 4): 1214,
    (WGRAD, 7168, 2112, 4096, 1): 920,
    (WGRAD, 1536, 24576, 4096, 1): 986,
    (WGRAD, 512, 32768, 4096, 1): 878,
    (WGRAD, 16384, 7168, 4096, 1): 994,
    (WGRAD, 7168, 4096, 4096, 1): 942,
    (WGRAD, 2048, 7168, 4096, 1): 920,
    (WGRAD, 7168, 2112, 8192, 1): 1052,
    (WGRAD, 1536, 24576, 8192, 1): 1092,
    (WGRAD, 512, 32768, 8192, 1): 1014,
    (GROUPED_WGRAD, 7168, 4096, 16384, 4): 939,
    (GROUPED_WGRAD, 2048, 7168, 16384, 4): 900,
    (GROUPED_WGRAD, 7168, 4096, 32768, 4): 1044,
    (GROUPED_WGRAD, 2048, 7168, 32768, 4): 1033,
}


def _shape(name: str, kind: str, rows: int, columns: int, depth: int, counts: Sequence[int] = ()) -> Shape:
    output_bytes = FP32_ACCUMULATED if kind in (WGRAD, GROUPED_WGRAD) else BF16_WRITTEN
    problem = Problem(kind, rows, columns, depth, len(counts) or 1, output_bytes)
    published = PUBLISHED.get((kind, rows, columns, depth, problem.groups))
    return Shape(name, problem, tuple(counts), published)


def dense_forward(tokens: Sequence[int] = (64, 128, 4096, 16384)) -> list[Shape]:
    """Y [M, N]."""
    return [_shape(name, FPROP, m, n, k) for m in tokens for name, (n, k) in WEIGHTS.items()]


def dense_dgrad(tokens: Sequence[int] = (4096,)) -> list[Shape]:
    """dX [M, K], sums over N."""
    return [_shape(name, DGRAD, m, k, n) for m in tokens for name, (n, k) in WEIGHTS.items()]


# Those of DeepGEMM's wgrad list, as it names their results.
WEIGHT_GRADIENTS = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))


def dense_wgrad(tokens: Sequence[int] = (4096, 8192)) -> list[Shape]:
    """dW, sums over tokens, added to FP32."""
    return [_shape("dW", WGRAD, rows, columns, m) for m in tokens for rows, columns in WEIGHT_GRADIENTS]


def grouped_forward(groups: Sequence[tuple[int, int]] = ((4, 8192), (8, 4096))) -> list[Shape]:
    """groups: (experts, rows of each)."""
    return [
        _shape(name, GROUPED_FPROP, experts * rows, *WEIGHTS[name], (rows,) * experts)
        for experts, rows in groups
        for name in EXPERT_WEIGHTS
    ]


def grouped_dgrad(groups: Sequence[tuple[int, int]] = ((4, 8192), (8, 4096))) -> list[Shape]:
    return [
        _shape(name, GROUPED_DGRAD, experts * rows, k, n, (rows,) * experts)
        for experts, rows in groups
        for name, (n, k) in ((name, WEIGHTS[name]) for name in EXPERT_WEIGHTS)
    ]


def grouped_wgrad(groups: Sequence[tuple[int, int]] = ((4, 4096), (4, 8192), (8, 4096), (16, 2048))) -> list[Shape]:
    """dW of every expert, sums over its tokens; the last of each size has an expert without tokens."""
    found = []
    for experts, rows in groups:
        for size in ((7168, 4096), (2048, 7168)):
            found.append(_shape("dW", GROUPED_WGRAD, *size, experts * rows, (rows,) * experts))
    experts, rows = groups[0]
    found.append(_shape("dW, an empty expert", GROUPED_WGRAD, 7168, 4096, experts * rows, _with_empty(experts, rows)))
    return found


def _with_empty(experts: int, rows: int) -> tuple[int, ...]:
    """The rows of the empty expert go to the first."""
    return (2 * rows, 0, *(rows,) * (experts - 2))


# The products that decide V3's step on 16,384 tokens of a rank with 4 experts: the bounds of the modelled rate, TFLOPS.
TRAINING_BOUNDS: dict[tuple[str, int, int, int, int], float] = {
    (GROUPED_FPROP, 32768, 4096, 7168, 4): 1150,
    (GROUPED_FPROP, 32768, 7168, 2048, 4): 1000,
    (FPROP, 16384, 7168, 16384, 1): 1200,
}


def deepseek_shapes() -> list[Shape]:
    """All of them, each kind in its order."""
    return [
        *dense_forward(),
        *dense_dgrad(),
        *dense_wgrad(),
        *grouped_forward(),
        *grouped_dgrad(),
        *grouped_wgrad(),
    ]


def correctness_shapes() -> list[Shape]:
    """What is compared with the definition before anything is timed: edges of tiles and blocks in every dimension,
    uneven experts, one of them empty."""
    counts = (4097, 0, 1000, 128, 2771)
    rows = sum(counts)
    # An expert's tokens are padded to whole blocks only where they are summed over.
    return [
        _shape("q_a and kv_a", FPROP, 4097, 2112, 7168),
        _shape("kv_a", FPROP, 1, 576, 7168),
        _shape("o_proj", FPROP, 4096, 7168, 16384),
        _shape("q_a and kv_a", DGRAD, 4097, 7168, 2112),
        _shape("kv_a", DGRAD, 129, 7168, 576),
        _shape("dW", WGRAD, 2112, 7168, 4097),
        _shape("dW", WGRAD, 576, 7168, 8192),
        _shape("gate, up", GROUPED_FPROP, rows, 4096, 7168, counts),
        _shape("down", GROUPED_FPROP, rows, 7168, 2048, counts),
        _shape("gate, up", GROUPED_DGRAD, rows, 7168, 4096, counts),
        _shape("dW", GROUPED_WGRAD, 4096, 7168, rows, counts),
    ]

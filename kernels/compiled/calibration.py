"""The published times that the cost model is fitted to, and others that it is held against.

TFLOPS, on H800 SXM where nothing else is said. `loss` of `FORWARD` and `WEIGHT_GRADIENT` is what the fitted constants
of `kernels.compiled.cost.H800` make small; `OUT_OF_SAMPLE` took no part in it. No figure here was measured for this
project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kernels.compiled.cost import BF16_WRITTEN, FP32_ACCUMULATED, H800, Machine, Problem, estimate, tile_cost
from kernels.compiled.properties import Properties
from kernels.hopper.tile import FPROP, GROUPED_FPROP, GROUPED_WGRAD, WGRAD

MULTICAST = 2
FITTED = ("clock_ghz", "l2_tb_s", "launch_us", "tile_us", "issue_clocks")
WEIGHT_GRADIENT_SHARE = 0.5


@dataclass(frozen=True)
class Point:
    """A time somebody published: the tile it was reached with and the rate."""

    problem: Problem
    tile: tuple[int, int]
    tflops: float
    source: str


def _forward(tile: tuple[int, int], source: str, *found: tuple[int, int, int, int]) -> list[Point]:
    return [Point(Problem(FPROP, m, n, k), tile, tflops, source) for m, n, k, tflops in found]


def _weight_gradient(source: str, *found: tuple[int, int, int, int, int]) -> list[Point]:
    return [
        Point(
            Problem(WGRAD if g == 1 else GROUPED_WGRAD, m, n, k * g, g, FP32_ACCUMULATED),
            (128, 152),
            tflops,
            source,
        )
        for g, m, n, k, tflops in found
    ]


# fmt: off
FORWARD = [
    *_forward((128, 128), "DeepGEMM PR 73 and 74, before", (4096, 24576, 1536, 999), (4096, 32768, 512, 591),
              (4096, 7168, 16384, 1404), (4096, 7168, 2048, 1031)),
    *_forward((128, 160), "DeepGEMM PR 74 and 81", (4096, 24576, 1536, 1164), (4096, 32768, 512, 775),
              (4096, 7168, 16384, 1460), (4096, 7168, 2048, 1195), (4096, 4096, 7168, 1304)),
    *_forward((256, 128), "DeepGEMM PR 81", (4096, 24576, 1536, 1204), (4096, 32768, 512, 777),
              (4096, 7168, 16384, 1500), (4096, 4096, 7168, 1377), (4096, 7168, 2048, 1159)),
]
WEIGHT_GRADIENT = [
    *_weight_gradient("DeepGEMM PR 95", (1, 7168, 2112, 4096, 920), (1, 1536, 24576, 4096, 986),
                      (1, 512, 32768, 4096, 878), (1, 16384, 7168, 4096, 994), (1, 7168, 4096, 4096, 942),
                      (1, 2048, 7168, 4096, 920), (1, 7168, 2112, 8192, 1052), (1, 1536, 24576, 8192, 1092),
                      (1, 512, 32768, 8192, 1014)),
    *_weight_gradient("DeepGEMM PR 95, as quoted in issue 107", (4, 7168, 4096, 4096, 939), (4, 2048, 7168, 4096, 900),
                      (4, 7168, 4096, 8192, 1044), (4, 2048, 7168, 8192, 1033), (8, 7168, 4096, 4096, 942)),
]
# fmt: on


def deep_gemm(tile: tuple[int, int], weight_gradient: bool) -> Properties:
    """What DeepGEMM's code must hold: its machine code is not at hand.

    One warp group that loads and two that multiply. 60 instructions of a block are neither products nor promotion, as
    in our own specialised kernels; those of 256 rows promote two halves one after the other, and the weight gradient
    loads the scales of its columns from shared memory.
    """
    rows, columns = tile
    accumulators = rows * columns // 256
    loop = {"QGMMA": 4 * (rows // 128), "FFMA": accumulators, "IMAD": 60}
    if weight_gradient:
        loop |= {"FMUL": accumulators, "LDS": columns // 8}
    return Properties(
        name=f"DeepGEMM {rows}x{columns}",
        triton="",
        tile=(rows, columns, 128),
        warps=12,
        num_stages=4,
        shared_bytes=0,
        registers=168,
        spill_bytes=0,
        tensor_core=f"QGMMA.64x{columns}x32.F32.E4M3.E4M3",
        consumers=2,
        accumulators=accumulators,
        setmaxnreg=True,
        hot_loop=loop,
    )


def modelled(point: Point, machine: Machine = H800) -> float:
    """TFLOPS."""
    code = deep_gemm(point.tile, point.problem.kind in (WGRAD, GROUPED_WGRAD))
    return estimate(code, point.problem, multicast=MULTICAST, machine=machine).tflops


def residuals(points: list[Point], machine: Machine = H800) -> list[float]:
    """ln(modelled / published) of each."""
    return [math.log(modelled(point, machine) / point.tflops) for point in points]


def loss(machine: Machine) -> float:
    """What the fit makes small."""

    def mean_square(points: list[Point]) -> float:
        return sum(each**2 for each in residuals(points, machine)) / len(points)

    return mean_square(FORWARD) + WEIGHT_GRADIENT_SHARE * mean_square(WEIGHT_GRADIENT)


@dataclass(frozen=True)
class Check:
    """A published rate that took no part in the fit, and the code and settings it is modelled with."""

    name: str
    problem: Problem
    tflops: float
    code: Properties
    multicast: int = 1
    resident: int = 1

    @property
    def modelled(self) -> float:
        return estimate(self.code, self.problem, multicast=self.multicast, resident=self.resident).tflops


def _serial(tile: tuple[int, int], warps: int, loop: dict[str, int]) -> Properties:
    """A kernel without specialised warps, as far as the model asks."""
    return replace(deep_gemm(tile, False), name="", warps=warps, consumers=warps // 4, setmaxnreg=False, hot_loop=loop)


# Neither scales nor promotion: products of one tile follow each other.
_PER_TENSOR = _serial((128, 256), 8, {"QGMMA": 4, "IMAD": 60})
_CONTIGUOUS = (("gate, up", 4096, 7168), ("down", 7168, 2048))


def _grouped(tile: tuple[int, int], source: str, *tflops: float) -> list[Check]:
    return [
        Check(
            f"DeepGEMM {tile[0]}x{tile[1]} grouped 4 x 8192, {name} ({source})",
            Problem(GROUPED_FPROP, 32768, n, k, 4),
            rate,
            deep_gemm(tile, False),
            MULTICAST,
        )
        for (name, n, k), rate in zip(_CONTIGUOUS, tflops, strict=True)
    ]


OUT_OF_SAMPLE = [
    *_grouped((128, 128), "PR 73, before", 1317, 1114),
    *_grouped((128, 160), "PR 73", 1381, 1262),
    Check(
        "Triton per-tensor 128x256, 4096^3, H100 (tritonbench issue 1149)",
        Problem(FPROP, 4096, 4096, 4096),
        1214,
        _PER_TENSOR,
    ),
    Check(
        "Triton per-tensor, tile assumed 128x256, 3584^3, H100 (triton PR 3546)",
        Problem(FPROP, 3584, 3584, 3584),
        1280,
        _PER_TENSOR,
    ),
    Check(
        "SGLang Triton 64x128, two blocks an SM, 4096x24576x7168, GPU not named (sglang PR 5207)",
        Problem(FPROP, 4096, 24576, 7168),
        640,
        _serial((64, 128), 4, {"QGMMA": 4, "FFMA": 64, "IMAD": 60, "LDGSTS": 12}),
        resident=2,
    ),
    Check(
        "DeepGEMM, tile assumed 128x160, 4096x24576x7168, GPU not named (sglang PR 5207)",
        Problem(FPROP, 4096, 24576, 7168),
        1221,
        deep_gemm((128, 160), False),
        MULTICAST,
    ),
]
# vLLM's Triton kernel on H20 (issue 49932) at 86 % of a peak of 1,024 products a clock: a K block of an assumed tile of
# 128x128 takes 330 clocks longer than its products.
H20_SERIAL_CLOCKS = 330.0


def serial_clocks() -> float:
    """The same by the model, for a loop of 64 FFMA and 90 others: what our plain kernel of that tile has."""
    code = _serial((128, 128), 8, {"QGMMA": 4, "FFMA": 64, "IMAD": 90})
    block_us = tile_cost(code, FPROP, BF16_WRITTEN).block_us
    return (block_us["promote"] - block_us["tensor"]) * H800.clock_ghz * 1e3

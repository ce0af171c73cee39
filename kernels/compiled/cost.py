"""Static cost model of the FP8 GEMMs on Hopper: a time from what the machine code holds, without running it.

A persistent kernel walks over tiles of the result; a tile costs

    tile_us + (refill, unless a producer runs ahead) + blocks of 128 of the depth * block + output bytes / L2 share

and the kernel `launch_us` plus as many tiles as its busiest SM gets, but never less than the bytes it must move over
the bandwidth of HBM. A block takes as long as the slowest of

    tensor    tile rows * columns * 128 products at 4096 a clock
    promote   one warp group's own products, then its instructions of the hot loop; warp groups that are specialised
              take turns, so a group has the tensor cores to itself; others go in step, and only a second product of an
              iteration runs under the promotion of the first
    l2        bytes of both tiles and of their scales; L2 is shared by all SMs
    latency   of a load, over the blocks in flight

Figures in clocks of one SM. The constants of `H800` that are marked fitted are the least squares of
`kernels.compiled.calibration`; the others are the device's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kernels.compiled.properties import Properties
from kernels.hopper.tile import GROUPED_WGRAD, TILES, WGRAD

K_BLOCK = 128
BF16_WRITTEN, FP32_WRITTEN, FP32_ACCUMULATED = 2, 4, 8
TENSOR_CORE = ("QGMMA", "HGMMA", "IGMMA")
PROMOTION = ("FFMA", "FMUL", "FADD")


@dataclass(frozen=True)
class Machine:
    """clock_ghz: what tensor-core kernels run at under load (fitted). l2_tb_s: of all SMs together (fitted). launch_us:
    per kernel (fitted). tile_us: per tile, what neither operands nor results explain (fitted). issue_clocks: per
    instruction of a warp that has its scheduler to itself (fitted). hbm_tb_s, products_per_clock, l2_bytes_per_clock
    (the last two of one SM): H800 SXM. l2_clocks, memory_clocks: latency of a load from L2 and from HBM (Luo et al.,
    "Benchmarking and dissecting the Nvidia Hopper GPU architecture via microbenchmarking", 2024).
    """

    num_sms: int = 132
    clock_ghz: float = 1.487
    l2_tb_s: float = 8.75
    launch_us: float = 6.15
    tile_us: float = 1.36
    issue_clocks: float = 2.2
    hbm_tb_s: float = 3.35
    products_per_clock: int = 4096
    l2_bytes_per_clock: int = 64
    l2_clocks: float = 263.0
    memory_clocks: float = 479.0


H800 = Machine()


@dataclass(frozen=True)
class Problem:
    """One product: result [rows, columns], summed over `depth`.

    kind: a key of `kernels.hopper.tile.TILES`. groups: experts; rows (grouped wgrad: depth) is the sum over them,
    spread evenly. output_bytes: moved per element of the result, 8 where FP32 is read, added to and written.
    """

    kind: str
    rows: int
    columns: int
    depth: int
    groups: int = 1
    output_bytes: int = BF16_WRITTEN

    def __post_init__(self) -> None:
        if self.kind not in TILES:
            raise ValueError(f"kind {self.kind!r}; allowed is one of {', '.join(TILES)}")
        if min(self.rows, self.columns, self.depth, self.groups) < 1:
            raise ValueError(
                f"{self.kind} of {self.rows}x{self.columns}x{self.depth} in {self.groups} groups: all must be positive"
            )

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.columns * self.depth

    @cached_property
    def memory_bytes(self) -> int:
        """What passes through HBM at least: operands once, results as `output_bytes` says."""
        weights = 1 if self.kind == GROUPED_WGRAD else self.groups
        results = self.groups if self.kind == GROUPED_WGRAD else 1
        operands = (self.rows + self.columns * weights) * self.depth
        return operands + self.rows * self.columns * results * self.output_bytes

    def split(self, tile_rows: int, tile_columns: int) -> tuple[int, int]:
        """(tiles, blocks of 128 of the depth that each sums)."""
        rows, depth = self.rows, self.depth
        if self.kind == GROUPED_WGRAD:
            depth = -(-depth // self.groups)
        else:
            rows = -(-rows // self.groups)
        tiles = self.groups * -(-rows // tile_rows) * -(-self.columns // tile_columns)
        return tiles, -(-depth // K_BLOCK)


@dataclass(frozen=True)
class KernelCost:
    """seconds of the kernel. tiles: all of them; waves: those of the busiest SM. block_us: how long a K block takes by
    each bound. bound: the one that decides, or `hbm`."""

    seconds: float
    tflops: float
    tiles: int
    waves: int
    block_us: dict[str, float]
    bound: str


@dataclass(frozen=True)
class TileCost:
    """What a kernel costs per tile and per K block on `blocks` resident blocks: everything but the problem's size.
    instructions: of a warp and K block."""

    rows: int
    columns: int
    blocks: int
    block_us: dict[str, float]
    bound: str
    tile_us: float
    machine: Machine
    instructions: int

    def microseconds(self, problem: Problem) -> tuple[float, float, int, int]:
        """(computing, moving bytes through HBM, tiles, waves), without the launch."""
        tiles, depth = problem.split(self.rows, self.columns)
        waves = -(-tiles // self.blocks)
        computing = waves * (self.tile_us + depth * self.block_us[self.bound])
        return computing, problem.memory_bytes / (self.machine.hbm_tb_s * 1e6), tiles, waves

    def seconds(self, problem: Problem) -> float:
        computing, moving, _, _ = self.microseconds(problem)
        return 1e-6 * (self.machine.launch_us + max(computing, moving))

    def of(self, problem: Problem) -> KernelCost:
        computing, moving, tiles, waves = self.microseconds(problem)
        seconds = self.seconds(problem)
        bound = "hbm" if moving > computing else self.bound
        return KernelCost(seconds, problem.operations / seconds / 1e12, tiles, waves, self.block_us, bound)


def tile_cost(
    properties: Properties,
    kind: str,
    output_bytes: int,
    num_sms: int | None = None,
    *,
    multicast: int = 1,
    resident: int = 1,
    machine: Machine = H800,
) -> TileCost:
    """num_sms: SMs that the kernel occupies, all by default. multicast: SMs that get a tile of an operand by one read
    of L2 (1 for all that Triton emits). resident: blocks of an SM (1 for persistent kernels). ValueError: no GEMM, or
    no such SMs."""
    sms = machine.num_sms if num_sms is None else num_sms
    if not 1 <= sms <= machine.num_sms:
        raise ValueError(f"num_sms {sms}; the machine has 1 to {machine.num_sms}")
    if properties.tile is None or not properties.consumers:
        raise ValueError(f"{properties.name}: no GEMM, so this model says nothing about it")
    rows, columns, _ = properties.tile
    clocks_per_us = machine.clock_ghz * 1e3
    l2_bytes_per_us = min(machine.l2_tb_s * 1e6 / sms, machine.l2_bytes_per_clock * clocks_per_us) / resident
    tensor, promote = _clocks(properties, machine)
    block_us = {
        "tensor": tensor * resident / clocks_per_us,
        "promote": promote / clocks_per_us,
        "l2": block_bytes(rows, columns, kind, multicast) / l2_bytes_per_us,
        "latency": machine.memory_clocks / clocks_per_us / properties.num_stages,
    }
    refill = 0.0 if properties.setmaxnreg else machine.memory_clocks / clocks_per_us
    return TileCost(
        rows=rows,
        columns=columns,
        blocks=sms * resident,
        block_us=block_us,
        bound=max(block_us, key=lambda name: block_us[name]),
        tile_us=machine.tile_us + refill + rows * columns * output_bytes / l2_bytes_per_us,
        machine=machine,
        instructions=sum(properties.hot_loop.values()),
    )


def estimate(
    properties: Properties,
    problem: Problem,
    num_sms: int | None = None,
    *,
    multicast: int = 1,
    resident: int = 1,
    machine: Machine = H800,
) -> KernelCost:
    """Time of one launch; arguments and errors of `tile_cost`."""
    cost = tile_cost(
        properties,
        problem.kind,
        problem.output_bytes,
        num_sms,
        multicast=multicast,
        resident=resident,
        machine=machine,
    )
    return cost.of(problem)


def block_bytes(rows: int, columns: int, kind: str, multicast: int = 1) -> float:
    """What an SM reads from L2 for one K block. With multicast the larger saving is taken."""
    shared = min(rows / multicast + columns, rows + columns / multicast)
    # One FP32 scale for each 1x128 tile; those of 128x128 blocks are too few to count.
    scales = rows + columns if kind in (WGRAD, GROUPED_WGRAD) else rows
    return shared * K_BLOCK + 4 * scales


def _clocks(properties: Properties, machine: Machine) -> tuple[float, float]:
    """(tensor, promote) of a K block."""
    assert properties.tile is not None
    rows, columns, _ = properties.tile
    tensor = rows * columns * K_BLOCK / machine.products_per_clock
    loop = properties.hot_loop
    if not any(loop.get(name) for name in PROMOTION):
        return tensor, 0.0  # nothing waits for a product inside the loop
    products = sum(loop.get(name, 0) for name in TENSOR_CORE)
    # Instructions of 32 of the depth: four make a product, and the loop waits after each product.
    parts = max(1, products * 32 // K_BLOCK)
    others = sum(loop.values()) - products
    early = sum(loop.get(name, 0) for name in PROMOTION) * (parts - 1) / parts
    if not properties.setmaxnreg:
        issue = others * max(machine.issue_clocks, properties.warps / 4)
        hidden = min(early * machine.issue_clocks, tensor * (parts - 1) / parts)
        return tensor, tensor + issue - hidden
    # Where the scales make one factor, a consumer multiplies them before its last product begins and waits for them,
    # less what it promotes meanwhile. Where each promotes on its own (FMUL and FFMA), they arrive under the product.
    one_factor = 2 * loop.get("FMUL", 0) < loop.get("FFMA", 0)
    waited = max(0.0, machine.l2_clocks - early * machine.issue_clocks) if loop.get("LDG") and one_factor else 0.0
    turn = tensor / properties.consumers + waited + others * machine.issue_clocks
    return tensor, max(turn, float(others * properties.consumers))

"""Tiles of the GEMM kernels: which exist and what they are called."""

from __future__ import annotations

from dataclasses import dataclass

FPROP, DGRAD, WGRAD = "fprop", "dgrad", "wgrad"
GROUPED_FPROP, GROUPED_DGRAD, GROUPED_WGRAD = "grouped fprop", "grouped dgrad", "grouped wgrad"


@dataclass(frozen=True)
class TileConfig:
    """What one program computes at a time, and how.

    rows, columns: outputs of a tile. num_warps: as asked of the compiler; a warp-specialised kernel is asked for 4 and
    gets 12: one group that loads, two that multiply. num_stages: blocks of 128 of the summed dimension that shared
    memory holds. group: row tiles that are walked together over the columns, so that operands are found in L2.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    warp_specialised: bool = False
    group: int = 8

    @property
    def name(self) -> str:
        """Form and size, e.g. `ws 128x192`."""
        return f"{'ws' if self.warp_specialised else 'plain'} {self.rows}x{self.columns}"


WS_128 = TileConfig(128, 128, num_warps=4, num_stages=4, warp_specialised=True)
WS_192 = TileConfig(128, 192, num_warps=4, num_stages=4, warp_specialised=True)
PLAIN_64 = TileConfig(64, 128, num_warps=4, num_stages=4)
PLAIN_128 = TileConfig(128, 128, num_warps=8, num_stages=4)
PLAIN_192 = TileConfig(128, 192, num_warps=8, num_stages=3)

_BY_BLOCKS = (WS_128, WS_192, PLAIN_64, PLAIN_128, PLAIN_192)
_BY_COLUMNS = (WS_128, PLAIN_128)
# Every tile that may be chosen for a kind of product.
TILES: dict[str, tuple[TileConfig, ...]] = {
    FPROP: _BY_BLOCKS,
    DGRAD: _BY_BLOCKS,
    WGRAD: _BY_COLUMNS,
    GROUPED_FPROP: _BY_BLOCKS,
    GROUPED_DGRAD: _BY_BLOCKS,
    GROUPED_WGRAD: _BY_COLUMNS,
}


def plain_twin(tile: TileConfig) -> TileConfig:
    """The tile of the same size without warp specialisation."""
    return {WS_128: PLAIN_128, WS_192: PLAIN_192}[tile]

"""Kernels with one fault each, which the second tier of accuracy or the guard bands must see, of every product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.hopper import gemm, grouped
from kernels.hopper.launch import block_table, row_table
from kernels.hopper.tile import WS_128, WS_192, TileConfig
from kernels.quantize import Quantized, quantize_columns
from kernels.tiles import tile_count
from tests.kernels.hopper.gemm_cases import (
    agrees,
    bands_untouched,
    exact,
    exact_groups,
    guarded,
    random,
    rows,
    uneven,
    use_mutant,
    weight,
)
from tests.kernels.interpreter import repaired

M, N, K = 256, 384, 256
COUNTS = (100, 0, 156)
Product = Callable[[TileConfig], tuple[Tensor, Tensor]]


def fprop(tile: TileConfig) -> tuple[Tensor, Tensor]:
    """(result in FP32, exact product of what is stored)."""
    x, w = rows(uneven(M, K)), weight(uneven(N, K))
    return gemm.fprop(x, w, torch.float32, tile=tile), exact(x, w)


def dgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, w = rows(uneven(M, K)), weight(uneven(K, N))
    return gemm.dgrad(dy, w, torch.float32, tile=tile), exact(dy, w, transposed=True)


def wgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, x = quantize_columns(uneven(M, 144)), quantize_columns(uneven(M, 208))
    return gemm.wgrad(dy, x, tile=tile), exact(dy, x)


def grouped_fprop(tile: TileConfig) -> tuple[Tensor, Tensor]:
    x, w = rows(uneven(M, K)), weight(uneven(len(COUNTS), N, K))
    return grouped.fprop(x, w, COUNTS, torch.float32, tile=tile), exact_groups(x, w, COUNTS)


def grouped_dgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, w = rows(uneven(M, K)), weight(uneven(len(COUNTS), K, N))
    return grouped.dgrad(dy, w, COUNTS, torch.float32, tile=tile), exact_groups(dy, w, COUNTS, transposed=True)


def grouped_wgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    counts = (256, 0, 512)
    dy, x = quantize_columns(uneven(768, 144), counts=counts), quantize_columns(uneven(768, 208), counts=counts)
    parts = [slice(0, 256), slice(256, 256), slice(256, 768)]
    stored = [exact(_part(dy, part), _part(x, part)) for part in parts]
    return grouped.wgrad(dy, x, counts, tile=tile), torch.stack(stored)


def _part(q: Quantized, columns: slice) -> Quantized:
    blocks = slice(columns.start // 128, tile_count(columns.stop, 128))
    return Quantized(q.data[:, columns], q.scale[:, blocks])


BY_BLOCKS = [fprop, dgrad, grouped_fprop, grouped_dgrad]
BY_COLUMNS = [wgrad, grouped_wgrad]

ROW_MUTANTS = {
    "a's scale of the next block": ("tl.load(a_scales + block *", "tl.load(a_scales + (block ^ 1) *"),
    "b's scale of the next block along K": ("tl.load(b_scales + block *", "tl.load(b_scales + (block ^ 1) *"),
    "b's scale of the next columns": ("tl.minimum(column // BLOCK, last_block)", "(last_block - column // BLOCK)"),
    "narrow b's scale of the next block": ("tl.load(narrow_scales + block *", "tl.load(narrow_scales + (block ^ 1) *"),
    "narrow b's scale of the next columns": (
        "tl.minimum(narrow // BLOCK, last_block)",
        "(last_block - narrow // BLOCK // 2)",
    ),
    "the last of K dropped": ("a_ptr, [rows, depth]", "a_ptr, [rows, depth - 1]"),
    "a block of K dropped": ("tl.range(0, tl.cdiv(depth, BLOCK))", "tl.range(1, tl.cdiv(depth, BLOCK))"),
    "an unwritten tile": (
        "tl.program_id(0), row_tiles * column_tiles,",
        "tl.program_id(0), row_tiles * column_tiles - 1,",
    ),
    "a tile written twice, another never": ("tile % band % height,", "tile % band % height * 0,"),
    "no exchange on odd tiles": ("odd = column_tile % 2", "odd = column_tile * 0"),
}
COLUMN_MUTANTS = {
    "a's scale of the next block": ("tl.load(a_scales + block *", "tl.load(a_scales + (block ^ 1) *"),
    "even scales of the next block": ("tl.load(even_scales + block *", "tl.load(even_scales + (block ^ 1) *"),
    "odd scales are the even ones": ("even_scales + b_scale_row_stride + block", "even_scales + block"),
    "the last token dropped": ("a_ptr, [rows, tokens]", "a_ptr, [rows, tokens - 1]"),
    "an unwritten tile": ("tl.program_id(0), experts * tiles,", "tl.program_id(0), experts * tiles - 1,"),
}


@pytest.mark.parametrize("product", BY_BLOCKS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("mutant", ROW_MUTANTS)
def test_faults_of_rows_by_blocks(
    product: Product, mutant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_mutant(monkeypatch, tmp_path, *ROW_MUTANTS[mutant])
    with guarded(monkeypatch):
        assert not agrees(*product(WS_192))


@pytest.mark.parametrize("product", BY_COLUMNS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("mutant", COLUMN_MUTANTS)
def test_faults_of_columns_by_columns(
    product: Product, mutant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_mutant(monkeypatch, tmp_path, *COLUMN_MUTANTS[mutant])
    with guarded(monkeypatch):
        assert not agrees(*product(WS_128))


@pytest.mark.parametrize("product", [*BY_BLOCKS, *BY_COLUMNS], ids=lambda each: each.__name__)
def test_the_same_cases_pass_without_a_fault(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(monkeypatch):
        assert agrees(*product(WS_192 if product in BY_BLOCKS else WS_128))


@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize("product", [grouped_fprop, grouped_dgrad], ids=lambda each: each.__name__)
def test_a_border_between_experts_off_by_one(product: Product, column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(counts: tuple[int, ...], tile_rows: int, device: torch.device) -> Tensor:
        table = row_table(counts, tile_rows, device)
        if column == 1:
            table[1:, 1] += 1
        else:
            table[0, 2] -= 1
        return table

    monkeypatch.setattr(grouped, "row_table", moved)
    assert not agrees(*product(WS_128))


def test_a_border_between_token_groups_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(counts: tuple[int, ...], device: torch.device) -> Tensor:
        table = block_table(counts, device)
        table[1:3] += 1
        return table

    monkeypatch.setattr(grouped, "block_table", moved)
    assert not agrees(*grouped_wgrad(WS_128))


@pytest.mark.parametrize("tile", [WS_128, WS_192], ids=lambda tile: tile.name)
def test_rows_stored_beyond_the_last_expert(tile: TileConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_mutant(monkeypatch, tmp_path, "own_rows[:, None] < end) & (own_columns[None, :] < columns)\n    tl.store", MANY)
    with pytest.raises(AssertionError), guarded(monkeypatch) as buffers:
        grouped_fprop(tile)
    assert not all(map(bands_untouched, buffers))


MANY = "own_rows[:, None] < end + 1) & (own_columns[None, :] < columns)\n    tl.store"


# Scales of one, so that the faulty kernel may leave them out; positive numbers, whose sums grow.
DEPTH = 1024


def ones(count: int) -> Quantized:
    codes = random(count, DEPTH).abs().float().to(torch.float8_e4m3fn)
    return Quantized(codes, torch.ones(count, DEPTH // 128))


def unit_weight(*shape: int) -> Quantized:
    codes = random(*shape).abs().float().to(torch.float8_e4m3fn)
    transposed = codes.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
    scale = torch.ones(*shape[:-2], *(tile_count(width, 128) for width in shape[-2:]))
    return Quantized(codes, scale, transposed=transposed)


def unpromoted_fprop(tile: TileConfig) -> tuple[Tensor, Tensor]:
    x, w = ones(16), unit_weight(192, DEPTH)
    return gemm.fprop(x, w, torch.float32, tile=tile), exact(x, w)


def unpromoted_dgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, w = ones(16), unit_weight(DEPTH, 192)
    return gemm.dgrad(dy, w, torch.float32, tile=tile), exact(dy, w, transposed=True)


def unpromoted_grouped_fprop(tile: TileConfig) -> tuple[Tensor, Tensor]:
    x, w = ones(16), unit_weight(1, 192, DEPTH)
    return grouped.fprop(x, w, (16,), torch.float32, tile=tile), exact_groups(x, w, (16,))


def unpromoted_grouped_dgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, w = ones(16), unit_weight(1, DEPTH, 192)
    return grouped.dgrad(dy, w, (16,), torch.float32, tile=tile), exact_groups(dy, w, (16,), transposed=True)


def unpromoted_wgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, x = ones(16), ones(32)
    return gemm.wgrad(dy, x, tile=tile), exact(dy, x)


def unpromoted_grouped_wgrad(tile: TileConfig) -> tuple[Tensor, Tensor]:
    dy, x = (Quantized(each.data, each.scale, (DEPTH,)) for each in (ones(16), ones(32)))
    return grouped.wgrad(dy, x, (DEPTH,), tile=tile), exact(dy, x)[None]


WIDE = (
    "sums = tl.fma(tl.dot(a, b.T), (a_scale * b_scale)[:, None], sums)\n            if",
    "sums = tl.dot(a, b.T, sums)\n            if",
)
NARROW = (
    "narrow_sums = tl.fma(tl.dot(a, narrow_b.T), (a_scale * narrow_scale)[:, None], narrow_sums)",
    "narrow_sums = tl.dot(a, narrow_b.T, narrow_sums)",
)
TOKENS = (
    "sums = tl.fma(tl.dot(a, b.T) * a_scale[:, None], b_scale[None, :], sums)",
    "sums = tl.dot(a, b.T, sums)",
)
UNPROMOTED = [
    *((product, WS_192, change) for product in (unpromoted_fprop, unpromoted_dgrad) for change in (WIDE, NARROW)),
    *((product, WS_128, WIDE) for product in (unpromoted_grouped_fprop, unpromoted_grouped_dgrad)),
    *((product, WS_128, TOKENS) for product in (unpromoted_wgrad, unpromoted_grouped_wgrad)),
]


@pytest.mark.parametrize("case", UNPROMOTED, ids=lambda case: f"{case[0].__name__} {case[1].name}")
def test_skipped_promotion(
    case: tuple[Product, TileConfig, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    product, tile, change = case
    with repaired(hopper_accumulator=True):
        assert agrees(*product(tile))
        use_mutant(monkeypatch, tmp_path, *change)
        assert not agrees(*product(tile))
    # In exact arithmetic it is the same kernel.
    assert agrees(*product(tile))

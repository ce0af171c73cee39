"""The dense Triton products: both tiers of accuracy for every tile and shape, edges, memory that may not be touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import gemm as definition
from kernels.hopper import gemm, launch
from kernels.hopper.launch import with_aligned_rows
from kernels.hopper.tile import PLAIN_64, PLAIN_128, TILES, WS_128, WS_192, TileConfig, plain_twin
from kernels.observe import AuditRecorder, observing
from kernels.quantize import Quantized, quantize_columns, quantize_rows, requantize_columns
from tests.kernels.hopper.gemm_cases import (
    SHAPES,
    agrees,
    exact,
    guarded,
    random,
    rows,
    rows_side_by_side,
    weight,
)
from tests.kernels.oracles import calc_diff

BY_BLOCKS = [pytest.param(tile, id=tile.name) for tile in TILES["fprop"]]
BY_COLUMNS = [pytest.param(tile, id=tile.name) for tile in TILES["wgrad"]]
M = 130
PROGRAMS = 5  # fewer than tiles: every program has several
MANY_ROWS = [(4097, tile) for tile in (WS_128, WS_192, PLAIN_64)]


def name_of(each: object) -> str:
    return each.name if isinstance(each, TileConfig) else str(each)


@pytest.mark.parametrize("tile", BY_BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_input_gradient(tile: TileConfig, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = shape
    x, w, dy = random(M, k), random(n, k), random(M, n)
    x[M // 2], dy[M // 3] = 0.0, 0.0
    qx, qw, qdy = rows(x), weight(w), rows(dy)
    with guarded(monkeypatch):
        y = gemm.fprop(qx, qw, torch.float32, tile=tile, num_sms=PROGRAMS)
        dx = gemm.dgrad(qdy, qw, tile=tile, num_sms=PROGRAMS)
    assert (y.dtype, dx.dtype) == (torch.float32, torch.bfloat16)
    assert agrees(y, exact(qx, qw), x.double() @ w.double().t())
    assert agrees(dx, exact(qdy, qw, transposed=True), dy.double() @ w.double())
    assert not y[M // 2].any() and not dx[M // 3].any()


@pytest.mark.parametrize("tile", BY_COLUMNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient(tile: TileConfig, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = shape
    x, dy = random(M, k), random(M, n)
    x[:, k // 2] = 0.0
    qx, qdy = quantize_columns(x), quantize_columns(dy)
    with guarded(monkeypatch):
        dw = gemm.wgrad(qdy, qx, tile=tile, num_sms=PROGRAMS)
    assert agrees(dw, exact(qdy, qx), dy.double().t() @ x.double())
    assert dw.dtype == torch.float32 and not dw[:, k // 2].any()


@pytest.mark.parametrize(
    ("m", "tile"), [(m, tile) for m in (1, 63) for tile in TILES["fprop"]] + MANY_ROWS, ids=name_of
)
def test_rows_of_any_number(m: int, tile: TileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy = random(m, 48), random(80, 48), random(m, 80)
    qx, qw, qdy = rows(x), weight(w), rows(dy)
    with guarded(monkeypatch):
        y, dx = gemm.fprop(qx, qw, tile=tile), gemm.dgrad(qdy, qw, torch.float32, tile=tile)
    assert agrees(y, exact(qx, qw)) and agrees(dx, exact(qdy, qw, transposed=True))


@pytest.mark.parametrize("tile", BY_COLUMNS)
@pytest.mark.parametrize("m", [1, 63, 4097])
def test_tokens_of_any_number(tile: TileConfig, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = random(m, 48), random(m, 80)
    qx, qdy = quantize_columns(x), quantize_columns(dy)
    with guarded(monkeypatch):
        dw = gemm.wgrad(qdy, qx, tile=tile)
    assert agrees(dw, exact(qdy, qx))


@pytest.mark.parametrize("tile", [WS_128, WS_192], ids=lambda tile: tile.name)
def test_outliers_keep_the_second_tier(tile: TileConfig) -> None:
    x, w, dy = random(M, 400), random(208, 400), random(M, 208)
    x[:, 7] *= 300.0
    dy[M // 2] *= 1000.0
    w[3] *= 50.0
    qx, qw, qdy = rows(x), weight(w), rows(dy)
    assert agrees(gemm.fprop(qx, qw, torch.float32, tile=tile), exact(qx, qw))
    assert agrees(gemm.dgrad(qdy, qw, torch.float32, tile=tile), exact(qdy, qw, transposed=True))
    x_t, dy_t = quantize_columns(x), quantize_columns(dy)
    assert agrees(gemm.wgrad(dy_t, x_t, tile=WS_128), exact(dy_t, x_t))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_weight_gradient_of_requantised_tiles(power_of_two: bool) -> None:
    x, dy = random(512, 256), random(512, 128)
    stored_x, stored_dy = quantize_rows(x, power_of_two), quantize_rows(dy, power_of_two)
    x_t, dy_t = requantize_columns(stored_x, power_of_two), requantize_columns(stored_dy, power_of_two)
    dw = gemm.wgrad(dy_t, x_t, tile=WS_128)
    assert agrees(dw, exact(dy_t, x_t))
    assert calc_diff(dw, dy.double().t() @ x.double()) < (1e-3 if power_of_two else 2e-3)


@pytest.mark.parametrize("tile", BY_COLUMNS)
def test_weight_gradient_adds_in_place(tile: TileConfig) -> None:
    x_t, dy_t = quantize_columns(random(300, 144)), quantize_columns(random(300, 208))
    alone = gemm.wgrad(dy_t, x_t, tile=tile)
    memory = torch.full((208 * 144 + 8192,), torch.nan)
    into = memory[4096:-4096].view(208, 144).copy_(random(208, 144))
    before = into.clone()
    assert gemm.wgrad(dy_t, x_t, into=into, tile=tile) is into
    assert torch.equal(into, before + alone)
    assert memory[:4096].isnan().all() and memory[-4096:].isnan().all()


def test_no_rows_and_no_tokens() -> None:
    none, qw = quantize_rows(random(0, 48)), weight(random(80, 48))
    assert gemm.fprop(none, qw).shape == (0, 80)
    assert gemm.dgrad(quantize_rows(random(0, 80)), qw).shape == (0, 48)
    x_t, dy_t = quantize_columns(random(0, 48)), quantize_columns(random(0, 80))
    dw = gemm.wgrad(dy_t, x_t)
    assert dw.shape == (80, 48) and not dw.any()
    into = torch.ones(80, 48)
    assert torch.equal(gemm.wgrad(dy_t, x_t, into=into), torch.ones(80, 48))


def test_the_result_does_not_depend_on_the_number_of_programs_or_the_form() -> None:
    qx, qw = rows(random(300, 160)), weight(random(400, 160))
    x_t, dy_t = quantize_columns(random(160, 272)), quantize_columns(random(160, 304))
    for tile in (WS_192, WS_128):
        results = [gemm.fprop(qx, qw, torch.float32, tile=tile, num_sms=count) for count in (1, 7, None)]
        results.append(gemm.fprop(qx, qw, torch.float32, tile=plain_twin(tile)))
        assert all(torch.equal(result, results[0]) for result in results)
    gradients = [gemm.wgrad(dy_t, x_t, tile=tile, num_sms=count) for tile in TILES["wgrad"] for count in (1, 7, None)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_at_most_num_sms_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(launch, "rows_by_blocks", Recorder())
    monkeypatch.setattr(launch, "columns_by_columns", Recorder())
    qx, qw = rows(random(300, 160)), weight(random(640, 160))
    for num_sms in (None, 4, 112):
        gemm.fprop(qx, qw, tile=WS_128, num_sms=num_sms)
    x_t = quantize_columns(random(160, 2048))
    for num_sms in (None, 112):
        gemm.wgrad(x_t, x_t, tile=WS_128, num_sms=num_sms)
    assert grids == [(15,), (4,), (15,), (132,), (112,)]


def test_scales_and_codes_of_any_strides() -> None:
    x, w = random(200, 208), random(144, 208)
    row_major, qw = quantize_rows(x), weight(w)
    y = gemm.fprop(rows_side_by_side(row_major), qw, tile=WS_192)
    assert torch.equal(gemm.fprop(row_major, qw, tile=WS_192), y)
    wide = torch.zeros((200, 224), dtype=torch.uint8)
    wide[:, :208] = row_major.data.view(torch.uint8)
    spread = Quantized(wide[:, :208].view(torch.float8_e4m3fn), row_major.scale.repeat(1, 2)[:, :2])
    assert torch.equal(gemm.fprop(spread, qw, tile=PLAIN_64), y)
    x_t = quantize_columns(x)
    contiguous = Quantized(x_t.data.view(torch.uint8).contiguous().view(torch.float8_e4m3fn), x_t.scale.contiguous())
    assert torch.equal(gemm.wgrad(contiguous, x_t, tile=PLAIN_128), gemm.wgrad(x_t, x_t, tile=PLAIN_128))


def test_copies_are_made_only_of_rows_that_the_memory_unit_cannot_read() -> None:
    stored = torch.zeros((48, 4112), dtype=torch.uint8).view(torch.float8_e4m3fn)
    for as_it_is in (stored, stored[:, :4097], stored[16:, 16:4097]):
        assert with_aligned_rows(as_it_is) is as_it_is
    numbers = torch.randint(0, 120, (48, 4097), dtype=torch.uint8).view(torch.float8_e4m3fn)
    transposed = torch.randint(0, 120, (4097, 48), dtype=torch.uint8).view(torch.float8_e4m3fn).t()
    for other in (numbers, stored[:, 1:], transposed):
        copy = with_aligned_rows(other)
        assert copy.stride(1) == 1 and copy.stride(0) % 16 == 0 and copy.data_ptr() % 16 == 0
        assert torch.equal(copy.view(torch.uint8), other.contiguous().view(torch.uint8))


def test_without_a_tile_it_is_chosen_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def chosen_tile(*what: Any) -> TileConfig:
        asked.append(what)
        return PLAIN_128

    monkeypatch.setattr(gemm, "chosen_tile", chosen_tile)
    x, w, dy = random(40, 48), random(80, 48), random(40, 80)
    gemm.fprop(rows(x), weight(w), num_sms=112, measured="table.json")
    gemm.dgrad(rows(dy), weight(w))
    gemm.wgrad(quantize_columns(dy), quantize_columns(x))
    assert asked == [
        ("fprop", 40, 80, 48, 1, 112, "table.json"),
        ("dgrad", 40, 48, 80, 1, None, None),
        ("wgrad", 80, 48, 40, 1, None, None),
    ]


def test_products_are_reported_and_plain_operands_multiplied() -> None:
    x, w, dy = random(40, 48), random(80, 48), random(40, 80)
    with observing(AuditRecorder()) as recorder:
        gemm.fprop(rows(x), weight(w), name="a", tile=WS_128)
        gemm.dgrad(rows(dy), weight(w), name="b", tile=WS_128)
        gemm.wgrad(quantize_columns(dy), quantize_columns(x), name="c", tile=WS_128)
        assert torch.equal(gemm.fprop(x, w), definition.fprop(x, w))
        assert torch.equal(gemm.dgrad(dy, w), definition.dgrad(dy, w))
        total = torch.zeros(80, 48)
        assert gemm.wgrad(dy, x, into=total) is total and torch.equal(total, definition.wgrad(dy, x))
    assert isinstance(recorder, AuditRecorder)
    assert [(r.name, r.kind) for r in recorder.records[:3]] == [("a", "fprop"), ("b", "dgrad"), ("c", "wgrad")]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2112, 7168), (576, 7168), (7168, 2048), (4096, 7168)], ids=str)
def test_full_widths(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = shape
    x, w, dy = random(M, k), random(n, k), random(M, n)
    qx, qw, qdy, x_t, dy_t = rows(x), weight(w), rows(dy), quantize_columns(x), quantize_columns(dy)
    with guarded(monkeypatch):
        y = gemm.fprop(qx, qw, torch.float32, tile=WS_192)
        dx = gemm.dgrad(qdy, qw, tile=WS_192)
        dw = gemm.wgrad(dy_t, x_t, tile=WS_128)
    assert agrees(y, exact(qx, qw), x.double() @ w.double().t())
    assert agrees(dx, exact(qdy, qw, transposed=True), dy.double() @ w.double())
    assert agrees(dw, exact(dy_t, x_t), dy.double().t() @ x.double())

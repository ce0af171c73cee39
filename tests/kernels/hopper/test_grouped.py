"""The grouped Triton products: both tiers of accuracy for every tile, groups of all sizes, borders between experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import grouped as definition
from kernels.hopper import grouped
from kernels.hopper.launch import block_table, row_table
from kernels.hopper.tile import PLAIN_128, TILES, WS_128, WS_192, TileConfig
from kernels.observe import AuditRecorder, observing
from kernels.quantize import quantize_columns, quantize_rows, requantize_columns
from tests.kernels.hopper.gemm_cases import agrees, exact_groups, guarded, random, rows, weight
from tests.kernels.oracles import calc_diff

BY_BLOCKS = [pytest.param(tile, id=tile.name) for tile in TILES["grouped fprop"]]
BY_COLUMNS = [pytest.param(tile, id=tile.name) for tile in TILES["grouped wgrad"]]
# An empty group, groups of one row, whole tiles, more than a tile; all rows in one; one row each.
GROUPS = [(70, 0, 130, 1, 128, 0), (0, 0, 300), (1, 1, 1, 1)]
# V3's experts divided by 16; then widths that are no multiple of 128.
WIDTHS = [(256, 448), (448, 128), (208, 336)]
CASES = [(counts, WIDTHS[-1]) for counts in GROUPS] + [(GROUPS[0], shape) for shape in WIDTHS[:-1]]
PROGRAMS = 5


@pytest.mark.parametrize("tile", BY_BLOCKS)
@pytest.mark.parametrize(("counts", "shape"), CASES, ids=str)
def test_forward_and_input_gradient(
    tile: TileConfig, counts: tuple[int, ...], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = shape
    m = sum(counts)
    x, w, dy = random(m, k), random(len(counts), n, k), random(m, n)
    x[m // 2], dy[m // 3] = 0.0, 0.0
    qx, qw, qdy = rows(x), weight(w), rows(dy)
    with guarded(monkeypatch):
        y = grouped.fprop(qx, qw, counts, torch.float32, tile=tile, num_sms=PROGRAMS)
        dx = grouped.dgrad(qdy, qw, counts, tile=tile, num_sms=PROGRAMS)
    assert (y.dtype, dx.dtype) == (torch.float32, torch.bfloat16)
    plain_y = definition.fprop(x.double(), w.double(), counts)
    plain_dx = definition.dgrad(dy.double(), w.double(), counts)
    assert agrees(y, exact_groups(qx, qw, counts), plain_y)
    assert agrees(dx, exact_groups(qdy, qw, counts, transposed=True), plain_dx)
    assert not y[m // 2].any() and not dx[m // 3].any()


@pytest.mark.parametrize("tile", BY_COLUMNS)
@pytest.mark.parametrize(("counts", "shape"), CASES, ids=str)
def test_weight_gradient(
    tile: TileConfig, counts: tuple[int, ...], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = shape
    x, dy = random(sum(counts), k), random(sum(counts), n)
    x_t, dy_t = quantize_columns(x, counts=counts), quantize_columns(dy, counts=counts)
    with guarded(monkeypatch):
        dw = grouped.wgrad(dy_t, x_t, counts, tile=tile, num_sms=PROGRAMS)
    stored = definition.wgrad(dy_t, x_t, counts)
    plain = definition.wgrad(dy.double(), x.double(), counts)
    assert dw.dtype == torch.float32 and agrees(dw, stored, plain)
    for expert, count in enumerate(counts):
        assert agrees(dw[expert], stored[expert]) if count else not dw[expert].any()


@pytest.mark.parametrize("tile", BY_COLUMNS)
def test_weight_gradient_adds_in_place(tile: TileConfig) -> None:
    counts = (70, 0, 130)
    x_t = quantize_columns(random(200, 144), counts=counts)
    dy_t = quantize_columns(random(200, 208), counts=counts)
    alone = grouped.wgrad(dy_t, x_t, counts, tile=tile)
    memory = torch.full((3 * 208 * 144 + 8192,), torch.nan)
    into = memory[4096:-4096].view(3, 208, 144).copy_(random(3, 208, 144))
    # Nothing is written where an expert has no rows, not even what is there.
    into[1] = torch.nan
    before = into.clone()
    assert grouped.wgrad(dy_t, x_t, counts, into=into, tile=tile) is into
    assert torch.equal(into[::2], (before + alone)[::2]) and into[1].isnan().all()
    assert memory[:4096].isnan().all() and memory[-4096:].isnan().all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_weight_gradient_of_requantised_tiles(power_of_two: bool) -> None:
    counts = (200, 0, 312)
    x, dy = random(512, 256), random(512, 128)
    stored_x, stored_dy = quantize_rows(x, power_of_two), quantize_rows(dy, power_of_two)
    x_t = requantize_columns(stored_x, power_of_two, counts)
    dy_t = requantize_columns(stored_dy, power_of_two, counts)
    dw = grouped.wgrad(dy_t, x_t, counts, tile=WS_128)
    assert agrees(dw, definition.wgrad(dy_t, x_t, counts))
    plain = definition.wgrad(dy.double(), x.double(), counts)
    assert calc_diff(dw, plain) < (1e-3 if power_of_two else 2e-3)


def test_an_expert_that_gets_4097_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (3, 4097)
    x, w, dy = random(4100, 48), random(2, 80, 48), random(4100, 80)
    qx, qw, qdy = rows(x), weight(w), rows(dy)
    x_t, dy_t = quantize_columns(x, counts=counts), quantize_columns(dy, counts=counts)
    with guarded(monkeypatch):
        y = grouped.fprop(qx, qw, counts, tile=WS_128)
        dx = grouped.dgrad(qdy, qw, counts, tile=WS_128)
        dw = grouped.wgrad(dy_t, x_t, counts, tile=WS_128)
    assert agrees(y, exact_groups(qx, qw, counts))
    assert agrees(dx, exact_groups(qdy, qw, counts, transposed=True))
    assert agrees(dw, definition.wgrad(dy_t, x_t, counts))


def test_outliers_keep_the_second_tier() -> None:
    counts = (70, 130)
    x, w = random(200, 400), random(2, 208, 400)
    x[:, 7] *= 300.0
    x[71] *= 1000.0
    w[1, 3] *= 50.0
    qx, qw = rows(x), weight(w)
    assert agrees(grouped.fprop(qx, qw, counts, torch.float32, tile=WS_192), exact_groups(qx, qw, counts))


def test_no_rows_at_all() -> None:
    counts, w = (0, 0), weight(random(2, 80, 48))
    assert grouped.fprop(quantize_rows(random(0, 48)), w, counts).shape == (0, 80)
    assert grouped.dgrad(quantize_rows(random(0, 80)), w, counts).shape == (0, 48)
    x_t = quantize_columns(random(0, 48), counts=counts)
    dw = grouped.wgrad(x_t, x_t, counts)
    assert dw.shape == (2, 48, 48) and not dw.any()
    into = torch.ones(2, 48, 48)
    assert torch.equal(grouped.wgrad(x_t, x_t, counts, into=into), torch.ones(2, 48, 48))


def test_row_major_scales() -> None:
    counts = (70, 0, 130)
    x, qw = random(200, 336), weight(random(3, 208, 336))
    y = grouped.fprop(rows(x), qw, counts, tile=WS_192)
    assert torch.equal(grouped.fprop(quantize_rows(x), qw, counts, tile=WS_192), y)


def test_tables() -> None:
    device = torch.device("cpu")
    expected = [[0, 0, 70], [2, 70, 326], [2, 198, 326], [3, 326, 327]]
    assert row_table((70, 0, 256, 1), 128, device).tolist() == expected
    assert row_table((70,), 64, device).tolist() == [[0, 0, 70], [0, 64, 70]]
    assert block_table((70, 0, 256, 1), device).tolist() == [0, 1, 1, 3, 4]


def test_without_a_tile_it_is_chosen_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def chosen_tile(*what: Any) -> TileConfig:
        asked.append(what)
        return PLAIN_128

    monkeypatch.setattr(grouped, "chosen_tile", chosen_tile)
    counts = (30, 10)
    x, w, dy = random(40, 48), random(2, 80, 48), random(40, 80)
    grouped.fprop(rows(x), weight(w), counts, num_sms=112, measured="table.json")
    grouped.dgrad(rows(dy), weight(w), counts)
    grouped.wgrad(quantize_columns(dy, counts=counts), quantize_columns(x, counts=counts), counts)
    assert asked == [
        ("grouped fprop", 40, 80, 48, 2, 112, "table.json"),
        ("grouped dgrad", 40, 48, 80, 2, None, None),
        ("grouped wgrad", 80, 48, 256, 2, None, None),
    ]


def test_products_are_reported_and_plain_operands_multiplied() -> None:
    counts = (30, 10)
    x, w, dy = random(40, 48), random(2, 80, 48), random(40, 80)
    with observing(AuditRecorder()) as recorder:
        grouped.fprop(rows(x), weight(w), counts, name="a", tile=WS_128)
        grouped.dgrad(rows(dy), weight(w), counts, name="b", tile=WS_128)
        columns = quantize_columns(dy, counts=counts), quantize_columns(x, counts=counts)
        grouped.wgrad(*columns, counts, name="c", tile=WS_128)
        assert torch.equal(grouped.fprop(x, w, counts), definition.fprop(x, w, counts))
        assert torch.equal(grouped.dgrad(dy, w, counts), definition.dgrad(dy, w, counts))
        assert torch.equal(grouped.wgrad(dy, x, counts), definition.wgrad(dy, x, counts))
    assert isinstance(recorder, AuditRecorder)
    assert [(r.name, r.kind) for r in recorder.records[:3]] == [("a", "fprop"), ("b", "dgrad"), ("c", "wgrad")]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 7168), (7168, 2048)], ids=str)
def test_full_widths(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = shape
    counts = (100, 0, 33)
    x, w, dy = random(133, k), random(3, n, k), random(133, n)
    qx, qw, qdy = rows(x), weight(w), rows(dy)
    x_t, dy_t = quantize_columns(x, counts=counts), quantize_columns(dy, counts=counts)
    with guarded(monkeypatch):
        y = grouped.fprop(qx, qw, counts, torch.float32, tile=WS_192)
        dx = grouped.dgrad(qdy, qw, counts, tile=WS_192)
        dw = grouped.wgrad(dy_t, x_t, counts, tile=WS_128)
    assert agrees(y, exact_groups(qx, qw, counts))
    assert agrees(dx, exact_groups(qdy, qw, counts, transposed=True))
    assert agrees(dw, definition.wgrad(dy_t, x_t, counts))

"""Scatter and gather on 1, 2 and 4 processes against a dense brute force over all tokens of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels.quantize import Quantized, dequantize, quantize_rows
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.contract import Pending
from tests.distributed_helper import run_distributed

EXPERTS, TOP_K, WIDTH = 8, 3, 256
TOKENS = (5, 0, 7, 3)  # of each rank: rank 1 has none
SCENARIOS = {"random": range(EXPERTS), "one_corner": range(3)}  # with 4 ranks, ranks 2 and 3 receive no row


@dataclass
class Given:
    index_TK: torch.Tensor
    weights_TK: torch.Tensor
    x_TD: torch.Tensor


def given(scenario: str, rank: int) -> Given:
    generator = torch.Generator().manual_seed(100 * len(scenario) + rank)
    experts, tokens = SCENARIOS[scenario], TOKENS[rank]
    index = torch.rand(tokens, len(experts), generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    # Magnitudes far apart, so that scales differ from tile to tile.
    return Given(index, weights, x * 10.0 ** torch.randint(-3, 3, (tokens, WIDTH), generator=generator))


def codes(rank: int, tokens: int) -> torch.Tensor:
    """[tokens]: a number that names rank and token."""
    return torch.arange(tokens, dtype=torch.float64) + 100 * rank


def as_bytes(rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales: FP8 tensors do not pickle."""
    assert isinstance(rows, Quantized) and rows.data.dtype == torch.float8_e4m3fn
    return rows.data.view(torch.uint8), rows.scale


def movements(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    dispatcher = AllToAllDispatcher(EXPERTS, dist.group.WORLD if world_size > 1 else None)
    found = {}
    for scenario in SCENARIOS:
        g = given(scenario, rank)
        route = dispatcher.plan(g.index_TK)
        got: dict[str, Any] = {}
        received = dispatcher.scatter(route, g.x_TD, g.weights_TK).wait()
        got["sent"] = sum(route.give)
        got["received"] = received
        got["identity"] = dispatcher.gather(route, dispatcher.reduce(route, received.rows)).wait()[0]
        expert_X = torch.repeat_interleave(torch.arange(len(received.counts)), torch.tensor(received.counts))
        expert_X += rank * dispatcher.local_experts
        # Expert e multiplies by e + 1; its router weight's gradient, with dy = x, is (e + 1) |x|^2.
        factor_X = (expert_X + 1).double()
        out_X = received.rows * (factor_X * received.weights_X)[:, None]
        got["experts"] = dispatcher.gather(route, dispatcher.reduce(route, out_X)).wait()[0]
        dy_X = dispatcher.scatter(route, g.x_TD).wait().rows
        dweights_X = factor_X * (dy_X * received.rows).sum(1)
        got["dx"], got["dweights"] = dispatcher.gather(route, dispatcher.reduce(route, dy_X, dweights_X)).wait()
        # A number that names expert, rank and token comes back to its token and slot.
        named_X = dispatcher.scatter(route, codes(rank, len(g.x_TD))[:, None]).wait().rows[:, 0] + 10_000 * expert_X
        got["named"] = dispatcher.gather(route, dispatcher.reduce(route, named_X[:, None], named_X)).wait()[1]
        y_X = torch.randn(received.rows.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        got["scatter_dot"] = (received.rows * y_X).sum()
        got["gather_dot"] = (g.x_TD * dispatcher.gather(route, dispatcher.reduce(route, y_X)).wait()[0]).sum()
        # FP8, as dispatch forward (weights travel along, in another layer's route) and as combine backward.
        eight = quantize_rows(g.x_TD, power_of_two=True)
        second = dispatcher.plan(g.index_TK)
        first_move = dispatcher.scatter(second, eight, g.weights_TK.float())
        second_move = dispatcher.scatter(route, eight)
        got["fp8_plain"] = as_bytes(second_move.wait().rows)  # waited for in the other order
        arrived = first_move.wait()
        got["fp8"], got["fp8_weights"] = as_bytes(arrived.rows), arrived.weights_X
        low = dispatcher.gather(route, dispatcher.reduce(route, received.rows.bfloat16())).wait()[0]
        got["bfloat16"] = low.dtype
        found[scenario] = got
    return found


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda ranks: f"{ranks}_ranks")
def moved(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    """Results by rank."""
    return [movements(0, 1)] if request.param == 1 else run_distributed(movements, request.param)


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> str:
    return request.param


Moved = list[dict[str, dict[str, Any]]]


def expected_rows(scenario: str, rank: int, ranks: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """[(source rank, token, slot)] of every expanded row on `rank`, and rows per local expert."""
    local = EXPERTS // ranks
    rows, counts = [], []
    for expert in range(rank * local, (rank + 1) * local):
        before = len(rows)
        for source in range(ranks):
            for token, experts in enumerate(given(scenario, source).index_TK.tolist()):
                rows += [(source, token, slot) for slot, e in enumerate(experts) if e == expert]
        counts.append(len(rows) - before)
    return rows, counts


def test_rows_and_router_weights_arrive_by_expert_then_source(moved: Moved, scenario: str) -> None:
    empty = 0
    for rank, found in enumerate(moved):
        received = found[scenario]["received"]
        rows, counts = expected_rows(scenario, rank, len(moved))
        assert received.counts == counts
        assert received.rows.shape == (len(rows), WIDTH)
        for i, (source, token, slot) in enumerate(rows):
            g = given(scenario, source)
            assert torch.equal(received.rows[i], g.x_TD[token])
            assert received.weights_X[i] == g.weights_TK[token, slot]
        empty += not rows
    if scenario == "one_corner" and len(moved) == 4:
        assert empty == 2


def test_a_row_is_sent_once_per_rank(moved: Moved, scenario: str) -> None:
    local = EXPERTS // len(moved)
    for rank, found in enumerate(moved):
        owners = [{e // local for e in experts} for experts in given(scenario, rank).index_TK.tolist()]
        assert found[scenario]["sent"] == sum(map(len, owners))


def test_sums_and_gradients_equal_the_dense_brute_force(moved: Moved, scenario: str) -> None:
    for rank, found in enumerate(moved):
        g, got = given(scenario, rank), found[scenario]
        torch.testing.assert_close(got["identity"], TOP_K * g.x_TD, rtol=1e-14, atol=0)
        torch.testing.assert_close(got["dx"], TOP_K * g.x_TD, rtol=1e-14, atol=0)
        weights = g.weights_TK.clone().requires_grad_()
        dense = ((weights * (g.index_TK + 1)).sum(1, keepdim=True)) * g.x_TD
        (dweights,) = torch.autograd.grad((dense * g.x_TD).sum(), weights)
        torch.testing.assert_close(got["experts"], dense.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(got["dweights"], dweights, rtol=1e-13, atol=0)


def test_router_weight_gradients_ride_back_to_their_slots(moved: Moved, scenario: str) -> None:
    for rank, found in enumerate(moved):
        index_TK = given(scenario, rank).index_TK
        assert torch.equal(found[scenario]["named"], codes(rank, len(index_TK))[:, None] + 10_000 * index_TK)


def test_gather_is_the_transpose_of_scatter(moved: Moved, scenario: str) -> None:
    scattered = sum(found[scenario]["scatter_dot"] for found in moved)
    gathered = sum(found[scenario]["gather_dot"] for found in moved)
    assert scattered != 0
    torch.testing.assert_close(gathered, scattered, rtol=1e-12, atol=0)


def test_fp8_codes_and_scales_arrive_exactly(moved: Moved, scenario: str) -> None:
    for rank, found in enumerate(moved):
        rows, _ = expected_rows(scenario, rank, len(moved))
        for data, scale in (found[scenario]["fp8"], found[scenario]["fp8_plain"]):
            assert data.shape == (len(rows), WIDTH) and scale.shape == (len(rows), WIDTH // 128)
            for i, (source, token, _) in enumerate(rows):
                sent = quantize_rows(given(scenario, source).x_TD, power_of_two=True)
                assert torch.equal(data[i], sent.data[token].view(torch.uint8))
                assert torch.equal(scale[i], sent.scale[token])
        weights = [given(scenario, source).weights_TK[token, slot].float() for source, token, slot in rows]
        assert found[scenario]["fp8_weights"].tolist() == [w.item() for w in weights]


def test_dtypes_survive(moved: Moved, scenario: str) -> None:
    for found in moved:
        got = found[scenario]
        assert {got[key].dtype for key in ("identity", "experts", "dx", "dweights")} == {torch.float64}
        assert got["bfloat16"] == torch.bfloat16


def test_a_rank_sums_in_float32() -> None:
    """256 + 1 + 1 is 258; rounding to bfloat16 after each sum would leave 256."""
    dispatcher = AllToAllDispatcher(EXPERTS, None)
    route = dispatcher.plan(torch.tensor([[0, 1, 2]]))
    dispatcher.scatter(route, torch.ones(1, 1).bfloat16(), torch.ones(1, 3)).wait()
    reduced = dispatcher.reduce(route, torch.tensor([[256.0], [1.0], [1.0]]).bfloat16())
    total, _ = dispatcher.gather(route, reduced).wait()
    assert total.item() == 258


def test_waiting_twice() -> None:
    dispatcher = AllToAllDispatcher(EXPERTS, None)
    moving = dispatcher.scatter(dispatcher.plan(torch.tensor([[0]])), torch.ones(1, 1), torch.ones(1, 1))
    moving.wait()
    with pytest.raises(RuntimeError, match="waited for twice"):
        moving.wait()


def test_a_pending_drops_its_tensors_when_waited_for() -> None:
    tensor = torch.ones(1)
    pending = Pending((), lambda x=tensor: x)
    assert pending.wait() is tensor
    assert pending._works is None and pending._finish is None


def test_a_route_needs_its_first_scatter() -> None:
    dispatcher = AllToAllDispatcher(EXPERTS, None)
    with pytest.raises(RuntimeError, match="before its first scatter"):
        dispatcher.reduce(dispatcher.plan(torch.tensor([[0]])), torch.ones(1, 1))


def test_experts_must_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    with pytest.raises(ValueError, match="8 experts do not divide over 3"):
        AllToAllDispatcher(EXPERTS, object())  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_row_or_none_of_odd_width(tokens: int) -> None:
    """A lone row's columns need not lie where their dtype wants them: 128 codes and a scale are 132 bytes."""
    dispatcher = AllToAllDispatcher(EXPERTS, None)
    x, weights = torch.full((tokens, 128), 3.0), torch.full((tokens, 1), 0.5, dtype=torch.float64)
    route = dispatcher.plan(torch.full((tokens, 1), 6))
    received = dispatcher.scatter(route, quantize_rows(x, power_of_two=True), weights).wait()
    assert torch.equal(received.weights_X, weights[:, 0])
    assert torch.equal(dequantize(received.rows), x)
    total, dweights = dispatcher.gather(route, dispatcher.reduce(route, torch.ones(tokens, 3), weights[:, 0])).wait()
    assert torch.equal(total, torch.ones(tokens, 3)) and torch.equal(dweights, weights)

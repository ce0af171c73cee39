"""The order of steps of two programs advanced together, against lists written down by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from parallel.pipeline.contract import DEFAULT_ORDER, PUBLISHED_ORDER, Program
from parallel.pipeline.interleave import Running, overlap

MOE_F = "attn(F) dispatch(F) mlp(F) combine(F)".split()
MOE_B = "combine(B) mlp(B) dispatch(B) mlp(W) attn(B) attn(W)".split()
DENSE_F = "attn(F) mlp(F)".split()
DENSE_B = "mlp(B) mlp(W) attn(B) attn(W)".split()


def program(layers: Sequence[Sequence[str]], ran: list[str], result: str = "done") -> Program:
    """Steps of layer i are recorded as `i:name` when they run, which is after their name was yielded."""
    for i, layer in enumerate(layers):
        for step in layer:
            yield step
            ran.append(f"{i}:{step}")
    return result


def order_of(forward: list[list[str]], backward: list[list[str]], order: Sequence[str]) -> str:
    ran: list[str] = []
    results = overlap(Running(program(forward, ran, "output")), Running(program(backward, ran, "dx")), order)
    assert results == ("output", "dx")
    return " ".join(ran)


CASES = {
    "one layer each": (
        [MOE_F],
        [MOE_B],
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(F) 0:dispatch(B) 0:mlp(W) 0:mlp(F) "
        "0:combine(F) 0:attn(B) 0:attn(W)",
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(F) 0:dispatch(B) 0:mlp(W) 0:mlp(F) "
        "0:attn(B) 0:attn(W) 0:combine(F)",
    ),
    "more forward layers": (
        [MOE_F, MOE_F],
        [MOE_B],
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(F) 0:dispatch(B) 0:mlp(W) 0:mlp(F) "
        "0:combine(F) 0:attn(B) 0:attn(W) 1:attn(F) 1:dispatch(F) 1:mlp(F) 1:combine(F)",
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(F) 0:dispatch(B) 0:mlp(W) 0:mlp(F) "
        "0:attn(B) 0:attn(W) 0:combine(F) 1:attn(F) 1:dispatch(F) 1:mlp(F) 1:combine(F)",
    ),
    "more backward layers": (
        [MOE_F],
        [MOE_B, DENSE_B],
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(F) 0:dispatch(B) 0:mlp(W) 0:mlp(F) "
        "0:combine(F) 0:attn(B) 0:attn(W) 1:mlp(B) 1:mlp(W) 1:attn(B) 1:attn(W)",
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(F) 0:dispatch(B) 0:mlp(W) 0:mlp(F) "
        "0:attn(B) 0:attn(W) 0:combine(F) 1:mlp(B) 1:mlp(W) 1:attn(B) 1:attn(W)",
    ),
    "dense forward": (
        [DENSE_F],
        [MOE_B],
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(B) 0:mlp(W) 0:mlp(F) 0:attn(B) 0:attn(W)",
        "0:combine(B) 0:attn(F) 0:mlp(B) 0:dispatch(B) 0:mlp(W) 0:mlp(F) 0:attn(B) 0:attn(W)",
    ),
    "dense backward": (
        [MOE_F],
        [DENSE_B],
        "0:attn(F) 0:mlp(B) 0:dispatch(F) 0:mlp(W) 0:mlp(F) 0:combine(F) 0:attn(B) 0:attn(W)",
        "0:attn(F) 0:mlp(B) 0:dispatch(F) 0:mlp(W) 0:mlp(F) 0:attn(B) 0:attn(W) 0:combine(F)",
    ),
    # A first stage's chunk forward beside a last stage's chunk backward: dense against MoE, then MoE against dense.
    "whole chunks with unnamed steps": (
        [["embed(F)"], DENSE_F, MOE_F, ["output(F)"]],
        [["head(B)"], MOE_B, DENSE_B, ["embed(B)"]],
        "0:head(B) 1:combine(B) 0:embed(F) 1:attn(F) 1:mlp(B) 1:dispatch(B) 1:mlp(W) 1:mlp(F) 1:attn(B) 1:attn(W) "
        "2:attn(F) 2:mlp(B) 2:dispatch(F) 2:mlp(W) 2:mlp(F) 2:combine(F) 2:attn(B) 2:attn(W) 3:embed(B) 3:output(F)",
        "0:head(B) 1:combine(B) 0:embed(F) 1:attn(F) 1:mlp(B) 1:dispatch(B) 1:mlp(W) 1:mlp(F) 1:attn(B) 1:attn(W) "
        "2:attn(F) 2:mlp(B) 2:dispatch(F) 2:mlp(W) 2:mlp(F) 2:attn(B) 2:attn(W) 2:combine(F) 3:embed(B) 3:output(F)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_order_of_steps(case: str) -> None:
    forward, backward, default, published = CASES[case]
    assert order_of(forward, backward, DEFAULT_ORDER) == default
    assert order_of(forward, backward, PUBLISHED_ORDER) == published


def test_one_program_alone() -> None:
    ran: list[str] = []
    steps: list[str] = []
    running = Running(program([["embed(F)"], DENSE_F], ran, "output"), steps)
    assert running.next == "embed(F)" and ran == []  # in view, not run
    running.advance()
    assert running.next == "attn(F)" and ran == ["0:embed(F)"]
    assert running.drain() == "output"
    assert steps == ["embed(F)", "attn(F)", "mlp(F)"]


def test_a_program_without_steps() -> None:
    running = Running(program([], [], "nothing to do"))
    assert running.next is None and running.drain() == "nothing to do"


@pytest.mark.parametrize("side", ["forward", "backward"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_step_that_raises_closes_both_programs(side: str, step: int) -> None:
    closed = []

    def tracked(name: str, steps: list[str]) -> Program:
        try:
            for i, each in enumerate(steps):
                yield each
                if name == side and i == step:
                    raise ArithmeticError(f"{name} {each}")
        finally:
            closed.append(name)

    forward, backward = tracked("forward", MOE_F), tracked("backward", MOE_B)
    with pytest.raises(ArithmeticError, match=side):
        overlap(Running(forward), Running(backward), DEFAULT_ORDER)
    assert sorted(closed) == ["backward", "forward"]
    for generator in (forward, backward):
        with pytest.raises(StopIteration):
            next(generator)

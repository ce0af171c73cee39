"""Each repair of Triton's interpreter: the fault without it, right numbers with it, the versions it is needed for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from tests.kernels.interpreter import NEEDED_FOR, hopper_dot, repaired

VERSION = ".".join(triton.__version__.split(".")[:2])
E4M3 = torch.float8_e4m3fn
# Carries into the next binade, ties, numbers beyond the largest, NaN, a subnormal.
AWKWARD = [1.97, 0.4963, -1.0625, 1.1875, 512.0, float("inf"), float("nan"), 1e-3]


@triton.jit
def convert_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def arithmetic_kernel(X, Y, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(Z + i, x * y - x)


@triton.jit
def compare_kernel(X, Y, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Z + i, (tl.load(X + i) < tl.load(Y + i)).to(tl.int8))


@triton.jit
def sum_kernel(X, Y, N: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))


@triton.jit
def dot_kernel(A, B, C, N: tl.constexpr, K, STEP: tl.constexpr, PROMOTE: tl.constexpr):
    """C [N, N] = A [N, K] B [K, N], STEP of K at a time; PROMOTE: every step has its own accumulator."""
    n, k = tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((N, N), tl.float32)
    for first in range(0, K, STEP):
        a = tl.load(A + n[:, None] * K + first + k[None, :])
        b = tl.load(B + (first + k[:, None]) * N + n[None, :])
        if PROMOTE:
            total += tl.dot(a, b)
        else:
            total = tl.dot(a, b, total)
    tl.store(C + n[:, None] * N + n[None, :], total)


def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(values.shape, dtype=dtype)
    convert_kernel[(1,)](values, result, values.numel())
    return result.float()


def multiplied(a_NK: Tensor, b_KN: Tensor, promote: bool = True) -> Tensor:
    rows, depth = a_NK.shape
    result = torch.empty(rows, rows)
    dot_kernel[(1,)](a_NK, b_KN, result, rows, depth, min(depth, 128), promote)
    return result


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def combined() -> Tensor:
    x, y, result = normal(16).bfloat16(), normal(16).flip(0).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, result, 16)
    return result.float()


def compared() -> Tensor:
    result = torch.empty(16, dtype=torch.int8)
    compare_kernel[(1,)](normal(16).bfloat16(), torch.zeros(16).bfloat16(), result, 16)
    return result


def autotuned() -> Tensor:
    # Asks for a GPU when it is made, or when it runs.
    tuned = triton.autotune([triton.Config({"N": 8}), triton.Config({"N": 16})], key=[])(convert_kernel)
    result = torch.zeros(16)
    tuned[(1,)](torch.ones(16), result)
    return result


@dataclass(frozen=True)
class Fault:
    """What a kernel gives, and what it ought to."""

    repair: str
    run: Callable[[], Tensor]
    right: Callable[[], Tensor]


x, y = normal(16).bfloat16(), normal(16).flip(0).bfloat16()
a, b = normal(16, 32).bfloat16(), normal(32, 16).bfloat16()
FAULTS = {
    "FP8 casts lose the carry, do not saturate, break NaN": Fault(
        "casts",
        lambda: converted(torch.tensor(AWKWARD), E4M3),
        lambda: torch.tensor([2.0, 0.5, -1.0, 1.25, 448.0, 448.0, float("nan"), 2.0**-9]),
    ),
    "FP32 to BF16 truncates": Fault(
        "casts", lambda: converted(normal(64), torch.bfloat16), lambda: normal(64).bfloat16().float()
    ),
    "the NaN of E4M3 becomes 480": Fault(
        "casts",
        lambda: converted(torch.tensor([0x7F, 0xFF], dtype=torch.uint8).view(E4M3), torch.float32),
        lambda: torch.full((2,), float("nan")),
    ),
    "integers become BF16 bit by bit": Fault(
        "casts", lambda: converted(torch.arange(8), torch.bfloat16), lambda: torch.arange(8.0)
    ),
    "a BF16 product multiplies bit patterns": Fault("dot", lambda: multiplied(a, b), lambda: a.float() @ b.float()),
    "BF16 arithmetic is done on bit patterns": Fault("arithmetic", combined, lambda: (x * y - x).float()),
    "BF16 numbers are compared as bit patterns": Fault("arithmetic", compared, lambda: (x < 0).to(torch.int8)),
    "autotune asks for a GPU": Fault("autotune", autotuned, lambda: (torch.arange(16) < 8).float()),
}


def wrong(fault: Fault, without: tuple[str, ...] = ()) -> bool:
    with repaired(without=without):
        try:
            result = fault.run()
        except (RuntimeError, triton.runtime.errors.InterpreterError):
            return True
    return not torch.allclose(result, fault.right(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_there_without_their_repair_and_gone_with_it(name: str) -> None:
    fault = FAULTS[name]
    assert not wrong(fault)
    assert not wrong(fault, tuple(set(NEEDED_FOR) - {fault.repair, "casts"})), "another repair takes part"
    check_versions(fault.repair, name, wrong(fault, (fault.repair,)))


def check_versions(repair: str, name: str, shows: bool) -> None:
    needed = VERSION in NEEDED_FOR[repair]
    assert shows or not needed, (
        f"Triton {VERSION}: '{name}' no longer shows; the repair '{repair}' can be dropped for it"
    )
    assert needed or not shows, f"Triton {VERSION}: '{name}' shows; add {VERSION} to NEEDED_FOR['{repair}']"


def test_a_sum_of_bfloat16_is_refused() -> None:
    values, result = torch.tensor([1.0, -1.0, 2.0, 0.5]).bfloat16(), torch.empty(1, dtype=torch.bfloat16)
    with repaired(), pytest.raises(triton.runtime.errors.InterpreterError, match="convert it to FP32 first"):
        sum_kernel[(1,)](values, result, 4)
    with repaired(without=("reductions",)):
        sum_kernel[(1,)](values, result, 4)
    check_versions("reductions", "a BF16 sum adds bit patterns", result.item() != 2.5)
    wide = torch.empty(1)
    with repaired():
        sum_kernel[(1,)](values.float(), wide, 4)
    assert wide.item() == 2.5


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_every_number_is_cast_as_torch_casts_it() -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    for source in (words.to(torch.int16).view(torch.bfloat16), words.to(torch.int16).view(torch.float16)):
        with repaired():
            for target in (E4M3, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32):
                result, expected = converted(source, target), source.float().to(target).float()
                largest = torch.finfo(target).max
                saturates = target.itemsize == 1
                expected = source.float().clamp(-largest, largest).to(target).float() if saturates else expected
                assert torch.equal(result.nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7))


# (positive operands, largest error without promotion, with it), relative to the largest result: what this emulation was
# found to give for K = 4096.
ERRORS = [(True, 7.6e-2, 3.8e-4), (False, 2.7e-3, 1.5e-4)]


@pytest.mark.parametrize(("positive", "plain", "promoted"), ERRORS)
def test_short_accumulator_shows_a_missing_promotion(positive: bool, plain: float, promoted: float) -> None:
    a_NK, b_KN = normal(16, 4096), normal(4096, 16)
    if positive:
        a_NK, b_KN = a_NK.abs(), b_KN.abs()
    a_NK, b_KN = a_NK.to(E4M3), b_KN.to(E4M3)
    exact = a_NK.double() @ b_KN.double()

    def error(promote: bool) -> float:
        return float((multiplied(a_NK, b_KN, promote) - exact).abs().max() / exact.abs().max())

    with repaired(hopper_accumulator=True):
        assert plain / 2 < error(False) < plain * 2
        assert promoted / 2 < error(True) < promoted * 2 < 1e-3
    with repaired():
        assert error(False) < 1e-6


def test_short_accumulator_keeps_thirteen_fraction_bits() -> None:
    column = np.ones((32, 1), np.float32)
    for size, kept in ((2.0**-13, 1 + 2.0**-13), (2.0**-14, 1.0), (-(2.0**-14), 1.0)):
        row = np.zeros((1, 32), np.float32)
        row[0, 0] = size
        assert hopper_dot(row, column, np.ones((1, 1), np.float32)).item() == kept
    # The next 32 products are aligned anew.
    row = np.concatenate([np.full((1, 32), 2.0**-14), np.ones((1, 32))], axis=1).astype(np.float32)
    assert hopper_dot(row, np.ones((64, 1), np.float32), np.zeros((1, 1), np.float32)).item() == 32 + 2.0**-9
    assert hopper_dot(np.zeros((1, 32), np.float32), column, np.zeros((1, 1), np.float32)).item() == 0.0


def test_repairs_end_with_the_context() -> None:
    def state() -> list[object]:
        builder = triton_interpreter.InterpreterBuilder
        tuner = triton.runtime.autotuner.Autotuner
        return [
            triton_interpreter._convert_float,
            *(getattr(builder, name) for name in ("cast_impl", "create_dot", "binary_op")),
            triton_interpreter.ReduceOps.apply_impl,
            tuner.run,
            tuner.__init__,
        ]

    before = state()
    with pytest.raises(KeyError), repaired():
        assert all(now is not then for now, then in zip(state(), before, strict=True))
        raise KeyError
    assert state() == before


def test_unknown_repairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cast'.*arithmetic"), repaired(without=("cast",)):
        pass

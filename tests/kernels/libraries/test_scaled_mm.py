"""torch's `scaled_mm`: calls bind to the installed function, operands lie as it demands."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.libraries import scaled_mm
from tests.kernels.libraries.cases import SHAPES, check, dense_products
from tests.kernels.libraries.fakes import install_scaled_mm


@pytest.mark.parametrize(("dtype", "contiguous"), [(None, False), (torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype | None, contiguous: bool
) -> None:
    library = install_scaled_mm(monkeypatch)
    check(dense_products(scaled_mm, shape, dtype, contiguous))
    assert len(library.calls) == (5 if shape[0] else 0)


def test_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    assert "needs a CUDA device" in str(scaled_mm.problem(torch.device("cpu")))
    monkeypatch.setattr(scaled_mm, "hopper_problem", lambda *_: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "needs CUDA 12.9 or newer for FP8 blocks; this torch is built for 12.8" in str(scaled_mm.problem(device))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert scaled_mm.problem(device) is None
    monkeypatch.delattr(F, "scaled_mm")
    assert "needs torch 2.10" in str(scaled_mm.problem(device))

"""DeepGEMM's adapters on a library of the same signatures, in the oldest and newest version that they are for."""

from __future__ import annotations

import pytest
import torch

from kernels.libraries import deep_gemm, deep_gemm_grouped
from tests.kernels.libraries.cases import COUNTS, SHAPES, check, dense_products, grouped_products
from tests.kernels.libraries.fakes import install_deep_gemm
from tests.kernels.libraries.signatures import DEEP_GEMM, Recorder


@pytest.fixture(params=sorted(DEEP_GEMM))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install_deep_gemm(monkeypatch, request.param)


@pytest.mark.parametrize(("dtype", "contiguous"), [(None, False), (torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_products(
    library: Recorder, shape: tuple[int, int, int], dtype: torch.dtype | None, contiguous: bool
) -> None:
    check(dense_products(deep_gemm, shape, dtype, contiguous))
    assert len(library.named("fp8_gemm_nt")) == (5 if shape[0] else 0)


@pytest.mark.parametrize(("dtype", "contiguous"), [(None, False), (torch.float32, True)])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products(
    library: Recorder, counts: tuple[int, ...], dtype: torch.dtype | None, contiguous: bool
) -> None:
    check(grouped_products(deep_gemm_grouped, counts, 144, 256, dtype, contiguous))
    rows = sum(counts) > 0
    assert len(library.named("k_grouped_fp8_gemm_nt_contiguous")) == 3 * rows
    assert len(library.named("m_grouped_fp8_gemm_nt_contiguous")) == 2 * (rows and dtype is None)


def test_every_function_that_is_asked_for_is_called(library: Recorder) -> None:
    check(dense_products(deep_gemm, (16, 32, 48), None, False))
    check(grouped_products(deep_gemm_grouped, (5, 20), 32, 48, None, False))
    assert {name for name, _ in library.calls} == set(deep_gemm.FUNCTIONS)


def test_problem(library: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    import deep_gemm as fake

    device = torch.device("cuda")
    assert "needs a CUDA device" in str(deep_gemm.problem(torch.device("cpu")))
    monkeypatch.setattr(deep_gemm, "hopper_problem", lambda *_: None)
    assert deep_gemm.problem(device) is None
    monkeypatch.setattr(fake, "get_mk_alignment_for_contiguous_layout", lambda: 256, raising=False)
    assert "256 rows; 128 are needed" in str(deep_gemm_grouped.problem(device))
    monkeypatch.setattr(fake, "get_mk_alignment_for_contiguous_layout", lambda: 128)
    monkeypatch.delattr(fake, "fp8_gemm_nt")
    monkeypatch.setattr(fake, "__version__", "1.0.0")
    found = str(deep_gemm.problem(device))
    assert "deep_gemm 1.0.0 has no fp8_gemm_nt; 2.3 or newer is needed: pip install" in found

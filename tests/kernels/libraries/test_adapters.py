"""What every adapter has in common: the torch module's functions, its errors, plain operands, no import before use."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import gemm, grouped, libraries, quantize
from kernels.libraries import (
    deep_gemm,
    deep_gemm_grouped,
    requirements,
    scaled_mm,
    te_gemm,
    te_grouped,
    te_quantize,
    te_tensors,
)
from kernels.libraries.layout import Groups
from kernels.observe import AuditRecorder, observing
from kernels.quantize import quantize_columns, quantize_rows
from tests.kernels.libraries.cases import numbers, weight
from tests.kernels.libraries.fakes import install_deep_gemm, install_scaled_mm, install_te

DENSE = (te_gemm, deep_gemm, scaled_mm)
GROUPED = (te_grouped, deep_gemm_grouped)
STANDS_FOR = {**dict.fromkeys(DENSE, gemm), **dict.fromkeys(GROUPED, grouped), te_quantize: quantize}
PRODUCTS = ("fprop", "dgrad", "wgrad")


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    install_te(monkeypatch)
    install_deep_gemm(monkeypatch, "2.8.0")
    install_scaled_mm(monkeypatch)


@pytest.mark.parametrize("adapter", STANDS_FOR)
def test_functions_are_those_of_the_torch_module(adapter: ModuleType) -> None:
    own = [name for name in adapter.__all__ if name not in ("problem", "check_shapes")]
    assert set(PRODUCTS) <= set(own) or "quantize_rows" in own
    for name in own:
        theirs = getattr(STANDS_FOR[adapter], name, None)
        if theirs is not None:
            assert inspect.signature(getattr(adapter, name)) == inspect.signature(theirs), name
    assert list(inspect.signature(adapter.problem).parameters) == ["device"]


def test_no_library_is_imported_with_the_package() -> None:
    for path in Path(libraries.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("transformer_engine", "deep_gemm")], path
        importlib.import_module(f"kernels.libraries.{path.stem}" if path.stem != "__init__" else "kernels.libraries")


@pytest.mark.parametrize("adapter", DENSE)
def test_dense_errors(everything: None, adapter: ModuleType) -> None:
    x, w, dy = quantize_rows(numbers(16, 48)), weight(32, 48), quantize_rows(numbers(16, 32))
    with pytest.raises(ValueError, match=r"dgrad wo: w \(32, 48\) has no transposed copy.*both layouts"):
        adapter.dgrad(dy, replace(w, transposed=None), name="wo")
    with pytest.raises(ValueError, match=r"a contiguous \(48, 32\) is needed"):
        adapter.dgrad(dy, replace(w, transposed=w.data.t()))
    with pytest.raises(ValueError, match="differ in K"):
        adapter.fprop(dy, w)
    with pytest.raises(ValueError, match="differ in N"):
        adapter.dgrad(x, w)
    with pytest.raises(TypeError, match="quantise both or none"):
        adapter.fprop(x, numbers(32, 48))
    with pytest.raises(ValueError, match="differ in M"):
        adapter.wgrad(quantize_columns(numbers(16, 32)), quantize_columns(numbers(32, 48)))
    with pytest.raises(ValueError, match="128x128 are needed"):
        adapter.fprop(x, quantize_rows(numbers(32, 48)))


@pytest.mark.parametrize("adapter", GROUPED)
def test_grouped_errors(everything: None, adapter: ModuleType) -> None:
    x, w, dy = quantize_rows(numbers(16, 48)), weight(2, 32, 48), quantize_rows(numbers(16, 32))
    with pytest.raises(ValueError, match="do not describe 2 experts and 16 rows"):
        adapter.fprop(x, w, (8, 9))
    with pytest.raises(ValueError, match="do not describe 2 experts and 16 rows"):
        adapter.dgrad(dy, w, (16,))
    with pytest.raises(ValueError, match="no transposed copy"):
        adapter.dgrad(dy, replace(w, transposed=None), (8, 8))
    with pytest.raises(ValueError, match=r"groups \(8, 8\); the operand is quantised for \(4, 12\)"):
        adapter.wgrad(*(quantize_columns(numbers(16, c), counts=(4, 12)) for c in (32, 48)), (8, 8))


@pytest.mark.parametrize("adapter", [*DENSE, *GROUPED])
def test_plain_operands_are_the_torch_module_s(adapter: ModuleType) -> None:
    """No library is installed: none may be asked for."""
    torch_module, counts = STANDS_FOR[adapter], [(5, 11)] if adapter in GROUPED else []
    x, dy = numbers(16, 48), numbers(16, 32)
    w = numbers(2, 32, 48) if counts else numbers(32, 48)
    for a, b, kind in ((x, w, "fprop"), (dy, w, "dgrad"), (dy, x, "wgrad")):
        assert torch.equal(getattr(adapter, kind)(a, b, *counts), getattr(torch_module, kind)(a, b, *counts))


@pytest.mark.parametrize("adapter", [*DENSE, *GROUPED])
def test_products_are_reported(everything: None, adapter: ModuleType) -> None:
    counts = [(5, 11)] if adapter in GROUPED else []
    along = {"counts": counts[0]} if counts else {}
    x, dy, w = quantize_rows(numbers(16, 48)), quantize_rows(numbers(16, 32)), weight(*([2] * len(counts)), 32, 48)
    with observing(AuditRecorder()) as recorder:
        adapter.fprop(x, w, *counts, name="up")
        adapter.dgrad(dy, w, *counts, name="up")
        adapter.wgrad(quantize_columns(numbers(16, 32), **along), quantize_columns(numbers(16, 48), **along), *counts)
    assert isinstance(recorder, AuditRecorder)
    assert [(r.name, r.kind, r.out_shape[-2:]) for r in recorder.records] == [
        ("up", "fprop", (16, 32)),
        ("up", "dgrad", (16, 48)),
        ("", "wgrad", (32, 48)),
    ]


def test_shapes() -> None:
    assert requirements.check_shapes("kv_a", 576, 7168) is None
    assert requirements.check_shapes("tiny", 16, 48) is None
    found = str(requirements.check_shapes("layers.3.wo", 576, 40))
    assert "layers.3.wo: a weight of 576 x 40" in found and "multiples of 16" in found
    assert requirements.check_shapes("empty", 0, 16) is not None


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in str(requirements.hopper_problem("te", device))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for capability in ((8, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        found = str(requirements.hopper_problem("te", device))
        assert (
            f"NVIDIA A100 has compute capability {capability[0]}.{capability[1]}" in found and "9.0 (Hopper)" in found
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert requirements.hopper_problem("te", device) is None
    assert requirements.cuda_version_problem("te") is None


def test_libraries_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_cudnn.py").write_text('raise RuntimeError("cudnn shared object not found\\nmore")')
    (tmp_path / "lacks_other.py").write_text("import another_missing_package")
    monkeypatch.syspath_prepend(tmp_path)
    assert requirements.import_problem("missing_here.deep", "pip install it") == (
        "missing_here is not installed; install it with: pip install it"
    )
    assert requirements.import_problem("no_cudnn", "pip install it") == (
        "no_cudnn cannot be loaded: cudnn shared object not found; install it with: pip install it"
    )
    assert "another_missing_package" in str(requirements.import_problem("lacks_other", "pip install it"))
    assert requirements.import_problem("ast", "") is None
    for name in ("no_cudnn", "lacks_other"):
        sys.modules.pop(name, None)


def test_te_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    assert "needs a CUDA device" in str(te_gemm.problem(torch.device("cpu")))
    monkeypatch.setattr(te_tensors, "hopper_problem", lambda *_: None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert "pip install" in str(te_gemm.problem(device)) and "2.20.2" in str(te_gemm.problem(device))
    install_te(monkeypatch, (False, "CUDA is too old"))
    monkeypatch.setattr(te_tensors.metadata, "version", lambda _: "2.11.0+cu12")
    assert "transformer-engine 2.11.0+cu12 is installed; the calls here are checked against 2.20.2" in str(
        te_grouped.problem(device)
    )
    monkeypatch.setattr(te_tensors.metadata, "version", lambda _: "2.20.2+abc")
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    assert "needs CUDA 12.9" in str(te_quantize.problem(device))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "CUDA is too old" in str(te_quantize.problem(device))
    install_te(monkeypatch)
    assert te_quantize.problem(device) is None


def test_groups() -> None:
    groups = Groups.of(torch.tensor([3, 0, 5]).tolist(), 4)
    rows = torch.arange(16.0).view(8, 2)
    padded = groups.pad(rows)
    assert groups.padded == (4, 0, 8) and padded.shape == (12, 2)
    assert groups.expert_of_row(rows.device).tolist() == [0, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1, -1]
    assert not padded[3].any() and not padded[9:].any() and torch.equal(groups.unpad(padded), rows)
    assert groups.spans() == [(0, 0, 4), (2, 4, 12)]
    assert groups.expert_of_row(rows.device).dtype == torch.int32
    whole = Groups.of((4, 8), 4)
    matrix = torch.ones(12, 2)
    assert whole.pad(matrix) is matrix and whole.unpad(matrix) is matrix

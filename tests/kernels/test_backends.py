"""Which back end computes an op: what is chosen, what is refused and why, and that all of an op take the same."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from kernels import contract
from kernels.backends import MODULES, OPS, BackendError, KernelsConfig, config_problems, resolve, torch_kernels
from kernels.compiled.choose import Entry, write_measured

CPU = torch.device("cpu")
PROTOCOLS = {
    "quantize": contract.Quantize,
    "gemm": contract.Gemm,
    "grouped_gemm": contract.GroupedGemm,
    "norm": contract.Norm,
    "swiglu": contract.SwiGLU,
    "permute": contract.Permute,
    "e5m6": contract.Format,
}
EVERY = [(op, name) for op in OPS for name in MODULES[op]]


@pytest.mark.parametrize(("op", "name"), EVERY, ids=["-".join(pair) for pair in EVERY])
def test_every_back_end_takes_what_the_op_takes(op: str, name: str) -> None:
    """Importable without its library, every function there, with the protocol's arguments in their order."""
    module = import_module(MODULES[op][name])
    functions = inspect.getmembers(PROTOCOLS[op], inspect.isfunction)
    for function, asked in ((n, f) for n, f in functions if not n.startswith("_")):
        found = inspect.signature(getattr(module, function)).parameters
        for given, wanted in zip(found.values(), list(inspect.signature(asked).parameters.values())[1:], strict=False):
            assert given.name == wanted.name, (function, given, wanted)
            assert given.kind == wanted.kind and given.default == wanted.default, (function, given, wanted)
        asked_count = len(inspect.signature(asked).parameters) - 1
        # What else a back end takes is its own, and has a default.
        rest = list(found.values())[asked_count:]
        assert len(found) >= asked_count and all(p.default is not p.empty for p in rest), function


def test_a_cpu_computes_with_the_definitions() -> None:
    kernels = resolve(KernelsConfig(), CPU)
    assert kernels.table == dict.fromkeys(OPS, "torch") == torch_kernels().table
    assert kernels.gemm is import_module("kernels.gemm")


def test_a_gpu_computes_with_ours_or_not_at_all() -> None:
    """`auto` on a machine without a GPU: the reason, not another back end."""
    with pytest.raises(BackendError) as refused:
        resolve(KernelsConfig(), torch.device("cuda"))
    lines = str(refused.value).splitlines()
    assert len(lines) == len(OPS) and all(line.startswith("kernels.") and "'triton'" in line for line in lines)


@pytest.mark.parametrize(("op", "name"), [pair for pair in EVERY if pair[1] not in ("torch", "triton")])
def test_a_library_that_cannot_work_here_says_why(op: str, name: str) -> None:
    others = dict.fromkeys(("quantize",), "triton") if op != "quantize" else {}
    with pytest.raises(BackendError, match=f"kernels.{op}: '{name}' cannot work on cpu: .+") as refused:
        resolve(KernelsConfig(**{**others, op: name}), CPU)
    assert len(str(refused.value).splitlines()) == 1


def test_ours_needs_the_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = resolve(KernelsConfig(quantize="triton", gemm="triton"), CPU)
    assert kernels.table["gemm"] == "triton" and kernels.table["norm"] == "torch"
    monkeypatch.setattr(import_module("kernels.hopper.available"), "interpreted", lambda: False)
    # Not that quantize=torch does not fit, which `auto` came to: doing as told would lead here.
    for config, count in ((KernelsConfig(gemm="triton"), 1), (KernelsConfig(quantize="triton", gemm="triton"), 2)):
        with pytest.raises(BackendError) as refused:
            resolve(config, CPU)
        lines = str(refused.value).splitlines()
        assert len(lines) == count and all("interpreter" in line for line in lines)


def test_unknown_names_and_pairs_that_do_not_fit() -> None:
    assert config_problems(KernelsConfig()) == []
    (line,) = config_problems(KernelsConfig(norm="te"))
    assert line == "kernels.norm: found 'te', allowed auto, torch, triton"
    (line,) = config_problems(KernelsConfig(num_sms=-1))
    assert "kernels.num_sms: found -1" in line
    (line,) = config_problems(KernelsConfig(num_sms=133))
    assert line == "kernels.num_sms: found 133, allowed 0 (all) to 132"
    (line,) = config_problems(KernelsConfig(quantize="torch", gemm="triton"))
    assert "transposed copies" in line and "kernels.quantize=triton" in line
    with pytest.raises(BackendError, match="transposed copies"):
        resolve(KernelsConfig(gemm="triton"), CPU)


def test_settings_reach_the_kernels_that_take_them() -> None:
    kernels = resolve(KernelsConfig(quantize="triton", gemm="triton", num_sms=112), CPU)
    assert kernels.gemm.fprop.keywords == {"num_sms": 112}  # type: ignore[attr-defined]
    assert resolve(KernelsConfig(num_sms=112), CPU).gemm is import_module("kernels.gemm")


def test_a_table_of_tiles_is_read_when_a_run_starts(tmp_path: Path) -> None:
    """Not by the first product of its first step; and by nobody whose products do not choose tiles."""
    path = tmp_path / "tiles.json"
    config = KernelsConfig(quantize="triton", gemm="triton", measured=str(path))
    assert resolve(replace(config, gemm="torch"), CPU).table["gemm"] == "torch"
    with pytest.raises(BackendError, match=f"kernels.measured: {path}: no table of measured tiles: FileNotFound"):
        resolve(config, CPU)
    entry = Entry("cpu", "fprop", 128, 128, 128, 1, 132, "ws 128x128", 1.0)
    write_measured(path, [entry, replace(entry, kind="wgrad")])
    kernels = resolve(config, CPU)
    assert kernels.gemm.fprop.keywords == {"measured": str(path)}  # type: ignore[attr-defined]
    write_measured(path, [entry, replace(entry, kind="wgrad", tile="ws 128x192")])
    with pytest.raises(BackendError, match="'ws 128x192' of a wgrad; allowed is one of ws 128x128, plain") as no:
        resolve(config, CPU)
    assert len(str(no.value).splitlines()) == 1


def test_a_width_that_no_tensor_core_takes_is_refused_with_the_layer() -> None:
    config = KernelsConfig(quantize="triton", gemm="triton")
    with pytest.raises(BackendError, match=r"layers\.0\.attention\.q_a.*24.*16"):
        resolve(config, CPU, [("layers.0.attention.q_a", 24, 64), ("layers.0.attention.o", 32, 64)])

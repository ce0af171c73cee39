"""Stand-ins that compute what the libraries compute, from operands in the libraries' own layouts, in float64.

Each refuses what its library refuses: layouts and shapes as the libraries' sources check them, at their call or below.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import quantize
from tests.kernels.libraries.signatures import DEEP_GEMM, TE, Recorder, signature
from tests.kernels.libraries.te_signatures import PYTORCH, STORAGE

TILE = 128


def tiles(length: int) -> int:
    return -(-length // TILE)


def four(length: int) -> int:
    return -(-length // 4) * 4


def decode(codes: Tensor, row_scale: Tensor) -> Tensor:
    """E4M3 [R, C] and a scale for every row and tile [R, T] -> float64."""
    return codes.to(torch.float64) * row_scale.to(torch.float64).repeat_interleave(TILE, 1)[:, : codes.shape[1]]


def of_blocks(scale: Tensor, rows: int) -> Tensor:
    return scale.repeat_interleave(TILE, 0)[:rows]


# transformer-engine


def scale_shape(rows: int, columns: int, dimensions: int) -> tuple[int, int]:
    """Of a matrix stored as [rows, columns]; `Float8BlockQuantizer.get_scale_shape`."""
    return (tiles(rows), four(tiles(columns))) if dimensions == 2 else (tiles(columns), four(rows))


def te_values(tensor: Any, columnwise: bool) -> Tensor:
    """What cuBLAS reads of a tensor, as it is stored: [rows, summed]."""
    parts = tensor.get_metadata()
    side = "columnwise" if columnwise else "rowwise"
    data, scale = parts[f"{side}_data"], parts[f"{side}_scale_inv"]
    assert data is not None, f"the product needs {side} data"
    assert data.dtype == torch.uint8 and data.is_contiguous() and data.ndim == 2
    rows, columns = data.shape
    dimensions = 2 if parts["is_2D_scaled"] else 1
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    assert tuple(scale.shape) == scale_shape(rows, columns, dimensions), (scale.shape, data.shape, dimensions)
    assert columns % 16 == 0, "stride requirement: the caller must pad"
    codes = data.view(torch.float8_e4m3fn)
    if dimensions == 2:
        return decode(codes, of_blocks(scale[:, : tiles(columns)], rows))
    return decode(codes, scale[:, :rows].t())


def te_multiply(a: Any, b: Any, layout: str) -> Tensor:
    """[rows of b, rows of a]."""
    assert not (a.get_metadata()["is_2D_scaled"] and b.get_metadata()["is_2D_scaled"])
    left, right = te_values(a, columnwise=layout[0] == "N"), te_values(b, columnwise=layout[1] == "T")
    assert left.shape[1] == right.shape[1] and left.shape[0] % 8 == 0
    assert b.get_metadata()["is_2D_scaled"] or right.shape[0] % 8 == 0, "outer dimension: the caller must pad"
    return right @ left.t()


def te_write(product: Tensor, given: dict[str, Any], out: Tensor | None) -> Tensor:
    dtype = given["out_dtype"]
    assert dtype in (torch.bfloat16, torch.float32) and given["use_split_accumulator"] is True
    if out is None:
        assert not given.get("accumulate", False)
        return product.to(dtype)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == product.shape
    return out.copy_((out.double() if given.get("accumulate", False) else 0.0) + product)


def te_gemm(given: dict[str, Any]) -> tuple[Any, ...]:
    out = te_write(te_multiply(given["A"], given["B"], given.get("layout", "TN")), given, given.get("out"))
    return out, None, None, None


def te_grouped_gemm(given: dict[str, Any]) -> tuple[Any, ...]:
    a, b, outs, layout = given["A"], given["B"], given["out"], given["layout"]
    assert a and len(a) == len(b) == len(outs) == len(given["quantization_params"]) == len(given["m_splits"])
    for left, right, out, rows in zip(a, b, outs, given["m_splits"], strict=True):
        stored = right.get_metadata()["columnwise_data" if layout[1] == "T" else "rowwise_data"]
        assert rows == stored.shape[1 if layout[1] == "T" else 0]
        te_write(te_multiply(left, right, layout), given, out)
    return outs, None, None


def te_quantized(x: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The library's layouts of our numbers; what its scales are padded with is not a number."""
    assert x.is_contiguous() and x.ndim == 2 and x.shape[0] % 16 == 0 and x.shape[1] % 16 == 0
    blocks, power_of_two = given["block_scaling_dim"] == 2, given["force_pow_2_scales"]
    parts: dict[str, Any] = dict.fromkeys(TE["keys"][f"{STORAGE}.get_metadata"])
    for side, asked in (("rowwise", given["rowwise"]), ("columnwise", given["columnwise"])):
        if not asked:
            continue
        if blocks:
            assert not power_of_two
            q = quantize.quantize_blocks(x)
            data, scale = (q.data, q.scale) if side == "rowwise" else (q.data.t(), q.scale.t())
        else:
            q = (quantize.quantize_rows if side == "rowwise" else quantize.quantize_columns)(x, power_of_two)
            data, scale = q.data, q.scale.t()
        padded = torch.full(scale_shape(*data.shape, given["block_scaling_dim"]), float("nan"))
        padded[: scale.shape[0], : scale.shape[1]] = scale
        parts[f"{side}_data"], parts[f"{side}_scale_inv"] = data.contiguous().view(torch.uint8), padded
    return parts


def install_te(monkeypatch: pytest.MonkeyPatch, available: tuple[bool, str] = (True, "")) -> Recorder:
    """`transformer_engine` of the stored signatures, importable until the test ends."""
    recorder = Recorder()
    called = {name: signature(arguments) for name, arguments in TE["called"].items()}

    def bind(name: str, function: Callable[[dict[str, Any]], Any]) -> Any:
        return recorder.wrap(name, called[name], function)

    class Storage:
        def __init__(self, parts: dict[str, Any]) -> None:
            self.get_metadata = bind(f"{STORAGE}.get_metadata", lambda _: dict(parts))

    def storage(given: dict[str, Any]) -> Storage:
        assert int(given["fp8_dtype"]) == 1 and given["quantizer"] is None
        # The class takes and ignores any other argument.
        assert "args" not in given and "kwargs" not in given, given.keys()
        return Storage({key: given.get(key) for key in TE["keys"][f"{STORAGE}.get_metadata"]})

    def quantizer(options: dict[str, Any]) -> Any:
        assert "internal" in TE["members"][f"{PYTORCH}.quantized_tensor.Quantizer"]
        made = SimpleNamespace(internal=False)

        def run(given: dict[str, Any]) -> Storage:
            assert made.internal and not given["tensor"].requires_grad
            return Storage(te_quantized(given["tensor"], options))

        made.quantize = bind(f"{PYTORCH}.quantized_tensor.Quantizer.quantize", run)
        return made

    functions = {
        "cpp_extensions.gemm.general_gemm": te_gemm,
        "cpp_extensions.gemm.general_grouped_gemm": te_grouped_gemm,
        "quantization.is_fp8_block_scaling_available": lambda given: available,
        "tensor.float8_blockwise_tensor.Float8BlockQuantizer": quantizer,
        STORAGE.removeprefix(f"{PYTORCH}."): storage,
    }
    contents = {f"{PYTORCH}.{name}": bind(f"{PYTORCH}.{name}", function) for name, function in functions.items()}
    members = TE["members"][f"{PYTORCH}.constants.DType"]
    contents[f"{PYTORCH}.constants.DType"] = SimpleNamespace(
        **{member: 1 if member == "kFloat8E4M3" else 0 for member in members}
    )
    modules: dict[str, ModuleType] = {}
    for name, content in contents.items():
        parts = name.split(".")[:-1]
        for path in (".".join(parts[: depth + 1]) for depth in range(len(parts))):
            monkeypatch.setitem(sys.modules, path, modules.setdefault(path, ModuleType(path)))
        setattr(modules[".".join(parts)], name.split(".")[-1], content)
    return recorder


# DeepGEMM on Hopper


def deep_rows(operand: tuple[Tensor, Tensor], scale_rows: int | None = None) -> Tensor:
    """[rows, summed] of 1x128 tiles, or of blocks when there are `scale_rows` rows of scales."""
    data, scale = operand
    assert data.dtype == torch.float8_e4m3fn and data.is_contiguous() and data.shape[1] % 16 == 0
    assert scale.dtype == torch.float32 and tuple(scale.shape) == (scale_rows or data.shape[0], tiles(data.shape[1]))
    if scale_rows is None:
        return decode(data, scale)
    assert scale.is_contiguous()
    return decode(data, of_blocks(scale, data.shape[0]))


def deep_dense(given: dict[str, Any]) -> None:
    d, c = given["d"], given.get("c")
    assert d.is_contiguous() and d.numel()
    if given.get("recipe") is None:
        assert d.dtype == torch.bfloat16 and c is None
        d.copy_(deep_rows(given["a"]) @ deep_rows(given["b"], tiles(given["b"][0].shape[0])).t())
    else:
        assert given["recipe"] == (1, 1, 128) and d.dtype == torch.float32 and c is d
        d.copy_(c.double() + deep_rows(given["a"]) @ deep_rows(given["b"]).t())


def deep_m_grouped(given: dict[str, Any]) -> None:
    (data, scale), (b, b_scale), d, experts = given["a"], given["b"], given["d"], given["grouped_layout"]
    assert d.dtype == torch.bfloat16 and d.is_contiguous() and b.is_contiguous() and b_scale.is_contiguous()
    assert experts.dtype == torch.int32 and experts.shape == (data.shape[0],) and data.shape[0] % TILE == 0
    assert b_scale.shape == (b.shape[0], tiles(b.shape[1]), tiles(b.shape[2]))
    d.fill_(float("nan"))
    for first in range(0, data.shape[0], TILE):
        block = slice(first, first + TILE)
        expert, real = int(experts[first]), experts[block] >= 0
        assert expert >= 0 and set(experts[block][real].tolist()) == {expert}
        product = deep_rows((data[block], scale[block])) @ deep_rows((b[expert], b_scale[expert]), b_scale.shape[1]).t()
        d[block] = torch.where(real[:, None], product, float("nan")).to(d.dtype)


def deep_k_grouped(given: dict[str, Any]) -> None:
    d, c = given["d"], given["c"]
    sizes, sizes_tensor = [value for name, value in given.items() if name not in ("a", "b", "d", "c", "recipe")]
    assert given["recipe"] == (1, 1, 128) and d.dtype == torch.float32 and c is d and d.is_contiguous()
    assert isinstance(sizes, list) and all(size % TILE == 0 for size in sizes) and len(sizes) == d.shape[0]
    assert sizes_tensor.dtype == torch.int32 and sizes_tensor.tolist() == sizes
    first = 0
    for expert, size in enumerate(sizes):
        wide = []
        for (data, scale), rows in zip((given["a"], given["b"]), d.shape[1:], strict=True):
            assert data.ndim == 1 and data.is_contiguous() and data.numel() == rows * sum(sizes)
            assert tuple(scale.shape) == (rows, sum(sizes) // TILE)
            part = data[first * rows : (first + size) * rows].view(rows, size)
            wide.append(decode(part, scale[:, first // TILE : (first + size) // TILE]))
        d[expert] = d[expert].double() + wide[0] @ wide[1].t()
        first += size


def install_deep_gemm(monkeypatch: pytest.MonkeyPatch, version: str) -> Recorder:
    recorder = Recorder()
    module = ModuleType("deep_gemm")
    module.__version__ = version  # type: ignore[attr-defined]
    functions = {
        "fp8_gemm_nt": deep_dense,
        "m_grouped_fp8_gemm_nt_contiguous": deep_m_grouped,
        "k_grouped_fp8_gemm_nt_contiguous": deep_k_grouped,
    }
    for name, function in functions.items():
        setattr(module, name, recorder.wrap(name, DEEP_GEMM[version][name], function))
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    return recorder


# torch


def install_scaled_mm(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Installed torch's `scaled_mm` without a GPU. Where it knows the shapes, its own check of a call runs too."""
    recorder, real = Recorder(), F.scaled_mm
    rows_kind, blocks_kind = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128

    def run(given: dict[str, Any]) -> Tensor:
        a, b, scale_a, scale_b = (given[key] for key in ("mat_a", "mat_b", "scale_a", "scale_b"))
        m, k, n = *a.shape, b.shape[1]
        assert a.dtype == b.dtype == torch.float8_e4m3fn and b.shape[0] == k
        assert a.is_contiguous() and b.t().is_contiguous(), "mat_a is row-major, mat_b column-major"
        assert m % 8 == 0 and n % 16 == 0 and k % 16 == 0 and not given.get("use_fast_accum", False)
        assert given["scale_recipe_a"] == rows_kind
        check_strided(scale_a, (m, tiles(k)), m)
        if given["scale_recipe_b"] == blocks_kind:
            check_strided(scale_b, (four(tiles(k)), tiles(n)), four(tiles(k)))
            right = of_blocks(scale_b.t()[:, : tiles(k)], n)
        else:
            assert given["scale_recipe_b"] == rows_kind
            check_strided(scale_b, (n, tiles(k)), n)
            right = scale_b
        if n % TILE == 0 and k % TILE == 0:
            # Torch's own check of shapes without data; it rounds other widths down, its kernel rounds them up.
            on_meta = {
                key: value.as_strided(value.shape, value.stride()).to("meta") if isinstance(value, Tensor) else value
                for key, value in given.items()
            }
            assert real(**on_meta).shape == (m, n)
        return (decode(a, scale_a) @ decode(b.t(), right).t()).to(given["output_dtype"])

    def check_strided(scale: Tensor, shape: tuple[int, int], stride: int) -> None:
        assert scale.dtype == torch.float32 and tuple(scale.shape) == shape, (scale.shape, shape)
        assert scale.stride(0) == 1, scale.stride()
        assert scale.stride(1) == stride or (scale.shape[1] == 1 and scale.stride(1) == 1), (scale.stride(), stride)

    monkeypatch.setattr(F, "scaled_mm", recorder.wrap("scaled_mm", inspect.signature(real), run))
    return recorder

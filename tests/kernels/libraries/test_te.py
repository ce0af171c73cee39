"""transformer-engine's adapters on a library of its signatures: calls bind, results are the torch module's."""

from __future__ import annotations

import ast
import inspect
import zipfile
from pathlib import Path

import pytest
import torch

from kernels import quantize
from kernels.libraries import te_gemm, te_grouped, te_quantize, te_tensors
from kernels.quantize import Quantized, quantize_rows
from tests.kernels.libraries import te_signatures
from tests.kernels.libraries.cases import COUNTS, SHAPES, check, dense_products, grouped_products, numbers
from tests.kernels.libraries.fakes import install_te, scale_shape
from tests.kernels.libraries.signatures import TE, Recorder

MODULES = (te_gemm, te_grouped, te_quantize, te_tensors)


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install_te(monkeypatch)


@pytest.mark.parametrize(("dtype", "contiguous"), [(None, False), (torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_products(te: Recorder, shape: tuple[int, int, int], dtype: torch.dtype | None, contiguous: bool) -> None:
    check(dense_products(te_gemm, shape, dtype, contiguous))
    assert len(te.named("general_gemm")) == (5 if shape[0] else 0)


@pytest.mark.parametrize(("dtype", "contiguous"), [(None, False), (torch.float32, True)])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products(te: Recorder, counts: tuple[int, ...], dtype: torch.dtype | None, contiguous: bool) -> None:
    check(grouped_products(te_grouped, counts, 144, 256, dtype, contiguous))
    assert len(te.named("general_grouped_gemm")) == (5 if sum(counts) else 0)


def test_weight_gradients_are_added_inside_the_product(te: Recorder) -> None:
    check(dense_products(te_gemm, (64, 32, 48), None, False))
    check(grouped_products(te_grouped, (5, 0, 20), 32, 48, None, False))
    assert [call["accumulate"] for call in te.named("general_gemm")] == [False, False, False, True, False]
    assert [call["accumulate"] for call in te.named("general_grouped_gemm")] == [False, False, False, True, False]


def same(found: Quantized, expected: Quantized) -> bool:
    return (
        torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8))
        and torch.equal(found.scale, expected.scale)
        and found.counts == expected.counts
    )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(256, 384), (130, 80), (1, 48), (300, 128)])
def test_quantisers(te: Recorder, shape: tuple[int, int], power_of_two: bool) -> None:
    x = numbers(*shape)
    rows, columns = quantize.quantize_rows(x, power_of_two), quantize.quantize_columns(x, power_of_two)
    assert same(te_quantize.quantize_rows(x.clone().requires_grad_(), power_of_two), rows)
    assert same(te_quantize.quantize_columns(x, power_of_two), columns)
    both = te_quantize.quantize_both(x, power_of_two)
    assert same(both[0], rows) and same(both[1], columns)
    assert same(te_quantize.requantize_columns(rows, power_of_two), quantize.requantize_columns(rows, power_of_two))
    options = te.named("Float8BlockQuantizer")
    assert all(o["amax_epsilon"] == 2.0**-100 and o["force_pow_2_scales"] is power_of_two for o in options)
    assert [(o["rowwise"], o["columnwise"]) for o in options] == [
        (True, False), (False, True), (True, True), (False, True)
    ]  # fmt: skip


@pytest.mark.parametrize("counts", [(128, 256), (3, 0, 130, 16), (0, 40)])
def test_quantisers_of_groups(te: Recorder, counts: tuple[int, ...]) -> None:
    x = numbers(sum(counts), 80)
    columns = quantize.quantize_columns(x, counts=counts)
    assert same(te_quantize.quantize_columns(x, counts=counts), columns)
    both = te_quantize.quantize_both(x, counts=list(counts))
    assert same(both[0], quantize.quantize_rows(x)) and same(both[1], columns)
    whole = all(count % 128 == 0 for count in counts)
    assert len(te.named("quantize")) == (2 if whole else 3), "one read where nothing is padded"


@pytest.mark.parametrize("shape", [(256, 384), (144, 80), (2, 48, 144)])
def test_weights_get_both_layouts(te: Recorder, shape: tuple[int, ...]) -> None:
    w = numbers(*shape)
    found = te_quantize.quantize_blocks(w)
    assert same(found, quantize.quantize_blocks(w)) and found.has_tile(quantize.BLOCK_TILE)
    assert found.transposed is not None and found.transposed.is_contiguous()
    assert torch.equal(found.transposed.view(torch.uint8), found.data.mT.view(torch.uint8))


def test_what_the_quantiser_writes_is_what_the_products_take(te: Recorder) -> None:
    x, dy, w = numbers(64, 128), numbers(64, 256, seed=1), numbers(256, 128, seed=2)
    (qx, x_t), (qdy, dy_t) = te_quantize.quantize_both(x), te_quantize.quantize_both(dy)
    qw = te_quantize.quantize_blocks(w)
    te_gemm.fprop(qx, qw)
    te_gemm.dgrad(qdy, qw)
    te_gemm.wgrad(dy_t, x_t)
    stored = [call["A"] for call in te.named("general_gemm")] + [call["B"] for call in te.named("general_gemm")]
    ours = {q.data_ptr() for q in (qx.data, qdy.data, qw.data, qw.transposed, x_t.data, dy_t.data) if q is not None}
    for tensor in stored:
        parts = tensor.get_metadata()
        data = parts["rowwise_data"] if parts["rowwise_data"] is not None else parts["columnwise_data"]
        assert data.data_ptr() in ours, "a copy of an operand that fits as it is"


def test_refusals(te: Recorder) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        te_quantize.quantize_rows(numbers(4, 20))
    with pytest.raises(ValueError, match=r"\(40, 20\).*multiples of 16"):
        te_quantize.quantize_blocks(numbers(40, 20))
    with pytest.raises(TypeError, match="float64"):
        te_quantize.quantize_columns(numbers(4, 32).double())
    with pytest.raises(TypeError, match="float64"):
        te_quantize.quantize_blocks(numbers(32, 32).double())
    with pytest.raises(ValueError, match="sum to 3; the matrix has 4 rows"):
        te_quantize.quantize_columns(numbers(4, 32), counts=(1, 2))
    with pytest.raises(ValueError, match="128x128 tiles"):
        te_quantize.requantize_columns(quantize.quantize_blocks(numbers(256, 256)))
    assert not te.calls


def imported_names(module: object) -> set[str]:
    """Dotted names that a module's functions import from transformer-engine."""
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        f"{node.module}.{alias.name}"
        for node in froms
        if (node.module or "").startswith("transformer_engine")
        for alias in node.names
    }


def test_every_call_is_bound(te: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the adapters import has a stored signature, and all that is stored is called."""
    known = {*TE["called"], *TE["members"]}
    assert set().union(*map(imported_names, MODULES)) <= known
    test_dense_products(te, (32, 48, 64), None, False)
    test_grouped_products(te, (5, 20), None, False)
    test_weights_get_both_layouts(te, (48, 80))
    monkeypatch.setattr(te_tensors, "hopper_problem", lambda *_: None)
    monkeypatch.setattr(te_tensors, "cuda_version_problem", lambda *_: None)
    monkeypatch.setattr(te_tensors.metadata, "version", lambda _: te_tensors.VERSION)
    assert te_gemm.problem(torch.device("cuda")) is None
    assert {name for name, _ in te.calls} == set(TE["called"])
    assert te_signatures.PACKAGE == f"{te_tensors.LIBRARY}=={te_tensors.VERSION}"


def test_a_renamed_argument_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{te_signatures.PYTORCH}.cpp_extensions.gemm.general_gemm"
    renamed = TE["called"][name].replace("use_split_accumulator", "split_accumulator")
    monkeypatch.setitem(TE["called"], name, renamed)
    install_te(monkeypatch)
    with pytest.raises(TypeError, match="use_split_accumulator"):
        te_gemm.fprop(quantize_rows(numbers(16, 32)), quantize.quantize_blocks(numbers(32, 32)))


@pytest.mark.slow
def test_the_stored_signatures_are_those_of_the_release(tmp_path: Path) -> None:
    wheel = te_signatures.download(tmp_path)
    assert te_signatures.read(wheel) == TE
    with zipfile.ZipFile(wheel) as archive:
        rule = te_signatures.definition(archive, te_signatures.SCALE_SHAPE)
    source = ast.unparse(ast.Module(body=[rule], type_ignores=[]))
    space: dict[str, object] = {"math": __import__("math"), "round_up_to_nearest_multiple": lambda n, m: -(-n // m) * m}
    exec("from __future__ import annotations\n" + source, space)
    for dimensions in (1, 2):
        quantizer = type("Quantizer", (), {"block_len": 128, "block_scaling_dim": dimensions})()
        for rows, columns in ((256, 384), (130, 576), (1, 16)):
            shape = space["get_scale_shape"]
            assert shape(quantizer, (rows, columns), columnwise=False) == scale_shape(rows, columns, dimensions)  # type: ignore[operator]
            assert shape(quantizer, (rows, columns), columnwise=True) == scale_shape(columns, rows, dimensions)  # type: ignore[operator]

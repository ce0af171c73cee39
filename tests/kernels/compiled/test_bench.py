"""The bench: what it prints without a GPU; and everything it does on one but its timer, in Triton's interpreter."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import e5m6, gemm, quantize
from kernels.compiled import bench as module
from kernels.compiled.bench import main, measured
from kernels.compiled.choose import choose, ranked, variant_name
from kernels.compiled.measure import DEFINITION, Backend, Bench, GpuTimer, calc_diff, plain_product
from kernels.compiled.modelled import markdown
from kernels.compiled.properties import Properties
from kernels.compiled.shapes import Shape, _shape, correctness_shapes, deepseek_shapes
from kernels.compiled.streams import Sizes, Stream, streams, tensors
from kernels.hopper import gemm as hopper_gemm
from kernels.hopper import grouped as hopper_grouped
from kernels.hopper import quantize as hopper_quantize
from kernels.hopper.tile import DGRAD, FPROP, GROUPED_DGRAD, GROUPED_FPROP, GROUPED_WGRAD, TILES, WGRAD
from kernels.quantize import Quantized
from tests.kernels.compiled.by_hand import forget, install
from tests.kernels.interpreter import repaired

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
COUNTS = (3, 0, 130)
TINY = [
    _shape("dense", FPROP, 33, 48, 160),
    _shape("dense", DGRAD, 33, 160, 48),
    _shape("dense", WGRAD, 48, 160, 130),
    _shape("experts", GROUPED_FPROP, 133, 48, 144, COUNTS),
    _shape("experts", GROUPED_DGRAD, 133, 48, 144, COUNTS),
    _shape("experts", GROUPED_WGRAD, 48, 64, 133, COUNTS),
]


@pytest.fixture(autouse=True)
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Properties]]:
    yield install(monkeypatch)
    forget()


class Timer:
    """Runs the call once and says a millisecond more every time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return 1e-3 * self.calls


def triton() -> Backend:
    return Backend("triton", hopper_gemm, hopper_grouped, takes_tile=True)


def torch_bench(**changes) -> Bench:
    settings = {"device": CPU, "timer": Timer(), "ours": DEFINITION, "quantize": quantize, **changes}
    return Bench(**settings)


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"only": "", "seeds": 1, "write": None, **changes})


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_without_a_gpu_it_says_so_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no CUDA device here: nothing is measured; the figures below are modelled from machine code"
    found = json.loads(lines[-1])
    assert found["measured"] is False and "Modelled" in "".join(lines)
    by_product = {each["product"]: each for each in found["products"]}
    o_proj = by_product["fprop 16384x7168x16384"]
    assert set(o_proj["modelled_tflops"]) == set(o_proj["tile"]) == {"132", "112"}
    assert by_product["fprop 4096x7168x16384"]["deep_gemm_published_tflops"] == 1520
    assert len(found["products"]) == sum("x" in line and "│" in line for line in lines)


def test_only_some_products(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "grouped wgrad"]) == 0
    found = last_line(capsys)["products"]
    assert found and all(each["product"].startswith("grouped wgrad") for each in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-sms", "0"], "--num-sms 0: 1 to 132"),
        (["--seeds", "0"], "--seeds 0: at least 1"),
        (["--only", "conv"], "--only conv: no product has it in its name"),
        (["--write", "tiles.json"], "--write: no CUDA device here, and modelled tiles are no measured ones"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 64
    assert capsys.readouterr().err == f"python -m kernels bench: {message}\n"


def test_a_page_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--document", str(tmp_path / "none" / "page.md")]) == 73
    assert re.fullmatch(
        r"python -m kernels bench: cannot write .*: No such file or directory\n", capsys.readouterr().err
    )


def test_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--document", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "Nothing here was measured" in text and "{" not in text
    assert "| fprop 16384x7168x16384 | o_proj | ws 128x192 |" in text


def test_the_committed_page_is_what_the_command_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    forget()
    assert (ROOT / "docs/kernel-speed.md").read_text(encoding="utf-8") == markdown()


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.label)
def test_definition_passes_its_own_check_with_every_kind_of_operand(shape: Shape) -> None:
    found = dict(torch_bench().wrong([shape], range(2)))
    assert list(found) == [f"{shape.label}, {tile.name}" for tile in TILES[shape.problem.kind]]
    assert not any(found.values())


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.label)
def test_triton_kernels_pass_the_check_in_the_interpreter(stored: dict[str, Properties], shape: Shape) -> None:
    """By one tile of each kind: the others have tests of their own."""
    for tile in TILES[shape.problem.kind][1:]:
        del stored[variant_name(shape.problem.kind, tile)]
    bench = torch_bench(ours=triton(), quantize=hopper_quantize)
    with repaired():
        found = dict(bench.wrong([shape], range(1)))
    assert list(found) == [f"{shape.label}, ws 128x128"]
    assert not any(found.values()), found


def spoiled(factor: float, function: str = "fprop") -> SimpleNamespace:
    """The torch products, one of them off by a factor."""
    kept = {name: getattr(gemm, name) for name in ("fprop", "dgrad", "wgrad")}
    return SimpleNamespace(**{**kept, function: lambda *args, **given: kept[function](*args, **given).mul_(factor)})


def test_a_wrong_product_is_found_and_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    timer = Timer()
    bench = torch_bench(ours=Backend("ours", spoiled(1.01)), timer=timer)
    assert measured(bench, options(seeds=2), TINY[:2], TINY[:2], []) == 1
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])["wrong"]
    assert set(found) == {f"fprop 33x48x160, {tile.name}" for tile in TILES[FPROP]}
    assert [line.split(":")[0] for line in found["fprop 33x48x160, ws 128x192"]] == ["seed 0", "seed 1"]
    assert printed[0].startswith("wrong: fprop 33x48x160, ws 128x128: seed 0: ")
    assert timer.calls == 0


def test_an_unsteady_product_is_found() -> None:
    calls = []

    def fprop(*args, **given) -> Tensor:
        calls.append(1)
        out = gemm.fprop(*args, **given)
        out[0, 0] += 2.0**-6 * (len(calls) % 2)
        return out

    unsteady = SimpleNamespace(fprop=fprop)
    shape = _shape("dense", FPROP, 512, 256, 256)
    (found, *_) = torch_bench(ours=Backend("ours", unsteady)).wrong([shape], [0])
    assert found[1] == ["seed 0: another result when run again"]


def test_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ours, BF16 and a library without grouped products; every tile, and the table that the chooser takes."""
    timer = Timer()
    bench = torch_bench(timer=timer, others=[Backend("library", gemm)], num_sms=112)
    path = tmp_path / "tiles.json"
    assert measured(bench, options(write=path), TINY, TINY, []) == 0
    found = last_line(capsys)
    assert found["measured"] is True and found["wrong"] == {} and found["num_sms"] == 112
    dense, experts = found["rates"][0], found["rates"][3]
    assert dense["seconds"] == pytest.approx(1e-3)
    assert dense["tflops"] == pytest.approx(2 * 33 * 48 * 160 / 1e-3 / 1e12)
    assert dense["gigabytes_per_s"] == pytest.approx(((33 + 48) * 160 + 33 * 48 * 2) / 1e-3 / 1e9)
    assert set(dense["others"]) == {"bf16", "library"} and set(experts["others"]) == {"bf16"}
    assert list(dense["tiles"]) == [tile.name for tile in TILES[FPROP]]
    assert dense["tiles"][dense["tile"]] == dense["tflops"]
    assert timer.calls == 4 * 5 + 2 * 2 + 3 + 6  # tiles of each kind, a library for dense ones, BF16
    # The timer grows: the chosen tile, timed first, is the fastest of all.
    assert [each["tile"] for each in json.loads(path.read_text())["entries"]] == [
        choose(s.problem.kind, s.problem.rows, s.problem.columns, s.problem.depth, s.problem.groups, 112).name
        for s in TINY
    ]
    chosen = choose(FPROP, 33, 48, 160, num_sms=112, measured=path)
    assert chosen.name == dense["tile"]


def test_without_write_only_the_chosen_tile_is_timed() -> None:
    timer = Timer()
    rate = torch_bench(timer=timer).rate(TINY[0])
    assert timer.calls == 2 and not rate.tiles


def test_tile_and_sms_reach_the_kernels() -> None:
    seen = []

    def fprop(x, w, *, tile, num_sms) -> Tensor:
        seen.append((tile.name, num_sms))
        return gemm.fprop(x, w)

    bench = torch_bench(ours=Backend("ours", SimpleNamespace(fprop=fprop), takes_tile=True), num_sms=112)
    bench.rate(TINY[0], every_tile=True)
    assert seen[0] == (choose(FPROP, 33, 48, 160, num_sms=112).name, 112)
    assert {name for name, _ in seen} == {tile.name for tile, _ in ranked(FPROP, 112)}


def test_weight_gradients_are_added_to_fp32() -> None:
    given = []

    def wgrad(dy, x, *, into) -> Tensor:
        given.append(into)
        return gemm.wgrad(dy, x, into=into)

    torch_bench(ours=Backend("ours", SimpleNamespace(wgrad=wgrad))).rate(TINY[2])
    assert given[0].dtype == torch.float32 and given[0].shape == (48, 160)


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.label)
def test_plain_product_is_the_definition_s(shape: Shape) -> None:
    bench = torch_bench()
    given = bench.operands(shape)
    expected = bench.product(DEFINITION, shape, given.a, given.b, None)
    found = plain_product(shape, given.a, given.b)
    if isinstance(found, list):
        found = torch.stack(found) if shape.problem.kind == GROUPED_WGRAD else torch.cat(found)
    assert calc_diff(found, expected) < 1e-5


def small_streams(package: str) -> list[Stream]:
    return streams(package, Sizes(tokens=40, hidden=144, expert=64, weight=(144, 48)))


def test_definitions_pass_as_memory_bound_kernels() -> None:
    found = dict(torch_bench().wrong_streams(small_streams("kernels"), range(2)))
    assert len(found) == 17 and not any(found.values()), found


def test_memory_bound_kernels_pass_in_the_interpreter() -> None:
    with repaired():
        found = dict(torch_bench().wrong_streams(small_streams("kernels.hopper"), range(1)))
    assert not any(found.values()), found


def test_wrong_memory_bound_kernels_are_found() -> None:
    def one_code_off(x: Tensor) -> Quantized:
        q = quantize.quantize_rows(x)
        codes = q.data.view(torch.uint8).clone()
        codes[0, 0] ^= 1
        return Quantized(codes.view(torch.float8_e4m3fn), q.scale)

    def other_scale(x: Tensor) -> Quantized:
        q = quantize.quantize_rows(x)
        return Quantized(q.data, q.scale * 1.01)

    def encoded(x: Tensor) -> e5m6.E5M6:
        q = e5m6.encode(x)
        return e5m6.E5M6(q.codes ^ 1, q.scale)

    def arguments(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor]:
        return (torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)).to(dtype),)

    wrong = [
        Stream("code", one_code_off, quantize.quantize_rows, arguments, exact=True),
        Stream("scale", other_scale, quantize.quantize_rows, arguments),
        Stream("e5m6", encoded, e5m6.encode, arguments, exact=True),
        Stream("values", lambda x: x * 1.01, lambda x: x, arguments),
    ]
    found = dict(torch_bench().wrong_streams(wrong, range(1)))
    assert found["code"] == ["seed 0: result 0: not bit for bit the definition's"]
    assert all(len(lines) >= 1 for lines in found.values()), found


def test_bandwidth_counts_every_tensor_once(capsys: pytest.CaptureFixture[str]) -> None:
    bench = torch_bench()
    (rows,) = [each for each in small_streams("kernels") if each.name == "quantize.quantize_rows"]
    rate = bench.stream_rate(rows)
    assert rate.gigabytes_per_s == pytest.approx((40 * 144 * 2 + 40 * 144 + 40 * 2 * 4) / 1e-3 / 1e9)
    assert measured(torch_bench(), options(), TINY[:1], [], [rows]) == 0
    assert "quantize.quantize_rows" in capsys.readouterr().out
    assert sum(each.numel() for each in tensors((torch.zeros(3), [Quantized(torch.zeros(2), torch.zeros(1))], 7))) == 6


def test_only_reaches_the_gpu_branch(capsys: pytest.CaptureFixture[str]) -> None:
    timer = Timer()
    assert measured(torch_bench(timer=timer), options(only="experts"), TINY, TINY, small_streams("kernels")) == 0
    assert [each["name"] for each in last_line(capsys)["rates"]] == ["experts"] * 3


def test_lists_hold_what_deepseek_publishes() -> None:
    sizes = {(s.problem.kind, s.problem.rows, s.problem.columns, s.problem.depth) for s in deepseek_shapes()}
    for tokens in (64, 128, 4096):
        for n, k in ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)):
            assert (FPROP, tokens, n, k) in sizes
    assert (DGRAD, 4096, 7168, 2112) in sizes and (DGRAD, 4096, 1536, 24576) in sizes
    for tokens in (4096, 8192):
        for m, n in ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168)):
            assert (WGRAD, m, n, tokens) in sizes
    assert {(GROUPED_FPROP, 32768, 4096, 7168), (GROUPED_FPROP, 32768, 7168, 2048)} <= sizes
    assert {(GROUPED_DGRAD, 32768, 7168, 4096), (GROUPED_DGRAD, 32768, 2048, 7168)} <= sizes
    ours = {s.problem.groups for s in deepseek_shapes() if s.problem.kind == GROUPED_WGRAD}
    assert ours == {4, 8, 16}
    assert any(0 in s.counts for s in deepseek_shapes())
    for shape in [*deepseek_shapes(), *correctness_shapes()]:
        problem = shape.problem
        if shape.counts:
            summed = problem.depth if problem.kind == GROUPED_WGRAD else problem.rows
            assert sum(shape.counts) == summed and len(shape.counts) == problem.groups


def test_gpu_bench_names_every_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Libraries that cannot work are named with their reason and left out."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    bench = module.gpu_bench(112, None)
    said = capsys.readouterr().err
    assert "not measured: torch.nn.functional.scaled_mm needs" in said and "not measured: DeepGEMM needs" in said
    assert not bench.others and bench.num_sms == 112 and bench.ours.takes_tile


def test_main_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All of the command but the device: lists, options, table of tiles, exit codes."""
    asked = []

    def gpu_bench(num_sms: int, table: str | None) -> Bench:
        asked.append((num_sms, table))
        return torch_bench(num_sms=num_sms, measured=table)

    monkeypatch.setattr(module, "no_gpu", lambda: None)
    monkeypatch.setattr(module, "gpu_bench", gpu_bench)
    monkeypatch.setattr(module, "deepseek_shapes", lambda: TINY[:2])
    monkeypatch.setattr(module, "correctness_shapes", lambda: TINY[2:3])
    monkeypatch.setattr(module, "streams", lambda: small_streams("kernels")[:1])
    path = str(tmp_path / "tiles.json")
    assert main(["--num-sms", "112", "--seeds", "1", "--write", path]) == 0
    assert [each["num_sms"] for each in json.loads(Path(path).read_text())["entries"]] == [112, 112]
    assert main(["--measured", path, "--only", "dense"]) == 0
    assert asked == [(112, None), (132, path)]
    assert [each["label"] for each in last_line(capsys)["rates"]] == ["fprop 33x48x160", "dgrad 33x160x48"]
    # A table that cannot be written or added to is refused before anything is measured.
    asked.clear()
    assert main(["--write", str(tmp_path / "none" / "tiles.json")]) == 73
    Path(path).write_text("[]")
    assert main(["--write", path]) == 65
    assert not asked and Path(path).read_text() == "[]"
    forget()
    assert main(["--measured", path]) == 65
    assert capsys.readouterr().err.count("tiles.json: no table of measured tiles: TypeError") == 2
    monkeypatch.setattr(module, "gpu_bench", lambda *_: torch_bench(ours=Backend("ours", spoiled(1.01, "wgrad"))))
    assert main([]) == 1


def test_timer_flushes_l2_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    times = iter([3.0, 1.0, 2.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, after: Event) -> float:
            done.append("read")
            return next(times)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    timer = GpuTimer(CPU, repeats=3, warm_up=2, flush_bytes=8)
    timer._flush = SimpleNamespace(zero_=lambda: done.append("flush"))
    assert timer(lambda: done.append("call")) == pytest.approx(2e-3)
    run = ["flush", "record", "call", "record"]
    assert done == ["call", "call", *run, *run, *run, "wait", "read", "read", "read"]
    assert GpuTimer(CPU).flush_bytes >= 2 * 50 * 2**20  # twice an H100's L2

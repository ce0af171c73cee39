"""torch.profiler traces: one in DeepSeek's published form against a count of grid cells, and a real one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.trace.analyse import figures, hidden, rounds, windows
from parallel.trace.load import load_all
from parallel.trace.torch_trace import is_all_to_all_name
from tests.parallel.trace.deepseek_like import MOVES, ORDER, trace


def cells(truth: list[Any]) -> dict[str, float]:
    """Milliseconds by counting cells of 10 us."""
    first, last = min(a for kind, a, _ in truth), max(b for _, _, b in truth)
    busy = {kind: np.zeros(last - first, dtype=bool) for kind in ("compute", "all-to-all", "other")}
    for kind, a, b in truth:
        busy[kind][a - first : b - first] = True
    compute, moves = busy["compute"], busy["all-to-all"]
    counts = {
        "span": len(compute),
        "compute": compute.sum(),
        "all_to_all": moves.sum(),
        "overlapped": (compute & moves).sum(),
        "exposed": (moves & ~compute).sum(),
        "idle": (~moves & ~compute).sum(),
    }
    return {name: float(count) / 100 for name, count in counts.items()}


@pytest.mark.parametrize("streams", [(7, 27), (27, 7), (3, 4)])
def test_published_form_against_a_count_of_cells(tmp_path: Path, streams: tuple[int, int]) -> None:
    written, truth = trace(4, *streams)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(written, indent=2))
    [lanes], skipped = load_all(path)
    found = figures(lanes, windows([lanes])[0])
    expected = cells(truth)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, abs=1e-6)
    assert skipped == 0 and lanes.source == "torch.profiler, GPU"
    # The schedule is theirs, so the figures must lie where theirs do.
    assert 120 < found.span < 135 and 0.005 < found.exposed_of_all_to_all < 0.05
    [one] = rounds([lanes])
    assert one.order == tuple(ORDER) and one.equals == ("published",) and one.times == 4
    hides = {entry.name: entry for entry in hidden([lanes])}
    assert list(hides) == ["combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"]
    for step, tens in MOVES.items():
        assert hides[step].count == 4 and hides[step].busy == pytest.approx(tens / 100)
    assert next(iter(hides["dispatch(F)"].behind)) == "mlp(B)"
    assert next(iter(hides["combine(F)"].behind)) == "attn(B)"


def without_gpu_annotations(written: dict[str, Any]) -> Any:
    return [event for event in written["traceEvents"] if event.get("cat") != "gpu_user_annotation"]


def as_pairs(written: dict[str, Any]) -> Any:
    """Every complete event as a begin and an end, sorted by time as the format asks, innermost ends first."""
    events: list[tuple[float, int, float, dict[str, Any]]] = []
    for event in written["traceEvents"]:
        if event["ph"] != "X" or event["cat"] != "kernel":
            events.append((event["ts"], 2, 0.0, event))
            continue
        rest = {key: value for key, value in event.items() if key not in ("ph", "dur")}
        end = event["ts"] + event["dur"]
        events.append((event["ts"], 1, -event["dur"], {"ph": "B", **rest}))
        events.append((end, 0, 0.0, {"ph": "E", "pid": event["pid"], "tid": event["tid"], "ts": end}))
    return {"traceEvents": [event for *_, event in sorted(events, key=lambda item: item[:3])]}


def with_holes(written: dict[str, Any]) -> Any:
    extra = [
        {"ph": "X", "cat": "kernel", "name": "no time", "dur": 5},
        {"ph": "X", "cat": "kernel", "name": "no number", "ts": "soon", "dur": 5},
        {"ph": "X", "cat": "kernel", "ts": 1_740_000_000_000_000 + 10, "dur": -1, "name": "negative"},
        {"ph": "E", "pid": 0, "tid": 7, "ts": 3},
        {"ph": "B", "pid": 9, "tid": 9, "ts": 3, "name": "never ends"},
        {"ph": "X", "ts": 5, "dur": 1},
        {},
    ]
    return {"traceEvents": extra + written["traceEvents"]}


@pytest.mark.parametrize("change", [without_gpu_annotations, as_pairs, with_holes])
def test_other_forms_give_the_same_figures(tmp_path: Path, change: Any) -> None:
    written, truth = trace(3)
    path = tmp_path / "train.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump(change(written), file)
    [lanes], skipped = load_all(path)
    found, expected = figures(lanes, windows([lanes])[0]), cells(truth)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, abs=1e-6)
    assert skipped == (5 if change is with_holes else 0)
    assert [(one.equals, one.times) for one in rounds([lanes])] == [(("published",), 3)]
    # Without rows of annotations on the GPU, kernels belong to the step whose host code launched them.
    assert {one.name: one.count for one in hidden([lanes])} == dict.fromkeys(MOVES, 3)
    assert next(one for one in hidden([lanes]) if one.name == "dispatch(F)").behind["mlp(B)"] > 4


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("void deep_ep::internode::dispatch<false, 8, true, 1024>(int4*)", True),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 8>(int4*)", True),
        ("void deep_ep::internode::cached_notify<true, 4>(int)", True),
        ("void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*)", True),
        ("moe_dispatch_kernel", True),
        ("gloo:all_to_all", True),
        ("c10d::alltoall_base_", True),
        (
            "void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128> >(flash::Params)",
            False,
        ),
        ("void at::native::reduce_kernel<512, 1, combine<float> >(float)", False),
        ("void cub::DeviceRadixSortOnesweepKernel<cub::DispatchRadixSort<false> >()", False),
        ("void deep_gemm::fp8_gemm_kernel<4096u>(...)", False),
        ("aten::mm", False),
    ],
)
def test_all_to_alls_are_told_by_their_names(name: str, moves: bool) -> None:
    assert is_all_to_all_name(name) is moves


def test_nccl_kernels_are_told_by_their_description(tmp_path: Path) -> None:
    def kernel(name: str, start: int, stream: int, **args: Any) -> dict[str, Any]:
        given = {"stream": stream, "device": 0, **args}
        return {
            "ph": "X",
            "cat": "kernel",
            "name": name,
            "pid": 0,
            "tid": stream,
            "ts": start,
            "dur": 1000,
            "args": given,
        }

    events = [
        kernel("gemm", 0, 7),
        kernel("ncclDevKernel_SendRecv(x)", 500, 20, **{"Collective name": "all_to_allv"}),
        kernel("ncclDevKernel_SendRecv(x)", 3000, 21, **{"Collective name": "send"}),
        kernel("ncclDevKernel_SendRecv(x)", 5000, 22),
        kernel("ncclDevKernel_AllReduce(x)", 6000, 23),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(events))
    [lanes], _ = load_all(path)
    found = figures(lanes, windows([lanes])[0])
    assert (found.compute, found.all_to_all, found.exposed, found.span) == (1.0, 1.0, 0.5, 7.0)


def test_a_real_trace_of_the_profiler(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            for step in ORDER:
                with record_function(step):
                    if step not in MOVES:
                        weight = torch.tanh(weight @ weight)
    path = tmp_path / "cpu.json.gz"
    profiler.export_chrome_trace(str(path))
    [lanes], skipped = load_all(path)
    assert skipped == 0 and lanes.source == "torch.profiler, CPU"
    assert {"attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"} <= set(lanes.compute)
    assert [(one.equals, one.times) for one in rounds([lanes])] == [(("published",), 2)]
    found = figures(lanes, windows([lanes])[0])
    assert 0 < found.compute <= found.span and found.all_to_all == 0

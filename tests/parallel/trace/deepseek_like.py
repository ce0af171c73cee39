"""A torch.profiler trace in the form of DeepSeek's published one: four layer pairs of DualPipe on one GPU.

Segment and all-to-all times are theirs. The schedule is simulated with one event per segment; every kernel's true
nature is returned beside the trace, for an oracle that does not read names. All times are whole tens of microseconds.
"""

from __future__ import annotations

from typing import Any

ORDER = "combine(B) attn(F) mlp(B) dispatch(F) dispatch(B) mlp(W) mlp(F) attn(B) attn(W) combine(F)".split()
COMPUTE = {"attn(F)": 440, "mlp(B)": 530, "mlp(W)": 530, "mlp(F)": 460, "attn(B)": 930, "attn(W)": 240}
MOVES = {"combine(B)": 580, "dispatch(F)": 670, "dispatch(B)": 750, "combine(F)": 870}
# What a step waits for: (step, 0 for this layer pair or 1 for the one before).
NEEDS = {
    "combine(B)": ("attn(B)", 1),
    "attn(F)": ("combine(F)", 1),
    "mlp(B)": ("combine(B)", 0),
    "dispatch(F)": ("attn(F)", 0),
    "dispatch(B)": ("mlp(B)", 0),
    "mlp(F)": ("dispatch(F)", 0),
    "attn(B)": ("dispatch(B)", 0),
    "combine(F)": ("mlp(F)", 0),
}
GEMM = "void deep_gemm::fp8_gemm_kernel<4096u, 7168u, 128u, 128u, 128u, 32u, 1u, 5u, 1u, (deep_gemm::GemmType)0>(...)"
FLASH = "void flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4> >(flash::Params)"
ELEMENTWISE = "void at::native::elementwise_kernel<128, 4, dispatch_to_nothing<combine> >(int)"
WEIGHT = "void cutlass::device_kernel<fp32_accumulate>(cutlass::Params)"
NAMES = {
    # combine(B) is a dispatch kernel and dispatch(B) a combine kernel: each is the other's backward.
    "combine(B)": ("notify_dispatch", "dispatch"),
    "dispatch(F)": ("notify_dispatch", "dispatch"),
    "dispatch(B)": ("cached_notify", "combine"),
    "combine(F)": ("cached_notify", "combine"),
}
ORIGIN = 1_740_000_000_000_000  # microseconds since 1970, as older versions of the profiler write


def trace(layers: int = 4, compute_stream: int = 7, move_stream: int = 27) -> tuple[dict[str, Any], list[Any]]:
    """(the trace, [(nature, start, end)]) with nature compute, all-to-all or other; times in 10 us from the start."""
    events: list[dict[str, Any]] = _metadata()
    truth: list[tuple[str, int, int]] = []
    done: dict[tuple[str, int], int] = {}
    free = {"compute": 0, "moves": 0}
    host, number = -3000, 0

    def kernel(name: str, step: str, nature: str, stream: int, start: int, end: int, grid: int) -> None:
        nonlocal number
        number += 1
        truth.append((nature, start, end))
        args = {
            "External id": number,
            "queued": 0,
            "device": 0,
            "context": 1,
            "stream": stream,
            "correlation": number,
            "grid": [grid, 1, 1],
            "block": [384, 1, 1],
            "registers per thread": 168,
            "est. achieved occupancy %": 19,
        }
        events.append(_x("kernel", name, 0, stream, start, end, args))
        flow = {"id": number, "cat": "ac2g", "name": "ac2g"}
        events.append({"ph": "s", **flow, "pid": 4711, "tid": 4711, "ts": ORIGIN + host * 10.0})
        events.append({"ph": "f", "bp": "e", **flow, "pid": 0, "tid": stream, "ts": ORIGIN + start * 10.0})
        launch = {"correlation": number, "External id": number, "cbid": 211}
        events.append(_x("cuda_runtime", "cudaLaunchKernel", 4711, 4711, host, host + 1, launch))

    def cast() -> None:
        """The FP8 cast of the gradient that the next combine(B) sends, on the compute stream."""
        start = free["compute"]
        name, end = "void per_token_cast_to_fp8<1, 128>(bf16*)", start + 10
        kernel(name, "combine(B)", "compute", compute_stream, start, end, 112)
        events.append(_x("gpu_user_annotation", "combine(B)", 0, compute_stream, start, end, {"External id": 1}))
        free["compute"] = end

    cast()
    done["attn(B)", -1] = free["compute"]
    for layer in range(layers):
        for step in ORDER:
            needs = NEEDS.get(step)
            ready = done.get((needs[0], layer - needs[1]), 0) if needs else 0
            begin_host = host
            if step in MOVES:
                start, length = max(ready, free["moves"]), MOVES[step]
                notify, rows = (f"void deep_ep::internode::{name}<false, 8, true>(...)" for name in NAMES[step])
                kernel(notify, step, "all-to-all", move_stream, start, start + length // 4, 20)
                kernel(
                    "void permute_layout(int*)",
                    step,
                    "all-to-all",
                    move_stream,
                    start + length // 4,
                    start + length // 4 + 4,
                    1,
                )
                kernel(rows, step, "all-to-all", move_stream, start + length // 4 + 4, start + length, 20)
                events.append(
                    _x("gpu_user_annotation", step, 0, move_stream, start, start + length, {"External id": 1})
                )
                free["moves"] = done[step, layer] = start + length
                host += 2200 if step == "dispatch(F)" else 30
            else:
                start, length = max(ready, free["compute"]), COMPUTE[step]
                own = 350 if step == "mlp(W)" else length
                names = [ELEMENTWISE, FLASH if step == "attn(F)" else GEMM, WEIGHT if "W" in step else GEMM]
                cuts = [start, start + own // 3, start + own // 2, start + own]
                for name, a, b in zip(names, cuts, cuts[1:]):
                    kernel(name, step, "compute", compute_stream, a, b - 1 if name == ELEMENTWISE else b, 112)
                    host += 5
                if step == "mlp(W)":
                    kernel(WEIGHT, step, "compute", 23, start + length - 280, start + length, 112)
                    events.append(_x("gpu_user_annotation", step, 0, 23, start + length - 280, start + length, {}))
                events.append(
                    _x("gpu_user_annotation", step, 0, compute_stream, start, start + own, {"External id": 1})
                )
                free["compute"] = done[step, layer] = start + length
                if step == "attn(B)":
                    cast()
                    done[step, layer] = free["compute"]
            events.append(_x("user_annotation", step, 4711, 4711, begin_host, host, {"External id": 2}))
            events.append(_x("user_annotation", step, 4711, 4711, begin_host, host - 1, {"External id": 3}))
            host += 3
        events.append(_x("user_annotation", f"layer pair {layer}", 4711, 4711, -3000, host, {}))
    nccl = {"Collective name": "allreduce", "stream": 31, "device": 0, "correlation": 10**6}
    end = max(free.values())
    events.append(
        _x("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)", 0, 31, end - 900, end - 100, nccl)
    )
    truth.append(("other", end - 900, end - 100))
    events.append(
        {
            "ph": "i",
            "name": "Iteration Start: PyTorch Profiler",
            "pid": "Traces",
            "tid": "Trace",
            "ts": ORIGIN,
            "s": "g",
        }
    )
    whole = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H800", "numSms": 132}],
        "cupti_version": 22,
        "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 64},
        "with_flops": 0,
        "traceEvents": events,
        "traceName": "prof_ep64_tp1_varsm_hidden7168_seqlen4096.json",
    }
    return whole, truth


def _metadata() -> list[dict[str, Any]]:
    def meta(kind: str, pid: Any, tid: Any, **args: Any) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "ts": ORIGIN, "pid": pid, "tid": tid, "args": args}

    return [
        meta("process_name", 4711, 0, name="python"),
        meta("process_labels", 4711, 0, labels="CPU"),
        meta("process_sort_index", 4711, 0, sort_index=4711),
        meta("process_name", 0, 0, name="python"),
        meta("process_labels", 0, 0, labels="GPU 0"),
        meta("thread_name", 0, 7, name="stream 7 "),
        meta("thread_name", 0, 27, name="stream 27 "),
        meta("process_sort_index", "Spans", 0, sort_index=536870912),
        _x("Trace", "PyTorch Profiler (0)", "Spans", "PyTorch Profiler", -3000, 13000, {"Op count": 0}),
        _x("overhead", "CUpti_ActivityKind_OVERHEAD", -1, 0, -3000, -2990, {}),
    ]


def _x(category: str, name: str, pid: Any, tid: Any, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": ORIGIN + start * 10.0, "dur": (end - start) * 10.0}
    return {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, **times, "args": args}

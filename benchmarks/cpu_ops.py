"""Microseconds per operation of `kernels` on one CPU thread, beside the plain way of doing the same.

    python benchmarks/cpu_ops.py [--tokens 512] [--width 256] [--repeats 30]

Times are those of the thread, not of the clock on the wall, and still depend on the machine and its other users; ratios
within one run are what to read. Each figure is the fastest of `repeats` runs, ours and plain taken in turn. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import e5m6, gemm, grouped
from kernels.adamw import adamw
from kernels.attention import attention, attention_backward, attention_backward_reference, attention_reference
from kernels.cross_entropy import cross_entropy, cross_entropy_and_gradient, cross_entropy_backward
from kernels.norm import rmsnorm, rmsnorm_backward
from kernels.quantize import (
    dequantize,
    dequantize_reference,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    requantize_columns,
)
from kernels.rope import rotate, rotate_reference
from kernels.swiglu import swiglu, swiglu_backward

Call = Callable[[], object]


def cases(tokens: int, width: int) -> dict[str, tuple[Call, Call | None]]:
    """name -> (operation, plain control or None). M = tokens, K = width, N = 2 width; 8 experts; vocabulary 4096."""
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, 2 * width).bfloat16()
    w, stack = torch.randn(2 * width, width).bfloat16(), torch.randn(8, 2 * width, width).bfloat16()
    counts = torch.bincount(torch.randint(0, 8, (tokens,)), minlength=8).tolist()
    qx, qdy, qw, qstack = quantize_rows(x), quantize_rows(dy), quantize_blocks(w), quantize_blocks(stack)
    x_t, dy_t = quantize_columns(x), quantize_columns(dy)
    gx_t, gdy_t = quantize_columns(x, counts=counts), quantize_columns(dy, counts=counts)
    e5, kept_stack = e5m6.encode(x), qstack.remember()
    gain, weight = torch.rand(width), torch.rand(tokens)
    hidden = dy[:, :width].contiguous()
    heads, length = 8, 64
    q, k = torch.randn(2, tokens // length, heads, length, 48).bfloat16()
    v, dout = torch.randn(2, tokens // length, heads, length, 32).bfloat16()
    out, lse = attention(q, k, v, 0.1)
    cos, sin = torch.rand(2, length, 24)
    logits, labels = torch.randn(tokens, 4096), torch.randint(0, 4096, (tokens,))
    grad = torch.randn(1 << 18)
    master, parameter = torch.randn(1 << 18), torch.nn.Parameter(torch.randn(1 << 18))
    moments = torch.zeros(2, 1 << 18, dtype=torch.bfloat16)
    parameter.grad = grad.clone()
    torch_adamw = torch.optim.AdamW([parameter], lr=1e-3)
    rest = (1e-3, 0.9, 0.95, 1e-8, 0.1, 10)
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    return {
        "quantize_rows": (lambda: quantize_rows(x), None),
        "quantize_rows power of two": (lambda: quantize_rows(x, True), None),
        "quantize_blocks": (lambda: quantize_blocks(w), None),
        "quantize_columns": (lambda: quantize_columns(x), lambda: quantize_rows(x.t().contiguous())),
        "quantize_columns grouped": (lambda: quantize_columns(x, counts=counts), None),
        "requantize_columns": (lambda: requantize_columns(qx), None),
        "dequantize rows": (lambda: dequantize(qx), lambda: dequantize_reference(qx)),
        "dequantize blocks": (lambda: dequantize(qw), lambda: dequantize_reference(qw)),
        "dequantize columns": (lambda: dequantize(x_t), lambda: dequantize_reference(x_t)),
        "e5m6 encode": (lambda: e5m6.encode(x), None),
        "e5m6 decode": (lambda: e5m6.decode(e5), None),
        "fprop fp8": (lambda: gemm.fprop(qx, qw), lambda: gemm.product_reference(qx, qw)),
        "dgrad fp8": (lambda: gemm.dgrad(qdy, qw), lambda: gemm.product_reference(qdy, gemm.transpose_blocks(qw))),
        "wgrad fp8": (lambda: gemm.wgrad(dy_t, x_t), lambda: gemm.product_reference(dy_t, x_t)),
        "fprop bf16": (lambda: gemm.fprop(x, w), lambda: x @ w.t()),
        "dgrad bf16": (lambda: gemm.dgrad(dy, w), lambda: dy @ w),
        "wgrad bf16": (lambda: gemm.wgrad(dy, x), lambda: dy.t() @ x),
        "grouped fprop fp8": (lambda: grouped.fprop(qx, qstack, counts), None),
        "grouped fprop fp8, weights remembered": (lambda: grouped.fprop(qx, kept_stack, counts), None),
        "grouped dgrad fp8": (lambda: grouped.dgrad(qdy, qstack, counts), None),
        "grouped wgrad fp8": (lambda: grouped.wgrad(gdy_t, gx_t, counts), None),
        "grouped fprop bf16": (lambda: grouped.fprop(x, stack, counts), None),
        "grouped wgrad bf16": (lambda: grouped.wgrad(dy, x, counts), None),
        "rmsnorm": (lambda: rmsnorm(x, gain, 1e-6), lambda: F.rms_norm(x, (width,), gain.bfloat16(), 1e-6)),
        "rmsnorm_backward": (lambda: rmsnorm_backward(hidden, x, gain, 1e-6), None),
        "swiglu": (lambda: swiglu(dy, weight), None),
        "swiglu_backward": (lambda: swiglu_backward(hidden, dy, weight), None),
        "rope": (lambda: rotate(q, cos, sin), lambda: rotate_reference(q, cos, sin)),
        "attention": (lambda: attention(q, k, v, 0.1), lambda: attention_reference(q, k, v, 0.1)),
        "attention float32 in": (
            lambda: attention(wide_q, wide_k, wide_v, 0.1),
            lambda: attention_reference(wide_q, wide_k, wide_v, 0.1),
        ),
        "attention_backward": (
            lambda: attention_backward(dout, q, k, v, out, lse, 0.1),
            lambda: attention_backward_reference(dout, q, k, v, out, lse, 0.1),
        ),
        "cross_entropy": (lambda: cross_entropy(logits, labels), lambda: F.cross_entropy(logits, labels)),
        "cross_entropy_backward": (lambda: cross_entropy_backward(logits, labels, 0.1), None),
        "cross_entropy_and_gradient": (
            lambda: cross_entropy_and_gradient(logits, labels, 0.1),
            lambda: (cross_entropy(logits, labels), cross_entropy_backward(logits, labels, 0.1)),
        ),
        "adamw 256K elements": (lambda: adamw(master, moments[0], moments[1], grad, *rest), torch_adamw.step),
    }


def fastest(calls: list[Call | None], repeats: int) -> list[float | None]:
    """Microseconds of each call: the smallest of `repeats`, taken in turn so that all see the same machine."""
    best: list[float | None] = [None if call is None else float("inf") for call in calls]
    for repeat in range(repeats + 3):
        for i, call in enumerate(calls):
            if call is None:
                continue
            start = time.thread_time()
            call()
            spent = (time.thread_time() - start) * 1e6
            if repeat >= 3:
                best[i] = min(best[i] or spent, spent)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds per operation on one CPU thread.")
    parser.add_argument("--tokens", type=int, default=512, help="rows, a multiple of 64")
    parser.add_argument("--width", type=int, default=256, help="features, a multiple of 16")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.tokens < 64 or arguments.tokens % 64 or arguments.width < 16 or arguments.width % 16:
        parser.exit(64, "cpu_ops: --tokens must be a multiple of 64 and --width a multiple of 16\n")
    torch.set_num_threads(1)
    console = Console()
    every = cases(arguments.tokens, arguments.width)
    table = Table("operation", "us", "plain us", "plain / ours", title=f"{arguments.tokens} x {arguments.width}")
    figures: dict[str, dict[str, float | None]] = {}
    for name in track(list(every), description="timing", console=console, transient=True):
        ours, plain = fastest(list(every[name]), arguments.repeats)
        figures[name] = {"us": ours and round(ours, 1), "plain_us": plain and round(plain, 1)}
        ratio = f"{plain / ours:.2f}" if ours and plain else ""
        table.add_row(name, f"{ours:.0f}", f"{plain:.0f}" if plain else "", ratio)
    console.print(table)
    print(json.dumps({"tokens": arguments.tokens, "width": arguments.width, "microseconds": figures}))


if __name__ == "__main__":
    main()

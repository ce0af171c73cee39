"""gloo processes of one machine for the benchmarks: rank 0 reports, the caller reads reports as they come.

    for row in gloo(body, 4, "1f1b", timeout=60):      # body(rank, size, report, "1f1b"), at the top level of a module
        ...

Every process has one thread and a default gloo group found through a file store (no port). None outlives the loop.
"""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed", "torch.distributed.pipelining"]
GRACE_SECONDS = 1.0
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 1 << 30

Report = Callable[[Any], None]


class ProcessFailed(RuntimeError):
    """A rank raised, ended early or fell silent; the message is one line for each rank that said why."""


def gloo(function: Callable[..., None], size: int, *args: Any, timeout: float) -> Iterator[Any]:
    """Run `function(rank, size, report, *args)` on `size` processes; yields what rank 0 reports.

    timeout: seconds of silence after which the run has failed, also of every wait inside the group.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="bireme_benchmark_") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(
                target=_worker, args=(rank, size, folder, timeout, pipes[rank][1], function, args), daemon=True
            )
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            for _, sender in pipes:
                sender.close()
            yield from _reports([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join(5)
            for receiver, _ in pipes:
                receiver.close()


def _reports(receivers: list[Connection], timeout: float) -> Iterator[Any]:
    waiting = dict(enumerate(receivers))
    reasons: list[str] = []
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if not reasons:
                reasons.append(f"ranks {sorted(waiting)} said nothing for {timeout:.0f} s")
            break
        for rank, receiver in list(waiting.items()):
            if receiver not in ready:
                continue
            try:
                kind, what = receiver.recv()
            except EOFError:
                kind, what = "failed", "ended without a word"
            if kind == "row":
                deadline = time.monotonic() + timeout
                yield what
                continue
            del waiting[rank]
            if kind == "failed":
                if not reasons:
                    deadline = time.monotonic() + GRACE_SECONDS  # the others may know better
                reasons.append(f"rank {rank}: {what}")
    if reasons:
        raise ProcessFailed("\n".join(reasons))


def _worker(
    rank: int, size: int, folder: str, timeout: float, sender: Connection, function: Callable[..., None], args: Any
) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan when the benchmark itself is killed
    libc.prctl(PR_SET_TIMERSLACK, 1)  # a sleep may end this many nanoseconds late by choice of the kernel
    # Memory once touched is kept, as a GPU's allocator keeps it: a fresh page costs more than the transfer into it.
    libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
    try:
        torch.set_num_threads(1)
        if os.path.exists("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        function(rank, size, lambda row: sender.send(("row", row)), *args)
        dist.barrier()  # a rank that leaves early would break its peers' last collective
        sender.send(("done", None))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join("".join(traceback.format_exception_only(error)).split())
        sender.send(("failed", f"{text} ({os.path.basename(where.filename)}, line {where.lineno})"))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may abort in an orderly interpreter exit


def start_together(lead: float = 0.005) -> float:
    """The moment, on the monotonic clock all ranks of one machine share, at which every rank returns from this call."""
    ready = torch.tensor(time.perf_counter(), dtype=torch.float64)
    dist.all_reduce(ready, op=dist.ReduceOp.MAX)
    start = ready.item() + lead
    while time.perf_counter() < start:
        time.sleep(1e-4)
    return start


def gathered(value: Any, size: int) -> list[Any]:
    """`value` of every rank, by rank."""
    out: list[Any] = [None] * size
    dist.all_gather_object(out, value)
    return out

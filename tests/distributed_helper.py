"""Run a function on several gloo processes: the one way multi-process tests start.

    from tests.distributed_helper import run_distributed

    def body(rank: int, world_size: int, scale: float) -> torch.Tensor:   # top level of the test module
        ...
        return x

    def test_it():
        results = run_distributed(body, 4, 2.0)                           # results[rank]

Processes are forked from a server that has already imported torch: a call costs tenths of a second, not seconds. Each
has one thread, its own log, and a default gloo group found through a file store (no port). A call ends when all ranks
have returned, when one has failed (the others get two seconds to say why they stopped), or at the hard timeout, shortly
before which every rank writes its Python stacks to its log. No process outlives the call.
"""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.nn.functional",
    "torch.fx.experimental.symbolic_shapes",  # autograd imports it in the first backward of a process
    "numpy",
    "safetensors.torch",
]
GRACE_SECONDS = 2.0
LOG_TAIL = 6000
PR_SET_PDEATHSIG = 1


class DistributedFailure(RuntimeError):
    """A rank raised, died or hung. The message holds the end of every rank's log, the first to fail first."""


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    collective_timeout: float | None = None,
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` gloo processes; returns the results by rank.

    `function` is at the top level of an importable module or test file; arguments and results are pickled.
    collective_timeout: seconds after which a collective or transfer fails, by default `timeout`.
    Raises `DistributedFailure` when a rank fails, or when not all are done after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    source = sys.modules[function.__module__].__file__
    # Of memory where there is any: a test often runs thousands of small writes and never needs the disk.
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="run_distributed_", dir=parent) as folder:
        call = pickle.dumps(args)
        processes = []
        for rank in range(world_size):
            where = (rank, world_size, folder, timeout, collective_timeout or timeout)
            what = (function.__module__, str(source), function.__qualname__, call)
            processes.append(context.Process(target=_worker, args=(where, what), daemon=True))
        first_failed, reason = None, ""
        try:
            for process in processes:
                process.start()
            first_failed, reason = _watch(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                _end(process)
        if reason:
            raise DistributedFailure(_explain(function, folder, world_size, processes, first_failed, reason))
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _watch(processes: list[Any], deadline: float) -> tuple[int | None, str]:
    """Wait for all; returns (first failed rank or None, reason or '')."""
    first: int | None = None
    reason = ""
    waiting = dict(enumerate(processes))
    while waiting:
        ready = connection.wait([p.sentinel for p in waiting.values()], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = sorted(waiting)
            if first is None:
                return silent[0], f"ranks {silent} were not done at the timeout"
            return first, reason
        for rank, process in list(waiting.items()):
            if process.sentinel in ready:
                process.join()
                del waiting[rank]
                if process.exitcode != 0 and first is None:
                    first, reason = rank, f"rank {rank} ended with exit code {process.exitcode}"
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return first, reason


def _end(process: Any) -> None:
    """Kill the rank and whatever it started (it leads its own process group)."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        if process.is_alive():  # killed before it became a group leader
            process.kill()
    process.join(5)


def _explain(
    function: Callable[..., Any], folder: str, world_size: int, processes: list[Any], first: int | None, reason: str
) -> str:
    lines = [f"{function.__qualname__} on {world_size} processes: {reason}"]
    for rank in sorted(range(world_size), key=lambda r: (r != first, r)):
        log = Path(folder, f"rank{rank}.log")
        text = log.read_text(errors="replace") if log.exists() else ""
        lines.append(f"----- rank {rank} (exit code {processes[rank].exitcode}) -----")
        lines.append(text[-LOG_TAIL:].rstrip() or "(no output)")
    return "\n".join(lines)


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"rank{rank}.result")


def _worker(where: tuple[int, int, str, float, float], what: tuple[str, str, str, bytes]) -> None:
    rank, world_size, folder, timeout, collective_timeout = where
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan when the test run itself is killed
    os.setpgid(0, 0)
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.enable(file=sys.stderr)
    faulthandler.dump_traceback_later(max(0.5, timeout - 1.0), file=sys.stderr)
    code = 1
    try:
        torch.set_num_threads(1)
        if os.path.exists("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        function, args = _load(*what)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout),
        )
        result = function(rank, world_size, *args)
        dist.barrier()  # a rank that leaves early would break its peers' last collective
        _result(folder, rank).write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may abort in an orderly interpreter exit


def _load(module_name: str, source: str, qualname: str, call: bytes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and its arguments, whatever way pytest imported the module."""
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    function: Any = module
    for part in qualname.split("."):
        function = getattr(function, part)
    return function, pickle.loads(call)

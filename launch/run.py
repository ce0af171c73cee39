"""Start the ranks of one run on this machine with torchrun's agent, forward signals, and tell how the run ended.

The agent runs in this process, because torchrun as a command answers every failure with code 1 and a page of its own.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from launch.agent import Agent
from train.config import RunConfig
from train.errors import PEER_LOST
from train.history import METRICS, exact, read_lines
from train.loop import run_path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The agent insists on handling some signal, and its handler would break off a shutdown at a second one.
UNUSED_SIGNAL = "SIGUSR2"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. objective: the last training loss (None: no step was done); step: of that loss."""

    name: str
    exit_code: int
    objective: float | None
    step: int


def run(config: RunConfig, arguments: list[str], shutdown_timeout: int) -> Outcome:
    """Start `parallel.world_size` ranks with `arguments` and wait for all of them.

    shutdown_timeout: seconds that ranks have to save a checkpoint after a stop signal, before they are killed; a failed
    rank leaves the others `launch.agent.FAILURE_SECONDS`. The exit code is the ranks' own (docs/exit-codes.md), or 128
    + the signal when they were stopped before a checkpoint existed.
    """
    world, directory = config.parallel.world_size, run_path(config)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    before = read_status(directory).get("time")
    stop_once = _StopOnce()
    previous = {number: signal.signal(number, stop_once) for number in FORWARDED}
    logging.disable(logging.CRITICAL)  # the agent's account of a failure; the ranks have given theirs
    code = 0
    try:
        code = _run_ranks(world, arguments, shutdown_timeout)
    except SignalException as stop:
        status = read_status(directory)
        saved = status.get("time") != before and "exit_code" in status
        code = int(status["exit_code"]) if saved else 128 + stop.sigval
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in previous.items():
            signal.signal(number, handler)
    step, objective = last_loss(directory) if read_status(directory).get("time") != before else (0, None)
    return Outcome(config.name, code, objective, step)


def _run_ranks(world: int, arguments: list[str], shutdown_timeout: int) -> int:
    """Exit code of the ranks, once none is left. SignalException after a stop signal."""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = UNUSED_SIGNAL
    with tempfile.TemporaryDirectory(prefix="bireme-launch-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        rendezvous = get_rendezvous_handler(
            RendezvousParameters(
                config.rdzv_backend,
                config.rdzv_endpoint,
                config.run_id,
                config.min_nodes,
                config.max_nodes,
                local_addr="localhost",
                **config.rdzv_configs,
            )
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=world,
            rdzv_handler=rendezvous,
            entrypoint=sys.executable,
            args=("-u", "-m", "train", *arguments),
            max_restarts=0,
            local_addr="localhost",
            numa_options=config.numa_options,
        )
        agent = Agent(spec, config.logs_specs, shutdown_timeout=shutdown_timeout)
        try:
            result = agent.run()
        finally:
            rendezvous.shutdown()
    return exit_code(result.failures, agent.overdue) if result.is_failed() else 0


class _StopOnce:
    """Signal handler: the first signal stops the ranks; more of them change nothing."""

    def __init__(self) -> None:
        self.stopping = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            return
        self.stopping = True
        name = signal.Signals(number).name
        print(f"bireme: {name}: stopping after this step, with a checkpoint", file=sys.stderr, flush=True)
        raise SignalException(f"{name} received", signal.Signals(number))


def exit_code(failures: dict[int, ProcessFailure], overdue: Collection[int] = ()) -> int:
    """The code of the rank that knows why the run failed: losing a peer is what happens to the others. Names that rank,
    and those that a signal killed, since they could not speak; overdue: the ranks that the agent itself killed."""
    codes = {rank: failure.exitcode for rank, failure in sorted(failures.items())}
    for rank, code in codes.items():
        if code < 0 and rank not in overdue:
            name = signal.Signals(-code).name
            print(f"bireme: rank {rank} (process {failures[rank].pid}) was killed by {name}", file=sys.stderr)
    causes = {rank: code for rank, code in codes.items() if code > 0 and code != PEER_LOST}
    for rank, code in list(causes.items())[:1]:
        if PEER_LOST in codes.values():
            print(f"bireme: rank {rank} ended with exit code {code}, and the others lost it", file=sys.stderr)
        return code
    return PEER_LOST


def read_status(directory: Path) -> dict[str, Any]:
    """`status.json` of a run directory; empty when there is none."""
    path = directory / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def last_loss(directory: Path) -> tuple[int, float | None]:
    """(step, train/loss) of the last step recorded in a run directory."""
    step, loss = 0, None
    for line in read_lines(directory / METRICS):
        if "train/loss" in line:
            step, loss = int(line["step"]), exact(line, "train/loss")
    return step, loss

"""Tiny training runs for tests: a corpus, the arguments of a run, and ranks started without the cost of imports.

A nursery process imports the training loop once and forks the ranks of every run from itself, so that a run on four
processes starts in tenths of a second. What the ranks do is `train.__main__.main`, as under torchrun.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.data.synthetic import VOCABULARY, token_corpus
from train.history import read_lines

ROOT = Path(__file__).resolve().parent.parent.parent
RANKS = 4
LAYOUT = ["parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=dualpipe", "parallel.timeout_seconds=60"]
LEARNING_RATE = "[{until:300,shape:linear,start:0.0,end:0.01},{until:9000,start:0.01}]"


def make_corpus(directory: Path) -> Path:
    directory.mkdir(parents=True)
    token_corpus(directory, {"en": 120, "zh": 80})
    return directory


def stage(name: str, length: int, tokens: int, sequences: str) -> str:
    """A stage in Hydra's grammar, with micro-batches of one sequence."""
    return (
        f"{{name:{name},length:{length},tokens:{tokens},sequences:{sequences},learning_rate:{LEARNING_RATE},"
        "mtp_weight:[{until:9000,value:0.3}],bias_update:[{until:9000,value:0.01}]}"
    )


def arguments(root: Path, corpus: Path, name: str, stages: list[str], *more: str) -> list[str]:
    """A run of the smallest model in root/name."""
    return [
        "model=tiny",
        f"model.vocab_size={VOCABULARY}",
        f"root={root}",
        f"name={name}",
        f"data.directory={corpus}",
        "logging.wandb=disabled",
        f"stages=[{','.join(stages)}]",
        *more,
    ]


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, main loss as hex float) of the whole history."""
    return [(line["step"], line["train/loss_hex"]) for line in read_lines(run / "metrics.jsonl")]


class Started:
    """Ranks that were started: their process ids, and what they wrote."""

    def __init__(self, pipe: subprocess.Popen[str], pids: list[int], logs: Path) -> None:
        self.pipe, self.pids, self.logs, self.began = pipe, pids, logs, time.time()

    def wait(self) -> list[int]:
        """Exit codes by rank, negative for a signal."""
        assert self.pipe.stdout is not None
        return json.loads(self.pipe.stdout.readline())

    def error(self, rank: int) -> str:
        return (self.logs / f"rank{rank}.err").read_text()

    def when(
        self,
        run: Path,
        reached: Callable[[list[dict[str, Any]]], bool],
        seconds: float = 120,
        file: str = "metrics.jsonl",
    ) -> None:
        """Return as soon as the lines of the run's `file`, if these ranks have added to them, satisfy `reached`."""
        end = time.monotonic() + seconds
        while True:
            lines = list(read_lines(run / file))
            if lines and lines[-1]["time"] > self.began and reached(lines):
                return
            assert time.monotonic() < end, f"not reached; rank 0 said: {self.error(0)}"
            time.sleep(0.01)


class Nursery:
    """Starts ranks."""

    def __init__(self, pipe: subprocess.Popen[str]) -> None:
        self.pipe = pipe

    def start(self, run_arguments: list[str], logs: Path, ranks: int = RANKS, first: str = "") -> Started:
        """first: `module:function`, called with the rank in each of them before anything else."""
        logs.mkdir(parents=True)
        assert self.pipe.stdin is not None and self.pipe.stdout is not None
        request = {"arguments": run_arguments, "logs": str(logs), "ranks": ranks, "port": _free_port(), "first": first}
        self.pipe.stdin.write(json.dumps(request) + "\n")
        self.pipe.stdin.flush()
        return Started(self.pipe, json.loads(self.pipe.stdout.readline()), logs)


@contextmanager
def nursery() -> Iterator[Nursery]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.train.ranks"]
    pipe = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield Nursery(pipe)
    finally:
        pipe.kill()  # the ranks die with it
        pipe.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve() -> None:
    # autograd imports this second-long package at its first backward.
    import torch.fx.experimental.symbolic_shapes  # noqa: F401

    import train.__main__
    import train.console
    import train.loop  # noqa: F401  (what a rank would import)

    for line in sys.stdin:
        request = json.loads(line)
        pids = [_fork(request, rank) for rank in range(request["ranks"])]
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _fork(request: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{request['logs']}/rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(request["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"])
        )
        if request["first"]:
            module, _, function = request["first"].partition(":")
            getattr(importlib.import_module(module), function)(rank)
        import train.__main__

        code = train.__main__.main(request["arguments"])
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()

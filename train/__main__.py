"""`torchrun --nproc-per-node N -m train experiment=demo [key=value ...]`: one rank of a training run.

Hydra composes the configuration in every rank through its Compose API; no rank makes directories of its own. A single
process needs no torchrun. Exit codes: docs/exit-codes.md.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from data.errors import DataError
from train.agree import gather_json, together
from train.checkpoint_format import CheckpointError, CheckpointWriteError
from train.compose import compose_run, config_yaml
from train.config import RunConfig
from train.errors import PEER_LOST, PREEMPTED, ConfigError, RunError
from train.lost_peer import lost_peer

if TYPE_CHECKING:
    from train.loop import Trainer
    from train.rundir import RunDirectory

# Each asks for a checkpoint and a stop. torchrun forwards the first three to every rank; a scheduler may send SIGUSR1.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
INTERNAL = 1


def main(arguments: list[str]) -> int:
    """Run this rank; returns its exit code. Rank 0 speaks for all."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = compose_run(arguments)
        if config.parallel.world_size != world:
            p = config.parallel
            raise ConfigError(
                f"world size: found {world} processes, parallel.pipeline {p.pipeline} x parallel.expert {p.expert} x "
                f"parallel.data {p.data} needs {p.world_size}"
            )
    except RunError as error:
        return _say(rank, error, error.exit_code)
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    run = _Rank(config, rank)
    try:
        run.connect(alone=world == 1 and "MASTER_ADDR" not in os.environ)
        code = run.train()
        dist.destroy_process_group()
        return code
    except (DataError, CheckpointError) as error:
        # Of this rank alone: the others are in the middle of a collective and find out by losing this one.
        run.abandon(error.exit_code, str(error))
    except Exception as error:
        if (line := lost_peer(error)) is not None:
            run.abandon(PEER_LOST, line)
        traceback.print_exc()
        run.abandon(INTERNAL, _cause(error))


class _Rank:
    """This rank from its process group to its exit code."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.trainer: Trainer | None = None
        self.directory: RunDirectory | None = None

    def connect(self, alone: bool) -> None:
        timeout = timedelta(seconds=self.config.parallel.timeout_seconds)
        if alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)

    def train(self) -> int:
        """Train. Errors that all ranks raise together become one line of rank 0 and an exit code; others pass."""
        # Imported here: a wrong configuration is refused before wandb and the data are touched.
        from train.loop import Preempted, Trainer, run_path
        from train.rundir import RunDirectory

        failure: RunError | None = None
        try:
            self.directory = RunDirectory(run_path(self.config), self.rank)
        except RunError as error:
            failure = error
        refused = gather_json(failure.exit_code if failure else 0)[0]
        if refused:
            return _say(self.rank, failure, refused)
        directory = self.directory
        assert directory is not None
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: directory.ask_to_stop())
        code = 0
        try:
            self.trainer = Trainer(self.config, self.rank, directory)
            together(lambda: directory.write("config.yaml", config_yaml(self.config)))
            self.trainer.run()
        except Preempted as stop:
            code = _say(self.rank, stop, PREEMPTED)
        except (RunError, CheckpointWriteError) as error:
            code = _say(self.rank, error, error.exit_code)
            self._note_failure(code, str(error))
        if self.trainer is not None:
            self.trainer.close(code)
        directory.close()
        return code

    def _note_failure(self, code: int, line: str) -> None:
        if self.rank == 0 and self.directory is not None and self.trainer is not None:
            self.trainer.failed(code, line)

    def abandon(self, code: int, line: str) -> NoReturn:
        """Say why and leave at once: an orderly end would wait for peers that may never answer."""
        step = f", step {self.trainer.state.step + 1}" if self.trainer is not None else ""
        print(f"bireme: rank {self.rank}{step}: {_one_line(line)}", file=sys.stderr, flush=True)
        try:
            self._note_failure(code, line)
        finally:
            sys.stdout.flush()
            os._exit(code)


def _cause(error: Exception) -> str:
    """An error and the notes taken on its way up, such as the action of the pipeline that it broke off."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} ({notes})" if notes else text


def _one_line(text: str) -> str:
    first, *rest = [line.strip() for line in text.splitlines()] or [""]
    return " ".join([first, "; ".join(rest)]) if rest else first


def _say(rank: int, error: BaseException | None, code: int) -> int:
    if rank == 0:
        print(f"bireme: {_one_line(str(error))}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

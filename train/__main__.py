"""`torchrun --nproc-per-node N -m train experiment=demo [key=value ...]`: one rank of a training run.

Hydra composes the configuration in every rank through its Compose API; no rank makes directories of its own. Exit
codes: docs/exit-codes.md.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from data.errors import DataError
from parallel.pipeline.executor import PeerLost
from train.agree import gather_json
from train.checkpoint_format import CheckpointError, CheckpointWriteError
from train.compose import compose_run, config_yaml
from train.config import RunConfig
from train.errors import PEER_LOST, PREEMPTED, BusyError, ConfigError, RunError


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
    dist.init_process_group("gloo", timeout=timedelta(seconds=config.parallel.timeout_seconds))
    try:
        return _train(config, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(config: RunConfig, rank: int) -> int:
    # Imported here: a wrong configuration is refused before torch, wandb and the data are touched.
    from train.loop import Preempted, Trainer, run_path
    from train.rundir import RunDirectory

    trainer: Trainer | None = None
    directory: RunDirectory | None = None
    code = 0
    try:
        failure: RunError | None = None
        try:
            directory = RunDirectory(run_path(config), rank)
        except RunError as error:
            failure = error
        if gather_json(failure is not None)[0]:
            return _say(rank, failure, BusyError.exit_code)
        assert directory is not None
        signal.signal(signal.SIGTERM, lambda *_: directory.ask_to_stop())
        if rank == 0:
            (directory.path / "config.yaml").write_text(config_yaml(config))
        trainer = Trainer(config, rank, directory)
        trainer.run()
    except Preempted as stop:
        code = _say(rank, stop, PREEMPTED)
    except (RunError, DataError, CheckpointError, CheckpointWriteError) as error:
        code = _say(rank, error, error.exit_code)
    except PeerLost as error:
        print(f"bireme: rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    if trainer is not None:
        trainer.close(code)
    if directory is not None:
        directory.close()
    return code


def _say(rank: int, error: BaseException | None, code: int) -> int:
    if rank == 0:
        print(f"bireme: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m launch`: sweeps, exit codes of ranks, and signals, on real processes through torchrun's agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from launch.__main__ import main, prepare
from launch.run import exit_code, last_loss
from launch.sweep import expand, run_name
from tests.train.ranks import LAYOUT, ROOT, arguments, losses, make_corpus, stage
from train.errors import ConfigError
from train.history import read_lines

TWO = ["parallel.pipeline=2", "model.num_layers=2", "parallel.timeout_seconds=60"]
LONG = [stage("only", 32, 40000, "[{until:90000,value:4}]")]


def test_expand() -> None:
    assert expand(["a=1", "b=x,y", "c='u,v'", "d=[1,2]", "e=range(1,3)"]) == [
        ["a=1", "c='u,v'", "d=[1,2]", "b=x", "e=1"],
        ["a=1", "c='u,v'", "d=[1,2]", "b=x", "e=2"],
        ["a=1", "c='u,v'", "d=[1,2]", "b=y", "e=1"],
        ["a=1", "c='u,v'", "d=[1,2]", "b=y", "e=2"],
    ]
    assert expand(["a=1"]) == [["a=1"]]
    for wrong in ("a=interval(0,1)", "a"):
        with pytest.raises(ConfigError, match="a"):
            expand([wrong])


def test_runs_of_a_sweep_have_directories_of_their_own() -> None:
    runs = prepare(["experiment=demo", "seed=1,2", "optimizer.clip=0.5,1"], multirun=True)
    names = ["demo/seed=1,optimizer.clip=0.5", "demo/seed=1,optimizer.clip=1"]
    assert [config.name for config, _ in runs] == [*names, *(name.replace("seed=1", "seed=2") for name in names)]
    assert [(config.seed, config.optimizer.clip) for config, _ in runs] == [(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)]
    assert prepare(["experiment=demo", "seed=1,2", "optimizer.clip=0.5,1"], multirun=True) == runs
    named = prepare(["experiment=demo", "name=one,two"], multirun=True)
    assert [config.name for config, _ in named] == ["one", "two"]
    assert run_name("demo", ["data.directory=/a/b c"]) == "demo/data.directory=_a_b_c"


def test_a_sweep_with_one_wrong_run_starts_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "experiment=demo", f"root={tmp_path}", "model.num_layers=4,-1"]) == 64
    said = capfd.readouterr()
    assert said.err == "bireme: model.num_layers: found -1, must be above 0\n" and said.out == ""
    assert main(["experiment=demo", "seed=1,2"]) == 64
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("codes", "expected"),
    [({0: 64, 1: 64}, 64), ({0: 69, 1: 69, 2: 65}, 65), ({0: 69, 2: -9}, 69), ({1: -9}, 69), ({0: 69, 1: 1}, 1)],
)
def test_exit_code_of_the_rank_that_knows(codes: dict[int, int], expected: int) -> None:
    assert exit_code({rank: ProcessFailure(rank, 1000, code, "") for rank, code in codes.items()}) == expected


def launch(*given: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "launch", *given]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_step(run: Path, process: subprocess.Popen[str], steps: int) -> None:
    began, end = time.time(), time.monotonic() + 200
    while not any(line["step"] >= steps and line["time"] > began for line in read_lines(run / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def rank_process(launcher: int, rank: int) -> int:
    """Process id of a rank of a launcher."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:  # it ended while we looked
            continue
    raise AssertionError(f"no rank {rank} among the children of {launcher}")


def test_killed_rank_and_stop_signal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = arguments(tmp_path, make_corpus(tmp_path / "corpus"), "run", LONG, *TWO, "checkpoint.every=2")

    process = launch(*given)
    wait_for_step(run, process, 2)
    killed = rank_process(process.pid, 1)
    os.kill(killed, signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 69
    assert "Traceback" not in error
    assert f"bireme: rank 1 (process {killed}) was killed by SIGKILL" in error
    assert all(line.startswith("bireme: rank ") for line in error.splitlines()) and len(error.splitlines()) == 2
    step, loss = last_loss(run)
    result = {"name": "run", "exit_code": 69, "objective": loss, "step": step}
    assert json.loads(out.splitlines()[-1]) == {"runs": [result], "exit_code": 69}

    process = launch(*given)
    wait_for_step(run, process, 3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75
    first, second = error.splitlines()
    assert first == "bireme: SIGTERM: stopping after this step, with a checkpoint"
    status = json.loads((run / "status.json").read_text())
    assert second == f"bireme: stopped on request after step {status['step']}; a checkpoint is saved"
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    assert json.loads(out.splitlines()[-1])["exit_code"] == 75


@pytest.mark.slow
def test_torchrun_and_launcher_agree_and_a_sweep_gives_objectives(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    stages = [stage("only", 32, 500, "[{until:9000,value:4}]")]
    given = arguments(tmp_path, corpus, "plain", stages, *LAYOUT, "model.num_layers=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "train"]
    subprocess.run([*torchrun, *given], cwd=ROOT, env=environment, check=True, timeout=300)

    process = launch("-m", *arguments(tmp_path, corpus, "swept", stages, *LAYOUT, "model.num_layers=2", "seed=1234,5"))
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    runs = json.loads(out.splitlines()[-1])["runs"]
    assert [entry["name"] for entry in runs] == ["swept/seed=1234", "swept/seed=5"]
    assert losses(tmp_path / "swept" / "seed=1234") == losses(tmp_path / "plain")
    assert [entry["objective"].hex() for entry in runs] == [losses(tmp_path / e["name"])[-1][1] for e in runs]
    assert runs[0]["objective"] != runs[1]["objective"]

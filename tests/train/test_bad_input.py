"""What a user can get wrong: one line on standard error, an exit code of its kind, no traceback, nothing half-written.

Sources that are missing, empty or not UTF-8 are the data build's (tests/data/test_build.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel.schedule.registry import build
from tests.train.ranks import ROOT, arguments, make_corpus, stage
from train.__main__ import STOP_SIGNALS, main
from train.compose import compose_run
from train.errors import BusyError
from train.rundir import RunDirectory

FOUR = stage("only", 32, 100, "[{until:9000,value:4}]")
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As without torchrun, and with the signals given back: `main` runs in this process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run `main`, which must refuse with `code` in one line; returns the line."""

    def run(code: int, *given: str, left: tuple[str, ...] = ()) -> str:
        capfd.readouterr()
        before = tree(tmp_path)
        assert main(list(given)) == code
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("bireme: ")
        assert tree(tmp_path) - before == {tmp_path / name for name in left}
        return line

    return run


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["seeed=3"], ["'seeed'", "did you mean 'seed'"]),
        (["+seeed=3"], ["'seeed'", "did you mean 'seed'"]),
        (["model.hiden_size=64"], ["'model.hiden_size'", "did you mean 'model.hidden_size'"]),
        (["+zzz=1"], ["'zzz'", "allowed here", "parallel", "stages"]),
        (["+model.zzz=1"], ["'model.zzz'", "allowed here", "kv_lora_rank"]),
        (["modle.hidden_size=64"], ["'modle.hidden_size'", "did you mean 'model.hidden_size'"]),
        (["model.seed=1"], ["'model.seed'", "did you mean 'seed'"]),
        (["experiment=demo", "+stages.0.tokns=1"], ["'stages.*.tokns'", "did you mean 'stages.*.tokens'"]),
        (["experimnt=demo"], ["'experimnt'", "did you mean 'experiment'"]),
        (["experiment=dmo"], ["experiment=dmo", "did you mean 'demo'", "allowed: demo"]),
        (["model=gpt"], ["model=gpt", "allowed: demo, demo_llm, demo_v2"]),
        (["seed=many"], ["seed", "'many'", "Integer"]),
        (["seed"], ["'seed'"]),
        ([], ["stages: none given"]),
        (["experiment=demo", "parallel.schedule=dualpip"], ["schedule=dualpip", "allowed: dualpipe"]),
        (["experiment=demo", "parallel.expert=3"], ["parallel.expert: found 3", "divisors of 8"]),
        (
            ["experiment=demo", "parallel.layout=Ett|tmL"],
            ["parallel.layout", "found 3 transformer layers", "allowed 4"],
        ),
        (["experiment=demo", "parallel.pipeline=0"], ["parallel.pipeline: found 0", "1 or more"]),
        (["experiment=demo", "model.experts_per_token=9"], ["model.experts_per_token: found 9", "at most 4"]),
        (["experiment=demo", "model.kv_lora_rank=40"], ["model.kv_lora_rank: found 40", "multiples of 16"]),
        (["experiment=demo", "precision.compute=float16"], ["precision.compute: found 'float16'", "bfloat16"]),
        (["experiment=demo", "optimizer.moment_dtype=int8"], ["optimizer.moment_dtype: found 'int8'", "bfloat16"]),
        (["experiment=demo", "optimizer.beta2=1"], ["optimizer.beta2: found 1.0"]),
        (["experiment=demo", "stages.0.length=0"], ["stages.0.length: found 0", "1 or more"]),
        (["experiment=demo", "stages.0.learning_rate.0.end=-1"], ["stages.0.learning_rate: found -1", "0 or more"]),
        (["experiment=demo", "resume=maybe"], ["resume: found 'maybe'", "auto, never"]),
        (["experiment=demo", "name=../out"], ["name: found '../out'"]),
        # The demo's layout is for four processes; this is one.
        (["experiment=demo"], ["found 1 processes", "parallel.pipeline 2", "parallel.expert 2", "needs 4"]),
    ],
)
def test_configuration(refused: Refused, given: list[str], told: list[str]) -> None:
    line = refused(64, *given)
    assert all(part in line for part in told), line


@pytest.mark.parametrize("sequences", [0, 2, 6, 10])
def test_micro_batches_that_dualpipe_cannot_row(refused: Refused, tmp_path: Path, sequences: int) -> None:
    """Of two replicas with micro-batches of one sequence: 0 and odd numbers of micro-batches per pipeline."""
    layout = ("parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=dualpipe")
    stages = [stage("only", 32, 100, f"[{{until:9,value:{sequences}}}]")]
    line = refused(64, *arguments(tmp_path, tmp_path, "run", stages, *layout))
    assert f"stages.0.sequences: {sequences} gives {sequences // 2} micro-batches per pipeline" in line
    assert "even number of at least 2" in line


def test_every_even_number_of_micro_batches_is_allowed(tmp_path: Path) -> None:
    layout = ("parallel.pipeline=4", "parallel.schedule=dualpipe")
    for micro_batches in (2, 4, 6, 8, 10):
        stages = [stage("only", 32, 100, f"[{{until:9,value:{micro_batches}}}]")]
        compose_run(arguments(tmp_path, tmp_path, "run", stages, *layout))
        assert build("dualpipe", 4, micro_batches).micro_batches == micro_batches


def test_data(refused: Refused, tmp_path: Path, corpus: Path) -> None:
    made = ("run", "run/lock")
    line = refused(65, *arguments(tmp_path, tmp_path / "nowhere", "run", [FOUR]), left=made)
    assert f"{tmp_path / 'nowhere' / 'manifest.json'}" in line
    line = refused(64, *arguments(tmp_path, corpus, "run", [FOUR], "model.vocab_size=256"))
    assert "model.vocab_size: found 256, the data's tokenizer needs at least 512" in line


def test_run_directory_that_cannot_be_made(refused: Refused, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused(73, *arguments(tmp_path / "file", corpus, "run", [FOUR]))
    assert f"run directory {tmp_path / 'file' / 'run'}" in line and "Not a directory" in line


def test_second_job_and_checkpoint_of_another_model(refused: Refused, tmp_path: Path, corpus: Path) -> None:
    given = arguments(tmp_path, corpus, "run", [FOUR])
    assert main(given) == 0
    files = {path: path.read_bytes() for path in tree(tmp_path / "run") if path.is_file()}

    line = refused(66, *given, "model.hidden_size=48", "model.num_layers=4")
    for told in (
        "model.hidden_size is 32 in the checkpoint and 48 here",
        "model.num_layers is 5 in the checkpoint and 4 here",
        "tensor embed: found shape (512, 32), expected (512, 48)",
        "tensor layers.0.attention.o: found shape (32, 16), expected (48, 16)",
        "tensor layers.3.experts.7.down: found shape (32, 16), expected (48, 16)",
        "tensor layers.4.experts.0.gate_up: found shape (32, 32), expected nothing of this name",
        "tensor mtp.0.proj: found shape (32, 64), expected (48, 96)",
        "extra tensor layers.4.router.bias: found shape (8,), expected nothing of this name",
    ):
        assert told in line, told

    holder = RunDirectory(tmp_path / "run", rank=0)
    line = refused(76, *given)
    assert f"run directory {tmp_path / 'run'}" in line and f'"pid": {os.getpid()}' in line and '"host"' in line
    holder.close()

    changed = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert changed <= {"lock"}


def test_stop_and_save_requests(tmp_path: Path) -> None:
    """Files ask rank 0, signals any rank; a request is met once; what an earlier job left is not a request."""
    for left in ("STOP", "status.json.tmp-12", "metrics.replaced-1.jsonl.tmp-12", "report.html.tmp-12"):
        (tmp_path / left).touch()
    first, second = RunDirectory(tmp_path, 0), RunDirectory(tmp_path, 1)
    assert first.requests() == (False, False)
    assert {path.name for path in tree(tmp_path)} == {"lock", "report.html.tmp-12"}  # the page is another's work
    (tmp_path / "SAVE").touch()
    assert second.requests() == (False, False)
    assert first.requests() == (False, True)
    (tmp_path / "STOP").touch()
    assert first.requests() == (True, False) and first.requests() == (False, False)
    second.ask_to_stop()
    assert second.requests() == (True, False) and first.requests() == (False, False)
    assert not (tmp_path / "STOP").exists()
    with pytest.raises(BusyError):
        RunDirectory(tmp_path, 0)
    first.close()


def test_the_command_itself(tmp_path: Path) -> None:
    """From the outside, through the launcher: refused before any process is started."""
    command = [sys.executable, "-m", "launch", "experiment=demo", f"root={tmp_path}", "model.num_layer=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 64
    assert done.stdout == ""
    assert done.stderr == "bireme: unknown key 'model.num_layer'; did you mean 'model.num_layers'?\n"
    assert not tree(tmp_path)

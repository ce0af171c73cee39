"""One process: what is on disk, what a crash or a damaged file does, and what is refused."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.optimizer.contract import RowRange
from train import checkpoint_format
from train.checkpoint import Checkpoint, find_latest, save_checkpoint
from train.checkpoint_directory import list_steps
from train.checkpoint_format import MANIFEST, CheckpointError, CheckpointWriteError
from train.ckpt import main as ckpt

SHAPES = {"embed.weight": (200, 3), "layers.0.conv.weight": (5, 2, 4), "norm.weight": (7,)}
CUTS = {"embed.weight": [0, 128, 200], "layers.0.conv.weight": [0, 5], "norm.weight": [0, 7]}
EXTRA = {"layers.1.router.bias": torch.arange(8.0)}


def whole(name: str, step: int) -> torch.Tensor:
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(step * 100 + len(name))
    return torch.randn(shape, generator=generator).reshape(shape[0], -1)


def shards(step: int):
    for name, cuts in CUTS.items():
        for first, last in itertools.pairwise(cuts):
            rows = whole(name, step)[first:last]
            yield RowRange(name, 0, first, last), {"master": rows, "exp_avg": rows.bfloat16()}


def save(directory: Path, step: int, keep: int = 0, **state) -> Path:
    return save_checkpoint(directory, step, shards(step), SHAPES, EXTRA, {"tokens": step * 10, **state}, keep)


def everything(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_any_row_range_comes_back_by_name(tmp_path):
    path = save(tmp_path, 100, window=[0.1, 1e300])
    assert path.name == "step-00000100"
    found = find_latest(tmp_path)
    checkpoint = found.checkpoint
    assert checkpoint is not None and checkpoint.step == 100 and found.refused == []
    assert checkpoint.state == {"tokens": 1000, "window": [0.1, 1e300]}
    for name, shape in SHAPES.items():
        for first, last in ((0, shape[0]), (1, 3), (shape[0] - 1, shape[0])):
            assert torch.equal(checkpoint.read(name, "master", first, last), whole(name, 100)[first:last])
    across = checkpoint.read("embed.weight", "exp_avg", 100, 150)
    assert across.dtype == torch.bfloat16 and torch.equal(across, whole("embed.weight", 100)[100:150].bfloat16())
    assert torch.equal(checkpoint.extra("layers.1.router.bias"), EXTRA["layers.1.router.bias"])
    with pytest.raises(CheckpointError, match="no ema of a tensor norm"):
        checkpoint.read("norm.weight", "ema", 0, 1)
    with pytest.raises(CheckpointError, match="asked for 3 to 9"):
        checkpoint.read("norm.weight", "master", 3, 9)


def test_files_are_what_the_safetensors_library_reads(tmp_path):
    loaded = load_file(save(tmp_path, 1) / "rank-00000.safetensors")
    assert torch.equal(loaded["embed.weight|128|200|master"], whole("embed.weight", 1)[128:])
    assert torch.equal(loaded["layers.1.router.bias|extra"], EXTRA["layers.1.router.bias"])
    assert loaded["norm.weight|0|7|exp_avg"].dtype == torch.bfloat16


# ---- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of the weights": ("rank-00000.safetensors", flip, "sha256"),
    "half a file": (
        "rank-00000.safetensors",
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "bytes",
    ),
    "an empty file": ("rank-00000.safetensors", lambda p: p.write_bytes(b""), "has 0 bytes"),
    "a missing file": ("rank-00000.safetensors", lambda p: p.unlink(), "is missing"),
    "a bit of the state": ("state.json", flip, "sha256"),
    "no manifest": (MANIFEST, lambda p: p.unlink(), "is missing"),
    "a changed manifest": (MANIFEST, lambda p: p.write_text(p.read_text().replace("128", "127", 1)), "own digest"),
    "half a manifest": (MANIFEST, lambda p: p.write_text(p.read_text()[:100]), "not JSON"),
    "a link": ("state.json", lambda p: (p.rename(p.parent / "x"), p.symlink_to("x")), "not a plain file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, capsys, what):
    file, damage, reason = DAMAGE[what]
    save(tmp_path, 4)
    damage(save(tmp_path, 8) / file)
    found = find_latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 4
    (line,) = found.refused
    assert file in line and reason in line and "step-00000008" in line
    with pytest.raises(CheckpointError, match="no good checkpoint") as strict:
        find_latest(tmp_path, strict=True)
    assert strict.value.exit_code == 66
    assert ckpt(["verify", str(tmp_path)]) == 66
    assert json.loads(capsys.readouterr().out)["damaged"] == [str(tmp_path / "step-00000008")]


def test_damage_everywhere_is_an_error_and_never_a_fresh_start(tmp_path):
    assert find_latest(tmp_path).checkpoint is None
    flip(save(tmp_path, 4) / "state.json")
    with pytest.raises(CheckpointError, match=r"step-00000004.*state\.json"):
        find_latest(tmp_path)


def test_the_newest_of_several_directories_is_taken(tmp_path):
    rolling, stage = tmp_path / "checkpoints", tmp_path / "stages/long"
    save(rolling, 4)
    save(stage, 8, stage="long")
    flip(save(rolling, 12) / "rank-00000.safetensors")
    save(rolling, 8, stage="rolling")
    found = find_latest([rolling, stage])
    assert found.checkpoint is not None and found.checkpoint.state["stage"] == "long" and len(found.refused) == 1


# ---- saves that fail


def die_at(kill_at: int) -> None:
    """SIGKILL this process at its n-th fsync or rename."""
    calls = 0

    def counted(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    for name in ("fsync", "rename"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_kill_at_any_system_call_leaves_the_last_good_one(tmp_path):
    """The process dies at its n-th fsync or rename, for every n; the same step is saved again, as after a restart."""
    save(tmp_path, 4)
    save(tmp_path, 8)
    good = everything(tmp_path)
    died = 0
    for kill_at in range(1, 40):
        child = os.fork()
        if child == 0:
            die_at(kill_at)
            try:
                save(tmp_path, 8, keep=2)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        newest = find_latest(tmp_path).checkpoint
        assert newest is not None and newest.step in (4, 8)
        if os.WIFSIGNALED(status):
            died += 1
        save(tmp_path, 8)
        assert everything(tmp_path) == good  # and no partial directory
        if not os.WIFSIGNALED(status):
            break
    assert died >= 6


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    path = save(tmp_path, 8)
    path.rename(tmp_path / f".{path.name}.replaced")
    save(tmp_path, 12)
    assert [p.name for p in list_steps(tmp_path)] == ["step-00000012", "step-00000008"]
    Checkpoint(path).verify()


@pytest.mark.parametrize("number", range(1, 6))
def test_a_failing_disk_fails_the_save_and_leaves_nothing(tmp_path, monkeypatch, number):
    """EIO at the n-th fsync: the rank's file, state, manifest, the directory, the directory above."""
    save(tmp_path, 4)
    before = everything(tmp_path)
    calls, real = 0, os.fsync

    def fsync(handle):
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointWriteError, match=r"rank 0: OSError.*Input/output error") as failure:
        save(tmp_path, 8)
    assert failure.value.exit_code == 73 and calls == number
    assert everything(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    save(tmp_path, 8)
    assert find_latest(tmp_path).checkpoint.step == 8


def test_the_manifest_is_written_after_everything_else(tmp_path, monkeypatch):
    order, real = [], checkpoint_format.os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    path = save(tmp_path, 4)
    names = [Path(entry).name for entry in order]
    assert names == ["rank-00000.safetensors", "state.json", MANIFEST, f".{path.name}.partial", tmp_path.name]


def test_what_cannot_be_a_checkpoint_is_not_published(tmp_path):
    with pytest.raises(CheckpointWriteError, match="rows 128 to 200 are missing"):
        some = [entry for entry in shards(4) if entry[0].first == 0]
        save_checkpoint(tmp_path, 4, some, SHAPES, {}, {})
    with pytest.raises(CheckpointWriteError, match="follow row 200"):
        again = [*shards(4), (RowRange("embed.weight", 0, 199, 200), {"master": torch.zeros(1, 3)})]
        save_checkpoint(tmp_path, 4, again, SHAPES, {}, {})
    with pytest.raises(CheckpointWriteError, match="not JSON compliant"):
        save(tmp_path, 4, loss=float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_retention_keeps_the_newest_and_never_counts_damage(tmp_path):
    for step in (4, 8, 12):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_steps(tmp_path)] == ["step-00000012", "step-00000008"]
    (tmp_path / "step-00000012" / MANIFEST).unlink()
    save(tmp_path, 10, keep=2)
    assert [p.name for p in list_steps(tmp_path)] == ["step-00000012", "step-00000010", "step-00000008"]
    assert find_latest(tmp_path).checkpoint.step == 10


# ---- other models, other versions, hostile files


def test_a_checkpoint_of_another_model_is_refused_with_every_mismatch(tmp_path):
    save(tmp_path, 4)
    checkpoint = find_latest(tmp_path).checkpoint
    kinds = {"master": torch.float32, "exp_avg": torch.bfloat16}
    extra = {name: tuple(value.shape) for name, value in EXTRA.items()}
    checkpoint.require(SHAPES, extra, kinds)
    other = {"embed.weight": (300, 3), "norm.weight": (7,), "layers.0.wide.weight": (9, 9)}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.require(other, {"layers.1.router.bias": (16,)}, {"master": torch.float32, "exp_avg": torch.float32})
    text = str(refused.value)
    assert "tensor embed.weight: found shape (200, 3), expected (300, 3)" in text
    assert "tensor layers.0.wide.weight: found nothing, expected shape (9, 9)" in text
    assert "tensor layers.0.conv.weight: found shape (5, 2, 4), expected nothing" in text
    assert "extra tensor layers.1.router.bias: found shape (8,), expected (16,)" in text
    assert "exp_avg of norm.weight: found BF16, expected F32" in text
    assert refused.value.exit_code == 66


def rewrite(path: Path, change) -> None:
    """A manifest with a valid digest over changed content, as an attacker would make it."""
    body = json.loads((path / MANIFEST).read_text())
    body.pop("digest")
    change(body)
    (path / MANIFEST).write_text(json.dumps({**body, "digest": checkpoint_format._digest(body)}))


HOSTILE = {
    "schema 2; this version": lambda body: body.update(schema=2),
    "schema 0; this version": lambda body: body.update(schema=0),
    "not the manifest of a Bireme": lambda body: body.update(format="other"),
    "'../x' is not one that": lambda body: body["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
    "'/etc/passwd' is not one that": lambda body: body["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    "which is not listed": lambda body: body["extra"]["layers.1.router.bias"].update(file="rank-00009.safetensors"),
    "unknown dtype 'F4'": lambda body: body["extra"]["layers.1.router.bias"].update(dtype="F4"),
    "rows 0 to 7 are missing": lambda body: body["tensors"]["norm.weight"]["kinds"]["master"].update(slices=[]),
    "is malformed": lambda body: body["tensors"].update({"x": 3}),
    "does not have 0 columns": lambda body: body["tensors"]["norm.weight"].update(columns=0),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_manifests_that_lie_are_refused(tmp_path, reason):
    path = save(tmp_path, 4)
    rewrite(path, HOSTILE[reason])
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint(path)


def test_shapes_in_the_file_must_match_the_manifest(tmp_path):
    path = save(tmp_path, 4)
    rewrite(path, lambda body: body["tensors"]["norm.weight"].update(shape=[14], columns=2))
    with pytest.raises(CheckpointError, match=r"norm\.weight\|0\|7\|master has shape \[7, 1\]"):
        Checkpoint(path).read("norm.weight", "master", 0, 7)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("file", [MANIFEST, "state.json", "rank-00000.safetensors"])
def test_a_pickle_in_place_of_any_file_is_refused_and_never_run(tmp_path, file):
    path = save(tmp_path / "run", 4)
    data = pickle.dumps(Payload(tmp_path / "canary"))
    (path / file).write_bytes(data)
    if file != MANIFEST:
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rewrite(path, lambda body: body["files"].update({file: entry}))
    with pytest.raises(CheckpointError, match=file):
        Checkpoint(path).read("norm.weight", "master", 0, 7)
    assert not (tmp_path / "canary").exists()


def test_no_module_of_the_read_path_can_unpickle():
    root = Path(checkpoint_format.__file__).parent
    for name in ("checkpoint", "checkpoint_format", "checkpoint_directory", "agree", "ckpt"):
        code = (root / f"{name}.py").read_text()
        for word in ("import pickle", "torch.load", "torch.save", "_object("):
            assert word not in code, f"{name} uses {word}"


# ---- the command


def test_the_command_lists_a_run_and_refuses_what_is_not_one(tmp_path, capsys):
    save(tmp_path / "checkpoints", 4)
    save(tmp_path / "stages/initial", 0)
    assert ckpt(["ls", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(row["step"] for row in line["checkpoints"]) == [0, 4] and line["damaged"] == []
    assert ckpt(["verify", str(tmp_path / "nowhere")]) == 64
    with pytest.raises(SystemExit) as wrong:
        ckpt(["repair", str(tmp_path)])
    assert wrong.value.code == 64

"""Folders larger than memory: one tensor at a time out and in, whatever the size of a shard; files and their index."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from model.huggingface import INDEX, ReleasedFolder, export_model
from model.names import canonical_shapes, canonical_tensors
from model.released_fp8 import FP8
from model.shard import ShardWriter, Stored, read_header, read_rows
from tests.model.models import model_config, random_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8])
def test_one_tensor_is_alive_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    config = model_config("tiny", num_layers=2)
    shapes = canonical_shapes(config)
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(earlier() is not None for earlier in alive), name
        value = torch.randn(shapes[name])
        alive[:] = [weakref.ref(value)]
        return value

    export_model(tmp_path / "out", config, read, length=128, dtype=dtype)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


PEAK = """
import json, resource, sys
from pathlib import Path
import torch
from model.convert import convert
from model.huggingface import DTYPES, ReleasedFolder, export_model
from model.names import canonical_shapes
from tests.model.models import model_config

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

config = model_config("tiny", vocab_size=16384, hidden_size=256, intermediate_size=16384, num_layers=5,
                      first_dense_layers=4, mtp_depth=0)
shapes, folder = canonical_shapes(config), Path(sys.argv[1])
small = model_config("tiny", num_layers=2)
small_shapes = canonical_shapes(small)
export_model(folder / "warm", small, lambda name: torch.ones(small_shapes[name]), length=128, dtype=DTYPES["fp8"])
convert(ReleasedFolder(folder / "warm"), folder / "warmer", DTYPES["float32"])
start = megabytes()
export_model(folder / "wide", config, lambda name: torch.ones(shapes[name]), length=128, dtype=DTYPES["float32"])
written = megabytes() - start
convert(ReleasedFolder(folder / "wide"), folder / "fp8", DTYPES["fp8"])
convert(ReleasedFolder(folder / "fp8"), folder / "narrow", DTYPES["bfloat16"])
total = sum(file.stat().st_size for file in (folder / "wide").glob("*.safetensors")) / 2**20
largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 4 / 2**20
print(json.dumps({"export": written, "convert": megabytes() - start, "total": total, "largest": largest}))
"""


def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """A folder of one shard, many times its largest tensor: the process grows by a few of those only."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["total"] > 7 * found["largest"] > 200
    assert found["export"] < 2.5 * found["largest"], found
    # In FP32 the tensor, the piece of it that is quantised, and that piece's scaled copy and codes.
    assert found["convert"] < 4 * found["largest"], found


def test_files_are_the_librarys(tmp_path: Path) -> None:
    """Ours read by safetensors, theirs read here; every dtype, rows, and odd sizes beside wider ones."""
    tensors = {
        "odd": torch.randn(3, 5).to(torch.bfloat16),
        "codes": torch.randn(7, 3).to(FP8),
        "wide": torch.randn(5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "float": torch.randn(2, 2, 3),
    }
    stored = [Stored(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    with ShardWriter(tmp_path / "ours.safetensors", stored) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    save_file(tensors, tmp_path / "theirs.safetensors")
    back = load_file(tmp_path / "ours.safetensors")
    # Each begins at a multiple of its own width: some readers map files into memory.
    ours = read_header(tmp_path / "ours.safetensors")
    assert all(span.begin % tensors[name].dtype.itemsize == 0 for name, span in ours.items())
    spans = read_header(tmp_path / "theirs.safetensors")
    assert back.keys() == spans.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name].double(), value.double())
        for first, last in ((0, len(value)), (len(value) // 2, len(value))):
            rows = read_rows(spans[name], first, last)
            assert rows.dtype == value.dtype and torch.equal(rows.double(), value[first:last].double())


def test_a_file_is_complete_or_refused(tmp_path: Path) -> None:
    stored = [Stored("a", torch.float32, (2,)), Stored("b", torch.float32, (2,))]
    with pytest.raises(ValueError, match="not written: b"), ShardWriter(tmp_path / "x", stored) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="expected"), ShardWriter(tmp_path / "x", stored) as writer:
        writer.write("a", torch.ones(3))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x08\0\0\0\0\0\0\0{", "truncated: 9 bytes, its header alone needs 16"),
        (b"\xff" * 9, "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}more", "its header promises only 10"),
        (
            b'\x3a\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}     \0\0\0\0',
            "not a safetensors file",
        ),
        (b'\x3a\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}     ', "its header promises 70"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=wanted):
        read_header(tmp_path / "x")


def test_index_and_files_all_at_once(tmp_path: Path) -> None:
    """Lost files excuse the tensors they held, and no others."""
    folder, config = tmp_path / "out", model_config("tiny", num_layers=2)
    tensors = canonical_tensors(random_model(config, torch.float32))
    export_model(folder, config, tensors.__getitem__, length=128, shard_bytes=20_000)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 6
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-4])
    save_file({"stray": torch.ones(1)}, folder / "stray.safetensors")
    stored = load_file(files[3])
    gone, moved = sorted(stored)[:2]
    (last, *_) = sorted(load_file(files[5]))
    save_file({name: value for name, value in stored.items() if name != gone}, files[3])
    index["weight_map"][moved] = files[4].name
    del index["weight_map"][last]
    index["weight_map"]["model.ghost"] = files[4].name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        ReleasedFolder(folder)
    lines = str(caught.value).splitlines()
    wanted = [
        f"{files[1].name} is missing, {INDEX} names it",
        f"{files[2].name}: truncated: ",
        f"stray.safetensors is not a file of this model, {INDEX} does not name it",
        f"{gone} is missing, expected shape",
        f"{moved} is in {files[3].name}, {INDEX} says {files[4].name}",
        f"{last} is in {files[5].name}, {INDEX} does not name it",
        f"model.ghost is not in {files[4].name}, {INDEX} says so",
    ]
    assert len(lines) == len(wanted), lines
    for text in wanted:
        assert any(text in line for line in lines), (text, lines)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    folder, config = tmp_path / "out", model_config("tiny", num_layers=2)
    tensors = canonical_tensors(random_model(config, torch.float32))
    export_model(folder, config, tensors.__getitem__, length=128, dtype=torch.float32)
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    assert torch.equal(ReleasedFolder(folder).read("norm"), tensors["norm"])
    save_file({"stray": torch.ones(1)}, folder / "stray.safetensors")
    with pytest.raises(CheckpointError, match=r"stray.safetensors is not a file of this model, without .* only"):
        ReleasedFolder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither .* nor .* is there"):
        ReleasedFolder(folder)
    (folder / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"weight_map must map names to files"):
        ReleasedFolder(folder)


def test_a_copy_that_is_none(tmp_path: Path) -> None:
    folder, config = tmp_path / "out", model_config("tiny", num_layers=2)
    tensors = canonical_tensors(random_model(config, torch.float32))
    export_model(folder, config, tensors.__getitem__, length=128, dtype=torch.float32)
    ReleasedFolder(folder).check_values()
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    stored["model.layers.2.shared_head.head.weight"][-1, -1] += 1
    save_file(stored, file)
    with pytest.raises(
        CheckpointError, match=r"shared_head\.head\.weight differs from lm_head\.weight, must be a copy"
    ):
        ReleasedFolder(folder).check_values()


def test_scales_that_are_not_finite_are_all_named(tmp_path: Path) -> None:
    folder, config = tmp_path / "out", model_config("tiny", num_layers=2)
    tensors = canonical_tensors(random_model(config, torch.float32))
    export_model(folder, config, tensors.__getitem__, length=128, dtype=torch.float8_e4m3fn)
    ReleasedFolder(folder).check_values()
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    names = ["model.layers.0.mlp.up_proj.weight_scale_inv", "model.layers.1.self_attn.o_proj.weight_scale_inv"]
    for name, value in zip(names, (float("nan"), float("inf")), strict=True):
        stored[name][0, 0] = value
    save_file(stored, file)
    with pytest.raises(CheckpointError) as failure:
        ReleasedFolder(folder).check_values()
    lines = str(failure.value).splitlines()
    assert lines == [f"{folder}: {name} has a scale that is not finite" for name in sorted(names)]

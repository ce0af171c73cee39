"""`python -m model check` and `convert`: what they print, and one exit code for each kind of mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.__main__ import main
from model.huggingface import ReleasedFolder, export_model
from model.names import canonical_shapes, canonical_tensors
from model.released_fp8 import FP8
from tests.model.models import model_config, random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, place = model_config("tiny"), tmp_path_factory.mktemp("folder")
    (place / "tokenizer.json").write_text("{}")
    export_model(
        place / "fp8",
        config,
        canonical_tensors(random_model(config, torch.float32)).__getitem__,
        length=1024,
        dtype=FP8,
        bos_id=3,
        eos_id=[4, 5],
        tokenizer_files=[place / "tokenizer.json"],
    )
    return place / "fp8"


def test_check_says_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"folder={folder}"]) == 0
    line, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["family"] == "deepseek_v3" and found["dtypes"] == ["BF16", "F32", "F8_E4M3"] and found["yarn"]
    shapes = canonical_shapes(model_config("tiny"))
    assert found["parameters"] + found["mtp_parameters"] == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert "deepseek_v3" in line and f"{found['parameters']:,} parameters" in line and "5120 tokens, YaRN" in line


def test_both_directions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide, back = tmp_path / "float32", tmp_path / "fp8"
    assert main(["convert", f"from={folder}", f"to={wide}", "dtype=float32", "shard_gb=0.0001"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["files"]) > 2
    assert main(["convert", f"from={wide}", f"to={back}", "dtype=fp8"]) == 0
    for place in (wide, back):
        values = json.loads((place / "config.json").read_text())
        assert (
            values["bos_token_id"] == 3 and values["eos_token_id"] == [4, 5] and values["rope_scaling"]["factor"] == 40
        )
        assert ("quantization_config" in values) == (place == back)
        assert (place / "tokenizer.json").read_text() == "{}"
    first, second = ReleasedFolder(folder), ReleasedFolder(wide)
    for name in first.names:
        assert torch.equal(first.read(name).float(), second.read(name)), name
    (before,), (after,) = folder.glob("*.safetensors"), back.glob("*.safetensors")
    before_all, after_all = load_file(before), load_file(after)
    for name, value in before_all.items():
        assert torch.allclose(value.float(), after_all[name].float(), rtol=2**-23, atol=0), name


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(code: int, *arguments: str) -> str:
        assert main(arguments) == code
        return capsys.readouterr().err

    assert "summary model=NAME|all" in said(64)
    assert "'weigh': must be one of" in said(64, "weigh")
    assert "folder missing" in said(64, "check")
    assert "must be KEY=VALUE" in said(64, "check", "weights")
    assert "dtype=int4: must be one of bfloat16" in said(64, "convert", f"from={folder}", "to=x", "dtype=int4")
    assert "shard_gb=none" in said(64, "convert", f"from={folder}", "to=x", "dtype=fp8", "shard_gb=none")
    assert "No such file" in said(66, "check", f"folder={tmp_path / 'nowhere'}")
    endless = tmp_path / ("x" * 300)
    assert "cannot be read (File name too long)" in said(66, "check", f"folder={endless}")
    assert "File name too long" in said(73, "convert", f"from={folder}", f"to={endless}", "dtype=fp8")
    assert "exists already" in said(73, "convert", f"from={folder}", f"to={tmp_path}", "dtype=fp8")
    shutil.copytree(folder, tmp_path / "bad")
    (file,) = (tmp_path / "bad").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    values = json.loads((folder / "config.json").read_text()) | {"hidden_act": "gelu", "attention_bias": True}
    (tmp_path / "bad" / "config.json").write_text(json.dumps(values))
    for command in (
        ["check", f"folder={tmp_path / 'bad'}"],
        ["convert", f"from={tmp_path / 'bad'}", f"to={tmp_path / 'new'}", "dtype=fp8"],
    ):
        assert len(said(66, *command).splitlines()) == 3
    assert not (tmp_path / "new").exists()
    assert main(["--help"]) == 0
    capsys.readouterr()
    assert main(["summary", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m model summary model=NAME|all [model.KEY=VALUE ...]")

"""Hugging Face folders: out and in again bit for bit; every problem of a bad folder in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.errors import CannotWriteError, CheckpointError, ModelError
from model.huggingface import INDEX, ReleasedFolder, export_model
from model.names import canonical_shapes, canonical_tensors
from model.released import released_entries
from model.released_family import differing_fields
from model.shard import read_header
from tests.model.models import model_config, random_model


def export(folder: Path, config: ModelConfig, dtype: torch.dtype, **options: object) -> dict[str, torch.Tensor]:
    tensors = canonical_tensors(random_model(config, dtype))
    export_model(folder, config, tensors.__getitem__, dtype=dtype, **{"length": 128, **options})
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("q_lora_rank", "tied"), [(0, False), (16, False), (16, True)])
def test_out_and_in_bit_for_bit(tmp_path: Path, dtype: torch.dtype, q_lora_rank: int, tied: bool) -> None:
    config = model_config("tiny", q_lora_rank=q_lora_rank, mtp_depth=2, num_layers=2, tie_embeddings=tied)
    tensors = export(tmp_path / "out", config, dtype, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    folder = ReleasedFolder(tmp_path / "out")
    for name in canonical_shapes(config):
        value = folder.read(name)
        assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]), name
    folder.config.name = config.name
    folder.config.rope_scaling = config.rope_scaling
    assert folder.config == config and folder.length == 128


SMALL_MOE = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_layers": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_routed_experts": 8,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("demo_v2", {}), ("demo_v2", {"num_routed_experts": 0}), ("demo_llm", {}), ("moe_16b", SMALL_MOE)],
    ids=["v2", "dense v2", "llm", "moe"],
)
def test_every_family_bit_for_bit(tmp_path: Path, name: str, changes: dict[str, object]) -> None:
    config = model_config(name, **changes)
    tensors = export(tmp_path / "out", config, torch.bfloat16, shard_bytes=100_000)
    folder = ReleasedFolder(tmp_path / "out")
    assert folder.names == list(canonical_shapes(config)) and differing_fields(folder.config, config) == []
    for name in folder.names:
        assert torch.equal(folder.read(name), tensors[name]), name


def test_yarn_is_said_only_by_a_checkpoint_of_an_extended_stage(tmp_path: Path) -> None:
    config = model_config("tiny", num_layers=2)
    export(tmp_path / "plain", config, torch.float32, length=128)
    export(tmp_path / "yarn", config, torch.float32, length=129)
    plain, yarn = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "yarn"))
    assert plain["rope_scaling"] is None and plain["max_position_embeddings"] == 128
    assert yarn["rope_scaling"]["type"] == "yarn" and yarn["max_position_embeddings"] == 5120
    folder = ReleasedFolder(tmp_path / "yarn")
    assert folder.config.rope_scaling == config.rope_scaling and folder.length == 5120


def test_released_names_of_v3() -> None:
    entries = {entry.name: entry for entry in released_entries(ModelConfig())}
    # The released folder has 91,991 tensors: these, and a scale for each FP8 matrix.
    matrices = 62 * 5 + 3 * 3 + 59 * 257 * 3
    assert len(entries) + matrices == 91_991
    assert entries["model.layers.61.eh_proj.weight"].shape == (7168, 14336)
    assert entries["model.layers.61.shared_head.norm.weight"].canonical == "mtp.0.norm"
    assert entries["model.layers.61.mlp.gate.e_score_correction_bias"].shape == (256,)
    up = entries["model.layers.3.mlp.experts.0.up_proj.weight"]
    assert (up.canonical, up.first_row, up.last_row, up.shape) == (
        "layers.3.experts.0.gate_up", 2048, 4096, (2048, 7168)
    )  # fmt: skip


def test_copies_and_other_files(tmp_path: Path) -> None:
    config = model_config("tiny", num_layers=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    seen: list[str] = []
    options = {"tokenizer_files": [tmp_path / "tokenizer.json"], "bos_id": 5, "eos_id": 6, "progress": seen.append}
    tensors = export(tmp_path / "out", config, torch.bfloat16, **options)
    assert seen == ["model-00001-of-00001.safetensors"]
    stored = load_file(tmp_path / "out" / seen[0])
    assert torch.equal(stored["model.layers.2.embed_tokens.weight"], tensors["embed"])
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], tensors["head"])
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 5, "eos_token_id": 6
    }  # fmt: skip
    total = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(value.nbytes for value in stored.values())


def test_a_tied_head_has_no_tensor_of_its_own(tmp_path: Path) -> None:
    config = model_config("tiny", num_layers=2, tie_embeddings=True)
    tensors = export(tmp_path / "out", config, torch.float32)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    stored = load_file(file)
    assert "head" not in tensors and "lm_head.weight" not in stored
    assert torch.equal(stored["model.layers.2.shared_head.head.weight"], tensors["embed"])
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["tie_word_embeddings"] is True
    (tmp_path / "out" / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        ReleasedFolder(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": "yes"}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is 'yes', allowed true and false"):
        ReleasedFolder(tmp_path / "out")


def test_nothing_is_left_of_a_failed_export(tmp_path: Path) -> None:
    config = model_config("tiny", num_layers=2)
    tensors = canonical_tensors(random_model(config, torch.float32))
    tensors["norm"] = tensors["norm"][1:]
    with pytest.raises(CheckpointError, match=r"norm: shape \(31,\), expected \(32,\)"):
        export_model(tmp_path / "out", config, tensors.__getitem__, length=128, shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    config = model_config("tiny", num_layers=2)
    (tmp_path / "there").mkdir()
    with pytest.raises(CannotWriteError, match="exists already"):
        export(tmp_path / "there", config, torch.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="Not a directory"):
        export(tmp_path / "file" / "out", config, torch.float32)
    with pytest.raises(ModelError, match="latent norms"):
        export(tmp_path / "out", model_config("tiny", rms_norm_eps=1e-5, num_layers=2), torch.float32)
    with pytest.raises(ModelError, match="dtype"):
        export_model(tmp_path / "out", config, lambda name: torch.empty(0), length=128, dtype=torch.float16)


def test_all_problems_of_the_weights_at_once(tmp_path: Path) -> None:
    folder, config = tmp_path / "out", model_config("tiny", num_layers=2)
    export(folder, config, torch.float32)
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    del stored["model.layers.1.self_attn.o_proj.weight"]
    stored["model.norm.weight"] = torch.ones(31)
    stored["model.layers.0.mlp.extra.weight"] = torch.ones(2)
    stored["lm_head.weight"] = stored["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(stored, file)
    with pytest.raises(CheckpointError) as caught:
        ReleasedFolder(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for wanted in (
        "model.layers.1.self_attn.o_proj.weight is missing, expected shape (32, 16)",
        "model.norm.weight has shape (31,), expected (32,)",
        "model.layers.0.mlp.extra.weight is not a tensor of this model",
        "lm_head.weight is F8_E4M3",
    ):
        assert any(wanted in line for line in lines), wanted
    assert caught.value.exit_code == 66


@pytest.mark.parametrize("offsets", [[1, 65], [0.0, 64.0], [64, 128]], ids=["overlapping", "fractions", "a hole"])
def test_bytes_that_are_not_one_tensors_own(tmp_path: Path, offsets: list[float]) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [16], "data_offsets": offsets},
        "b": {"dtype": "F32", "shape": [16], "data_offsets": [128, 192]},
        "c": {"dtype": "F32", "shape": [16], "data_offsets": [64, 128]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(192))
    with pytest.raises(
        CheckpointError, match=r"(a|b|c) begins at byte \d+, expected \d+|cannot be understood"
    ) as caught:
        read_header(tmp_path / "file")
    assert len(str(caught.value).splitlines()) == 1


def test_truncated_file_and_bad_config(tmp_path: Path) -> None:
    folder, config = tmp_path / "out", model_config("tiny", num_layers=2)
    export(folder, config, torch.float32)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"truncated: \d+ bytes, its header promises \d+") as truncated:
        ReleasedFolder(folder)
    assert len(str(truncated.value).splitlines()) == 1
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_act": "gelu", "rope_scaling": {"type": "linear", "factor": 2.0}}
    del values["kv_lora_rank"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        ReleasedFolder(folder)
    # The file is still truncated: named with the three of config.json.
    assert len(str(caught.value).splitlines()) == 4
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        ReleasedFolder(folder)
    with pytest.raises(CheckpointError, match="No such file"):
        ReleasedFolder(tmp_path / "nowhere")

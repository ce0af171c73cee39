"""Block-scaled FP8 in folders: the layout, the numbers against a loop over blocks and against transformers, rows that
do not begin at a block, and out again what came in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.errors import CheckpointError
from model.huggingface import ReleasedFolder, export_model
from model.names import canonical_shapes, canonical_tensors
from model.released import released_entries
from model.released_fp8 import FP8, from_blocks, to_blocks
from tests.model.models import model_config, random_model

# Widths with whole and edge blocks both ways, and odd ones.
EDGES = {"hidden_size": 260, "intermediate_size": 300, "moe_intermediate_size": 131, "num_layers": 2, "vocab_size": 64}


def config_of(name: str = "tiny", **changes: object) -> ModelConfig:
    return model_config(name, **{**EDGES, **changes})


def export(folder: Path, config: ModelConfig, dtype: torch.dtype = FP8) -> dict[str, torch.Tensor]:
    tensors = canonical_tensors(random_model(config, torch.float32))
    export_model(folder, config, tensors.__getitem__, length=128, dtype=dtype)
    return tensors


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def dequantised(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Block by block, as DeepSeek's fp8_cast_bf16.py."""
    value = codes.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    return value


def test_layout_and_numbers(tmp_path: Path) -> None:
    config = config_of()
    tensors = export(tmp_path / "out", config)
    stored, folder = all_tensors(tmp_path / "out"), ReleasedFolder(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization_config"]["weight_block_size"] == [128, 128] and values["torch_dtype"] == "bfloat16"
    for entry in released_entries(config):
        rows = tensors[entry.canonical][entry.first_row : entry.last_row]
        if not entry.linear:
            wanted = torch.float32 if entry.name.endswith("bias") else torch.bfloat16
            assert torch.equal(stored.pop(entry.name), rows.to(wanted)), entry.name
            continue
        codes, scale = stored.pop(entry.name), stored.pop(entry.name + "_scale_inv")
        assert codes.dtype == torch.float8_e4m3fn and codes.shape == rows.shape
        assert scale.dtype == torch.float32 and scale.shape == tuple(-(-side // 128) for side in rows.shape)
        assert torch.equal(
            scale[-1, -1], rows[128 * (scale.shape[0] - 1) :, 128 * (scale.shape[1] - 1) :].abs().max() / 448
        )
        value = folder.read_rows(entry.canonical, entry.first_row, entry.last_row)
        assert value.dtype == torch.float32 and torch.equal(value, dequantised(codes, scale)), entry.name
        # Three bits of mantissa: half a step is 1/16 of a normal number, and 2^-10 of a scale below.
        assert ((value - rows).abs() <= rows.abs() / 16 + scale.max() * 2**-10).all()
    assert stored == {}


@pytest.mark.parametrize("name", ["layers.1.experts.3.gate_up", "layers.0.attention.q_a", "layers.0.mlp.down", "embed"])
def test_any_rows(tmp_path: Path, name: str) -> None:
    config = config_of()
    export(tmp_path / "out", config)
    folder = ReleasedFolder(tmp_path / "out")
    whole, rows = folder.read(name), canonical_shapes(config)[name][0]
    cuts = [0, 1, rows // 2, rows // 2 + 1, min(127, rows), min(129, rows), rows]
    for first in cuts:
        for last in (cut for cut in cuts if cut >= first):
            assert torch.equal(folder.read_rows(name, first, last), whole[first:last]), (first, last)
    with pytest.raises(ValueError, match="not within"):
        folder.read_rows(name, 0, rows + 1)


def test_rows_read_only_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import model.huggingface_folder as module

    config = config_of()
    export(tmp_path / "out", config)
    folder, read = ReleasedFolder(tmp_path / "out"), module.read_rows
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(module, "read_rows", lambda span, a, b: seen.append((span.dtype, a, b)) or read(span, a, b))
    # Rows 130..140 of gate; then 2 rows of gate (131 in all) and 1 of up.
    folder.read_rows("layers.1.experts.0.gate_up", 129, 130)
    folder.read_rows("layers.1.experts.0.gate_up", 129, 132)
    assert seen == [
        ("F8_E4M3", 129, 130), ("F32", 1, 2), ("F8_E4M3", 129, 131), ("F32", 1, 2), ("F8_E4M3", 0, 1), ("F32", 0, 1)
    ]  # fmt: skip


def test_out_again_what_came_in(tmp_path: Path) -> None:
    """FP8 -> FP32 -> FP8: the codes, and the scales to one unit in the last place; over BF16 to BF16's rounding."""
    config = config_of()
    export(tmp_path / "fp8", config)
    first = ReleasedFolder(tmp_path / "fp8")
    stored = all_tensors(tmp_path / "fp8")
    for wide, tolerance in ((torch.float32, 2**-23), (torch.bfloat16, 2**-8)):
        there, back = tmp_path / f"{wide}", tmp_path / f"{wide} again"
        export_model(there, config, first.read, length=128, dtype=wide)
        export_model(back, config, ReleasedFolder(there).read, length=128, dtype=FP8)
        again = all_tensors(back)
        assert again.keys() == stored.keys()
        for name, value in stored.items():
            if name.endswith("_scale_inv"):
                assert ((again[name] - value).abs() <= tolerance * value).all(), name
            else:
                assert torch.equal(again[name].view(torch.uint8), value.view(torch.uint8)), name


def test_when_scales_do_not_come_back() -> None:
    """A scale that is not amax / 448 (a power of two above it, as in V3.1, or a larger amax cut away) is not found
    again from the values; a power of two with a code of 448 is, exactly."""
    codes = torch.full((128, 128), 448.0).to(FP8)
    power = torch.tensor([[2.0**-9]])
    assert torch.equal(to_blocks(from_blocks(codes, power, 0))[1], power)
    smaller = torch.full((128, 128), 240.0).to(FP8)
    again, scale = to_blocks(from_blocks(smaller, power, 0))
    assert not torch.equal(scale, power) and not torch.equal(again.float(), smaller.float())
    assert torch.equal(from_blocks(again, scale, 0), from_blocks(smaller, power, 0))


@pytest.mark.parametrize("name", ["tiny", "demo_v2", "demo_llm"])
def test_transformers_reads_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a CPU it multiplies codes and scales too. It takes a block's side for rows / blocks: no edge blocks here."""
    import transformers.quantizers.quantizer_finegrained_fp8 as quantizer
    from transformers import AutoModelForCausalLM

    # Asked for, but not needed on one device.
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    config = model_config(
        name, mtp_depth=0, hidden_size=256, num_heads=4, qk_nope_head_dim=16, v_head_dim=16, vocab_size=64
    )
    export(tmp_path / "out", config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    folder, compared = ReleasedFolder(tmp_path / "out"), 0
    for entry in released_entries(config):
        value = folder.read_rows(entry.canonical, entry.first_row, entry.last_row)
        if ".experts." in entry.name:
            place, _, rest = entry.name.partition(".experts.")
            expert, kind, _ = rest.split(".")
            stacked = theirs[f"{place}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            found = stacked[entry.first_row : entry.last_row]
        else:
            found = theirs[entry.name]
        assert torch.equal(found, value.to(found.dtype)), entry.name
        compared += entry.linear
    assert compared > 10


def damage(folder: Path, **changes: torch.Tensor | None) -> list[str]:
    """Problems after tensors were replaced or (None) removed."""
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    for name, value in changes.items():
        stored.pop(name) if value is None else stored.__setitem__(name, value)
    save_file(stored, file)
    with pytest.raises(CheckpointError) as caught:
        ReleasedFolder(folder)
    return str(caught.value).splitlines()


def test_every_fp8_problem_at_once(tmp_path: Path) -> None:
    folder, at = tmp_path / "out", "model.layers.0."
    export(folder, config_of())
    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(values))
    lines = damage(
        folder,
        **{
            at + "mlp.up_proj.weight_scale_inv": None,
            at + "mlp.down_proj.weight_scale_inv": torch.ones(2, 3),
            at + "mlp.gate_proj.weight": torch.ones(300, 260),
            at + "self_attn.o_proj.weight_scale_inv": torch.ones(3, 1, dtype=torch.bfloat16),
            "model.layers.1.mlp.gate.weight": torch.ones(8, 260).to(FP8),
            "model.layers.1.mlp.gate.weight_scale_inv": torch.ones(1, 3),
            at + "self_attn.q_a_proj.weight": None,
        },
    )
    wanted = [
        "mlp.up_proj.weight is F8_E4M3 without model.layers.0.mlp.up_proj.weight_scale_inv, expected F32 (3, 3)",
        "mlp.down_proj.weight_scale_inv is F32 (2, 3), expected F32 (3, 3)",
        "mlp.gate_proj.weight_scale_inv is a scale, but model.layers.0.mlp.gate_proj.weight is F32 and not F8_E4M3",
        "self_attn.o_proj.weight_scale_inv is BF16 (3, 1), expected F32 (3, 1)",
        "model.layers.1.mlp.gate.weight is F8_E4M3; BF16, F16, F32 or F64 is needed",
        "model.layers.1.mlp.gate.weight_scale_inv is not a tensor of this model",
        "self_attn.q_a_proj.weight is missing, expected shape (16, 260)",
        "tensors are F8_E4M3, config.json has no quantization_config",
    ]
    assert len(lines) == len(wanted), lines
    for text in wanted:
        assert any(text in line for line in lines), text


def test_numbers_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(folder, config_of())
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    stored["model.layers.0.mlp.down_proj.weight"].view(torch.uint8)[7, 7] = 0xFF
    stored["model.layers.0.mlp.up_proj.weight_scale_inv"][1, 1] = torch.inf
    save_file(stored, file)
    opened = ReleasedFolder(folder)
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight holds NaN"):
        opened.read("layers.0.mlp.down")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has a scale that is not finite"):
        opened.read("layers.0.mlp.gate_up")
    opened.read_rows("layers.0.mlp.down", 8, 16)

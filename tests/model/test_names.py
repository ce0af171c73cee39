"""Canonical names map every parameter whatever the slice; initial values do not depend on layout."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.initialize import initial_rows, initial_tensor, initialize
from model.layer import TransformerLayer
from model.mtp import MultiTokenPrediction
from model.names import canonical_shapes, canonical_tensors, load_canonical, module_parts
from model.transformer import Transformer
from tests.model.models import model_config, random_model


@pytest.mark.parametrize("tied", [False, True])
def test_whole_model_holds_every_canonical_tensor_once(tied: bool) -> None:
    config = model_config("tiny", mtp_depth=2, tie_embeddings=tied)
    model = Transformer(config, device="meta")
    parts = [part for parts in module_parts(model, buffers=True).values() for part in parts]
    assert len({part.name for part in parts}) == len(parts)
    assert {part.name: part.shape for part in parts} == canonical_shapes(config)
    assert ("head" in canonical_shapes(config)) != tied and "embed" in canonical_shapes(config)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, parts_of_one in module_parts(model, buffers=True).items():
        assert sum((p.last_row - p.first_row) * p.columns for p in parts_of_one) == tensors[path].numel()


def test_v3_has_the_released_shapes() -> None:
    shapes = canonical_shapes(ModelConfig())
    assert shapes["layers.3.attention.q_b"] == (24576, 1536)
    assert shapes["layers.0.attention.kv_a"] == (576, 7168)
    assert shapes["layers.60.attention.kv_b"] == (32768, 512)
    assert shapes["layers.60.attention.o"] == (7168, 16384)
    assert shapes["layers.2.mlp.gate_up"] == (36864, 7168)
    assert shapes["layers.3.experts.255.gate_up"] == (4096, 7168)
    assert shapes["mtp.0.proj"] == (7168, 14336)
    assert "layers.3.mlp.gate_up" not in shapes and "layers.2.router.bias" not in shapes


@pytest.mark.parametrize("slice_of_experts", [(0, 3), (3, 8), (5, 6)])
def test_slices_take_the_same_initial_values_as_the_whole(slice_of_experts: tuple[int, int]) -> None:
    config = model_config("tiny")
    whole = Transformer(config, dtype=torch.float64)
    initialize(whole, config, seed=7)
    reference = canonical_tensors(whole)
    layer = TransformerLayer(config, moe=True, experts=slice_of_experts, dtype=torch.float64, device="meta")
    layer.to_empty(device="cpu")
    initialize(layer, config, seed=7, prefix="layers.2.")
    depth = MultiTokenPrediction(config, experts=slice_of_experts, dtype=torch.float64)
    initialize(depth, config, seed=7, prefix="mtp.0.")
    found = canonical_tensors(layer, "layers.2.") | canonical_tensors(depth, "mtp.0.")
    first, last = slice_of_experts
    for prefix in ("layers.2.", "mtp.0.layer."):
        held = {name for name in found if name.startswith(f"{prefix}experts.")}
        assert held == {f"{prefix}experts.{e}.{leaf}" for e in range(first, last) for leaf in ("gate_up", "down")}
    for name, value in found.items():
        assert torch.equal(value, reference[name]), name


def test_rows_do_not_depend_on_the_cut() -> None:
    shape = (300, 5)
    whole = initial_rows("layers.0.mlp.down", shape, 0.02, 0, 0, 300)
    for first, last in [(0, 1), (127, 129), (100, 290), (256, 300), (299, 300), (10, 10)]:
        assert torch.equal(initial_rows("layers.0.mlp.down", shape, 0.02, 0, first, last), whole[first:last])


def test_values_are_normal_and_differ_by_name_seed_and_block() -> None:
    config = model_config("tiny")
    embed = initial_tensor("embed", config, 0)
    assert embed.dtype == torch.float32 and embed.shape == (256, 32)
    assert abs(embed.std().item() / config.init_std - 1) < 0.03 and abs(embed.mean().item()) < 0.005
    assert torch.equal(embed, initial_tensor("embed", config, 0))
    assert not torch.equal(embed, initial_tensor("embed", config, 1))
    assert not torch.equal(embed, initial_tensor("head", config, 0))
    assert not torch.equal(embed[:128], embed[128:])
    assert initial_tensor("layers.1.mlp_norm", config, 0).eq(1).all()
    assert initial_tensor("layers.1.router.bias", config, 0).eq(0).all()


def test_a_stable_value() -> None:
    """Changing how values are drawn changes every run that says "same seed": this must be a decision."""
    drawn = initial_rows("embed", (8, 4), 1.0, 0, 0, 1)[0].tolist()
    assert drawn == pytest.approx([0.056299001, 1.001758337, 0.354088545, -1.071547866], abs=1e-7)


def test_load_refuses_a_wrong_shape_by_name() -> None:
    config = model_config("tiny")
    tensors = canonical_tensors(random_model(config, torch.float32))
    tensors["layers.1.experts.3.down"] = tensors["layers.1.experts.3.down"][:, 1:]
    with pytest.raises(ValueError, match=r"layers\.1\.experts\.3\.down: shape \(32, 15\), expected \(32, 16\)"):
        load_canonical(Transformer(config), tensors.__getitem__)

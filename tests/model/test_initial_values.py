"""Initial values are those of the papers and do not depend on how a tensor is cut, whatever kind it is."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.groups import group_of
from model.initialize import BLOCK_ROWS, initial_rows, initial_tensor
from model.names import canonical_shapes, is_norm, is_router_bias
from tests.model.models import model_config

PAPERS = ("llm_7b", "llm_67b", "moe_16b", "v2_lite", "v2", "v3")
SMALL = ("tiny", "demo", "demo_v2", "demo_llm")
# A tensor of every kind in every attention and router: the names of one layer of each sort, and what is outside.
KINDS = [
    (model, name)
    for model in SMALL
    for name in canonical_shapes(model_config(model))
    if not name.startswith("layers.") or (name.startswith(("layers.0.", "layers.1.")) and ".experts." not in name)
] + [(model, "layers.1.experts.3.gate_up") for model in ("tiny", "demo", "demo_v2")]


def test_every_kind_is_here() -> None:
    kinds = {"bias" if is_router_bias(name) else group_of(name) for _, name in KINDS}
    assert kinds == {"bias", "embedding", "head", "norms", "router", "experts", "matrices"}
    assert {name.rpartition(".")[2] for _, name in KINDS} >= {"q", "k", "v", "q_a", "kv_b", "o", "proj", "hidden_norm"}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_cut_gives_the_slices_of_the_whole(data: st.DataObject) -> None:
    model, name = data.draw(st.sampled_from(KINDS))
    config = model_config(model)
    shape = canonical_shapes(config)[name]
    whole = initial_tensor(name, config, 11)
    assert whole.shape == shape and whole.dtype == torch.float32
    near = [edge + by for edge in range(0, shape[0] + 1, BLOCK_ROWS) for by in (-1, 0, 1) if 0 <= edge + by <= shape[0]]
    cuts = data.draw(st.lists(st.one_of(st.integers(0, shape[0]), st.sampled_from(near)), max_size=5))
    edges = sorted([0, *cuts, shape[0]])
    pieces = [initial_rows(name, shape, config.init_std, 11, first, last) for first, last in pairwise(edges)]
    assert torch.equal(torch.cat(pieces).view(shape), whole)


def test_the_definition_written_out() -> None:
    """Philox keyed by the SHA-256 of seed, name and block of 128 rows; normal values in FP32 times the deviation."""
    shape, std = (300, 7), 0.006
    blocks = []
    for block, rows in enumerate((128, 128, 44)):
        key = int.from_bytes(hashlib.sha256(f"9/layers.4.mlp.down/{block}".encode()).digest()[:16], "little")
        blocks.append(np.random.Generator(np.random.Philox(key=key)).standard_normal((rows, 7), dtype=np.float32))
    expected = np.concatenate(blocks) * np.float32(std)
    assert np.array_equal(initial_rows("layers.4.mlp.down", shape, std, 9, 0, 300).numpy(), expected)


@pytest.mark.parametrize("name", PAPERS)
def test_published_models_start_at_0_006(name: str) -> None:
    """LLM section 2.3, V2 section 3.1.2, V3 section 4.2: every learnable parameter, standard deviation 0.006; where the
    paper does not say it of a size (V2-Lite, DeepSeekMoE 16B) as for its larger or smaller one."""
    config = model_config(name)
    assert config.init_std == 0.006
    shapes = canonical_shapes(config)
    chosen = [
        n for n in shapes if not is_norm(n) and n.startswith(("embed", "head", "layers.1.")) and "experts" not in n
    ]
    for tensor in (n for n in chosen if not is_router_bias(n)):
        rows = initial_rows(tensor, shapes[tensor], config.init_std, 0, 0, min(32, shapes[tensor][0]))
        assert rows.std().item() == pytest.approx(0.006, rel=0.03), tensor
        assert abs(rows.mean().item()) < 0.0002

"""Optimizer groups of every shipped model: each tensor in one of them, norms told from matrices, parameters counted."""

from __future__ import annotations

from math import prod

import pytest

from model.count import count_parameters
from model.groups import GroupSummary, group_of, group_table
from model.names import canonical_shapes, is_norm, is_router_bias
from parallel.optimizer.config import GROUPS, GroupConfig, GroupsConfig, OptimizerConfig
from tests.model.models import CONF, model_config

MODELS = sorted(path.stem for path in CONF.glob("*.yaml"))


def table(name: str, groups: GroupsConfig | None = None, **changes: object) -> dict[str, GroupSummary]:
    lines = group_table(model_config(name, **changes), OptimizerConfig(groups=groups or GroupsConfig()))
    assert [line.group for line in lines[: len(GROUPS)]] == list(GROUPS)
    return {line.group: line for line in lines}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_in_exactly_one_group(name: str) -> None:
    shapes = canonical_shapes(model_config(name))
    members = {group: [n for n in shapes if not is_router_bias(n) and group_of(n) == group] for group in GROUPS}
    found = table(name)
    assert {group: len(names) for group, names in members.items()} == {g: found[g].tensors for g in GROUPS}
    assert sum(line.tensors for line in found.values()) == len(shapes)
    assert sum(line.parameters for line in found.values()) == sum(map(prod, shapes.values()))


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_the_vectors(name: str) -> None:
    """RMSNorm weights of attention, latents, MTP and output, and nothing else, have one dimension."""
    for tensor, shape in canonical_shapes(model_config(name)).items():
        assert is_norm(tensor) == (len(shape) == 1 and not is_router_bias(tensor)), tensor
        if not is_router_bias(tensor):
            assert (group_of(tensor) == "norms") == (len(shape) == 1), tensor


@pytest.mark.parametrize("name", MODELS)
def test_groups_add_up_to_the_counted_parts(name: str) -> None:
    found, parts = table(name, mtp_depth=0), count_parameters(model_config(name, mtp_depth=0)).parts
    size = {group: line.parameters for group, line in found.items()}
    for group, part in {"router": "router", "experts": "routed_experts", "router biases": "router_biases"}.items():
        assert size.get(group, 0) == parts.get(part, 0)
    assert {group: size[group] for group in ("embedding", "head", "norms")} == {
        part: parts[part] for part in ("embedding", "head", "norms")
    }
    assert size["matrices"] == sum(parts.get(part, 0) for part in ("attention", "dense_mlp", "shared_experts"))
    counts = count_parameters(model_config(name))
    assert sum(line.parameters for line in table(name).values()) == counts.total + counts.mtp


def test_v3_written_out() -> None:
    found = {group: (line.tensors, line.parameters) for group, line in table("v3").items()}
    width, layers = 7168, 59  # with experts, the MTP layer's included
    assert found["embedding"] == found["head"] == (1, 129280 * width)
    assert found["router"] == (layers, layers * 256 * width)
    assert found["experts"] == (layers * 256 * 2, layers * 256 * 3 * 2048 * width)
    assert found["router biases"] == (layers, layers * 256)
    # Two norms a layer, two of the latents, the last one, and three more of the MTP depth.
    assert found["norms"] == (62 * 4 + 1 + 3, 62 * (2 * width + 1536 + 512) + 4 * width)


def test_the_defaults_decay_all_but_norms() -> None:
    for line in table("v3").values():
        expected = {"norms": (1.0, 0.0), "router biases": (None, None)}.get(line.group, (1.0, 0.1))
        assert (line.learning_rate_factor, line.weight_decay) == expected
    assert table("v3")["router biases"].note == "moved by the load"
    assert "router biases" not in table("v3", router_bias=False)


def test_factors_are_shown_multiplied_and_the_tied_head_where_it_is() -> None:
    changed = GroupsConfig(embedding=GroupConfig(0.0, 0.5), experts=GroupConfig(2.0, 3.0))
    found = table("tiny", changed, tie_embeddings=True)
    assert found["experts"].learning_rate_factor == 2.0
    assert found["experts"].weight_decay == pytest.approx(0.3)
    assert (found["embedding"].weight_decay, found["embedding"].note) == (0.05, "holds the tied head, frozen")
    assert (found["head"].tensors, found["head"].note) == (0, "in embedding, tied")


def test_a_router_bias_is_in_no_group() -> None:
    with pytest.raises(ValueError, match=r"layers\.3\.router\.bias: a router bias is in no optimizer group"):
        group_of("layers.3.router.bias")

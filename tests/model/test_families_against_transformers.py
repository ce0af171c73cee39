"""Random small models of every family that transformers has, exported, opened by it and compared in float64: logits,
every gradient, and every weight bit for bit there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, given, settings

from model.config import ModelConfig
from tests.model.compared import compare_with_transformers
from tests.model.drawn_configs import EXTENDED, PLAIN, Drawn, drawn, llama_model, v2_model, v3_model

FAMILIES = {"v3": v3_model, "v2": v2_model, "llama": llama_model}


def compare_drawn(family: str, examples: int, patch: pytest.MonkeyPatch) -> list[Drawn]:
    """Compare that many different models; the same ones every time."""
    seen: list[Drawn] = []
    found: list[tuple[float, float, int, int]] = []

    # Without shrinking: a model that fails is small, and a comparison takes tenths of a second.
    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(drawn(FAMILIES[family]))
    def each(model_and_length: Drawn) -> None:
        with TemporaryDirectory() as folder:
            found.append(compare_with_transformers(*model_and_length, Path(folder), patch))
        seen.append(model_and_length)

    each()
    logit, worst = (max(values[i] for values in found) for i in (0, 1))
    zeros, tensors = (sum(values[i] for values in found) for i in (2, 3))
    print(
        f"{family}: {len(found)} models, logits within {logit:.1e}, gradients within {worst:.1e}, "
        f"{zeros} of {tensors} gradients are 0 ({zeros / tensors:.1%})"
    )
    assert len({repr(each) for each in seen}) >= examples
    assert zeros < 0.1 * tensors
    return seen


def assert_both(seen: list[Drawn], conditions: dict[str, Callable[[ModelConfig], bool]]) -> None:
    """Every condition is met by one of the models, and not by another."""
    for name, condition in conditions.items():
        assert len({condition(config) for config, _ in seen}) == 2, name
    assert {length for _, length in seen} == {PLAIN, EXTENDED}


LATENT = {
    "query compression": lambda c: c.q_lora_rank > 0,
    "tied": lambda c: c.tie_embeddings,
    "values as wide as keys": lambda c: c.v_head_dim == c.qk_nope_head_dim,
}
ROUTED = {
    "groups": lambda c: c.num_expert_groups > 1,
    "masked groups": lambda c: c.groups_per_token < c.num_expert_groups,
    "one shared expert": lambda c: c.num_shared_experts == 1,
    "dense layers": lambda c: c.first_dense_layers > 0,
    "scaled": lambda c: c.routed_scaling_factor != 1,
}


def test_v3(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compare_drawn("v3", 14, monkeypatch)
    assert_both(seen, LATENT | ROUTED | {"renormalised": lambda c: c.renormalise})
    assert {config.mtp_depth for config, _ in seen} == {0, 1, 2}


def test_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_both(compare_drawn("v2", 12, monkeypatch), LATENT | ROUTED)


def test_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions: dict[str, Callable[[ModelConfig], bool]] = {
        "multi-head": lambda c: c.num_key_value_heads == c.num_heads,
        "several groups of heads": lambda c: 1 < c.num_key_value_heads < c.num_heads,
        "tied": lambda c: c.tie_embeddings,
    }
    seen = compare_drawn("llama", 12, monkeypatch)
    assert_both(seen, conditions)
    assert len({config.num_heads // config.num_key_value_heads for config, _ in seen}) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_drawn(family, 150, monkeypatch)

"""A model against another implementation of it, in float64: logits, every gradient, every weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.huggingface import ReleasedFolder, export_model
from model.names import canonical_shapes, canonical_tensors, is_router_bias, module_parts
from model.rope import Rotary
from model.transformer import Transformer
from tests.model.models import random_model, random_tokens
from tests.model.transformers_oracle import (
    built_by_hand,
    copy_into,
    find_mtp_layers,
    opened,
    opened_mtp,
    their_gradients,
    their_logits,
    their_tensors,
)

BOUND = 1e-9


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """Gradients by canonical name."""
    tensors = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for path, parts in module_parts(model).items():
        gradient = tensors[path].grad
        rows = torch.zeros_like(tensors[path]) if gradient is None else gradient
        rows = rows.reshape(-1, parts[0].columns)
        found |= {part.name: rows[part.first_row : part.last_row].view(part.shape) for part in parts}
    return found


def worst_gradient(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """max over tensors of |g - g'|max / |g|max, and how many tensors are 0; these must be 0 on both sides."""
    assert mine.keys() == theirs.keys()
    worst, zeros = 0.0, 0
    for name, gradient in mine.items():
        size = theirs[name].abs().max().item()
        if size == 0 or gradient.abs().max() == 0:
            assert torch.equal(gradient, theirs[name]), f"{name}: 0 on one side only"
            zeros += 1
            continue
        error = (gradient - theirs[name]).abs().max().item() / size
        assert error < BOUND, f"{name}: gradients differ by {error:.2e} of the largest"
        worst = max(worst, error)
    return worst, zeros


def my_logits(
    model: Transformer, tokens_BT: torch.Tensor, ahead_DBT: torch.Tensor | None, length: int
) -> list[torch.Tensor]:
    output = model(tokens_BT, ahead_DBT, rotary=Rotary(model.config, length))
    return [output.logits_BTV, *output.mtp_logits]


def assert_saved_again_bit_for_bit(
    folder: Path, config: ModelConfig, theirs: object, tensors: dict[str, torch.Tensor]
) -> None:
    """What transformers writes, read by us. It writes the main model only."""
    theirs.save_pretrained(folder)  # type: ignore[attr-defined]
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 0}))
    again = ReleasedFolder(folder)
    main = [name for name in canonical_shapes(config) if not name.startswith("mtp.")]
    assert again.names == main
    for name in main:
        value = again.read(name)
        # Router biases are FP32 for transformers whatever the weights are.
        assert value.dtype == tensors[name].dtype or is_router_bias(name)
        assert torch.equal(value.to(tensors[name].dtype), tensors[name]), name


def compare_with_transformers(
    config: ModelConfig, length: int, folder: Path, patch: pytest.MonkeyPatch
) -> tuple[float, float, int, int]:
    """Export a random model and open it with transformers: logits of every depth, every gradient, every weight loaded
    and saved again; logits also of a model built by hand.

    Returns the worst logit and gradient, the number of tensors whose gradient is 0, and of all tensors.
    """
    depth = config.mtp_depth
    model = random_model(config, torch.float64)
    tensors = canonical_tensors(model)
    export_model(folder / "out", config, tensors.__getitem__, length=length, dtype=torch.float64, shard_bytes=50_000)
    find_mtp_layers(config, patch)
    theirs = opened(folder / "out", torch.float64)
    their_mtp = opened_mtp(theirs) if depth else None
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == config.tie_embeddings
    for entry, value in their_tensors(config, theirs, their_mtp):
        assert torch.equal(value.double(), tensors[entry.canonical][entry.first_row : entry.last_row]), entry.name

    tokens_BT = random_tokens(config, 2, 24)
    span = 24 - depth
    main_BT = tokens_BT[:, :span]
    ahead_DBT = torch.stack([tokens_BT[:, k + 1 : k + 1 + span] for k in range(depth)]) if depth else None
    mine = my_logits(model, main_BT, ahead_DBT, length)
    their = their_logits(theirs, their_mtp, main_BT, ahead_DBT)
    assert all(logits.dtype == torch.float64 and logits.std() > 0.1 for logits in mine + their)
    worst_logit = max((a - b).abs().max().item() for a, b in zip(mine, their, strict=True))
    assert worst_logit < BOUND, f"logits differ by {worst_logit:.2e}"

    generator = torch.Generator().manual_seed(3)
    probes = [torch.randn(logits.shape, dtype=torch.float64, generator=generator) for logits in mine]
    for logits in (mine, their):
        sum((a * probe).sum() for a, probe in zip(logits, probes, strict=True)).backward()  # type: ignore[union-attr]
    named = gradients(model)
    worst, zeros = worst_gradient(named, their_gradients(config, theirs, their_mtp))

    by_hand = built_by_hand(config, length)
    copy_into(config, tensors, by_hand)
    with torch.no_grad():
        assert (their_logits(by_hand, None, main_BT, None)[0] - mine[0]).abs().max() < BOUND
    assert_saved_again_bit_for_bit(folder / "again", config, theirs, tensors)
    return worst_logit, worst, zeros, len(named)

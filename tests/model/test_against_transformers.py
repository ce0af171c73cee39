"""Exported folders, opened by transformers, give this model's logits; MTP included; gradients in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from model.config import ModelConfig
from model.huggingface import export_model
from model.names import canonical_tensors
from model.rope import Rotary
from model.transformer import Transformer
from tests.model.models import model_config, random_model, random_tokens


class LiftCasts(TorchFunctionMode):
    """transformers casts to float32 in norms, router, softmax and RoPE; here those casts go to float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            return args[0].double()
        if function in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def opened(folder: Path, dtype: torch.dtype):
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if dtype is torch.float64:
        # The frequencies were made in float32 at construction.
        rotary = model.model.rotary_emb
        with LiftCasts():
            rotary.inv_freq = type(rotary)(model.config).inv_freq
    return model


def export(folder: Path, config: ModelConfig, model: Transformer, length: int, dtype: torch.dtype) -> Path:
    export_model(folder, config, canonical_tensors(model).__getitem__, length=length, dtype=dtype, shard_bytes=100_000)
    return folder


VARIANTS = {
    "tiny": {},
    "no query compression, no dense layer": {"q_lora_rank": 0, "first_dense_layers": 0, "num_layers": 2},
    "one group, two shared": {"num_expert_groups": 1, "groups_per_token": 1, "num_shared_experts": 2, "num_layers": 2},
    "tied": {"tie_embeddings": True, "num_layers": 2},
    "uneven widths": {"v_head_dim": 12, "qk_nope_head_dim": 6, "num_heads": 3, "experts_per_token": 3, "num_layers": 2},
}


@pytest.mark.parametrize("length", [128, 1024], ids=["plain", "yarn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_in_float64(tmp_path: Path, variant: str, length: int) -> None:
    config = model_config("tiny", **VARIANTS[variant])
    model = random_model(config, torch.float64)
    theirs = opened(export(tmp_path / "out", config, model, length, torch.float64), torch.float64)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == config.tie_embeddings
    tokens_BT = random_tokens(config, 2, 40)
    logits_BTV = model(tokens_BT, rotary=Rotary(config, length)).logits_BTV
    with LiftCasts():
        their_logits_BTV = theirs(tokens_BT).logits
    assert their_logits_BTV.dtype == torch.float64
    assert (logits_BTV - their_logits_BTV).abs().max() < 1e-9
    assert logits_BTV.std() > 0.1

    probe_BTV = torch.randn(logits_BTV.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (logits_BTV * probe_BTV).sum().backward()
    with LiftCasts():
        (their_logits_BTV * probe_BTV).sum().backward()
    layer, their_layer = model.layers[-1], theirs.model.layers[-1]
    pairs = [
        (model.embed, theirs.model.embed_tokens.weight),
        (layer.attention.kv_a, their_layer.self_attn.kv_a_proj_with_mqa.weight),
        (layer.router.weight, their_layer.mlp.gate.weight),
        (layer.experts.gate_up, their_layer.mlp.experts.gate_up_proj),
        (layer.shared.down, their_layer.mlp.shared_experts.down_proj.weight),
        (model.layers[0].attn_norm, theirs.model.layers[0].input_layernorm.weight),
    ]
    for mine, their in pairs:
        assert (mine.grad - their.grad).abs().max() <= 1e-9 * their.grad.abs().max()


@pytest.mark.parametrize("length", [128, 1024], ids=["plain", "yarn"])
def test_logits_of_the_demo_model_in_float32(tmp_path: Path, length: int) -> None:
    config = model_config("demo")
    model = random_model(config, torch.float32)
    theirs = opened(export(tmp_path / "out", config, model, length, torch.float32), torch.float32)
    tokens_BT = random_tokens(config, 1, 100)
    with torch.no_grad():
        difference = model(tokens_BT, rotary=Rotary(config, length)).logits_BTV - theirs(tokens_BT).logits
    assert difference.abs().max() < 1e-4


def test_plain_and_yarn_differ() -> None:
    config = model_config("tiny")
    model = random_model(config, torch.float64)
    tokens_BT = random_tokens(config, 1, 40)
    plain, yarn = (model(tokens_BT, rotary=Rotary(config, length)).logits_BTV for length in (128, 129))
    assert (plain - yarn).abs().max() > 1e-3


@pytest.mark.parametrize(("depth", "tied"), [(1, False), (2, False), (2, True)])
def test_mtp_logits_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, tied: bool) -> None:
    """transformers' MTP module on the same folder, fed the main model's state after its final norm."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    config = model_config("tiny", mtp_depth=depth, tie_embeddings=tied)
    # transformers finds the MTP layer by V3's own number, 61.
    pattern = "|".join(rf"model\.layers\.{config.num_layers + k}\." for k in range(depth))
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [pattern])
    model = random_model(config, torch.float64)
    theirs = opened(export(tmp_path / "out", config, model, 128, torch.float64), torch.float64)
    their_mtp = MtpModel.from_pretrained(theirs).eval()

    tokens_BT = random_tokens(config, 2, 30)
    length = tokens_BT.shape[1] - depth
    main_BT = tokens_BT[:, :length]
    ahead_DBT = torch.stack([tokens_BT[:, k + 1 : k + 1 + length] for k in range(depth)])
    output = model(main_BT, ahead_DBT, rotary=Rotary(config, 128))
    positions = torch.arange(length)[None]
    with LiftCasts(), torch.no_grad():
        state = theirs.model(main_BT).last_hidden_state
        for k in range(depth):
            state = their_mtp.forward_layer(k, state, positions + 1, None, input_ids=ahead_DBT[k])
            assert (theirs.lm_head(state) - output.mtp_logits[k]).abs().max() < 1e-9

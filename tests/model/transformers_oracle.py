"""transformers' models as oracles: opened from a folder or built by hand, in float64 throughout, with every tensor and
gradient found by its released name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model.config import ModelConfig
from model.names import is_router_bias
from model.released import Entry, is_copy, released_entries


class LiftCasts(TorchFunctionMode):
    """transformers casts to float32 in norms, router, softmax and RoPE; here those casts go to float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            # transformers' V2 needs the even strides that a real cast makes.
            return args[0].double().contiguous()
        if function in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def opened(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model, with the plain (`eager`) attention and experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    return _lift_frequencies(model) if dtype is torch.float64 else model


def _lift_frequencies(model: Any) -> Any:
    """RoPE's frequencies were made in float32 at construction."""
    rotary = model.model.rotary_emb
    with LiftCasts():
        rotary.inv_freq = type(rotary)(model.config).inv_freq
    return model


def find_mtp_layers(config: ModelConfig, patch: Any) -> None:
    """Tell transformers, which looks for V3's own layer 61, where this model's MTP layers are. Before `opened`."""
    from transformers import DeepseekV3ForCausalLM

    layers = [rf"model\.layers\.{config.num_layers + k}\." for k in range(config.mtp_depth)]
    patch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", ["|".join(layers)] if layers else [])


def opened_mtp(theirs: Any) -> Any:
    """transformers' MTP modules of the folder that `theirs` was opened from."""
    from transformers.modeling_layers import MtpModel

    return MtpModel.from_pretrained(theirs).eval()


def their_logits(
    theirs: Any, their_mtp: Any, tokens_BT: torch.Tensor, ahead_DBT: torch.Tensor | None
) -> list[torch.Tensor]:
    """Logits of the main model and of each MTP depth, which is fed the state after the final norm."""
    with LiftCasts():
        state = theirs.model(tokens_BT).last_hidden_state
        found = [theirs.lm_head(state)]
        positions = torch.arange(tokens_BT.shape[1])[None]
        for k in range(0 if ahead_DBT is None else len(ahead_DBT)):
            state = their_mtp.forward_layer(k, state, positions + 1, None, input_ids=ahead_DBT[k])
            found.append(theirs.lm_head(state))
    return found


def built_by_hand(config: ModelConfig, length: int) -> Any:
    """A float64 transformers model from its own configuration class, without config.json or any of our exporter."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, LlamaConfig

    c = config
    values: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.intermediate_size,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": max(length, round(c.rope_scaling.factor * c.rope_scaling.original_length)),
        "rope_parameters": _rope_by_hand(config, length),
        "attn_implementation": "eager",
    }
    latent = {
        "q_lora_rank": c.q_lora_rank or None,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "num_key_value_heads": c.num_heads,
        "first_k_dense_replace": c.first_dense_layers,
        "moe_intermediate_size": c.moe_intermediate_size,
        "n_routed_experts": c.num_routed_experts,
        "n_shared_experts": c.num_shared_experts,
        "num_experts_per_tok": c.experts_per_token,
        "n_group": c.num_expert_groups,
        "topk_group": c.groups_per_token,
        "routed_scaling_factor": c.routed_scaling_factor,
    }
    if c.attention == "gqa":
        theirs = LlamaConfig(**values, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim)
    elif c.score_function == "softmax":
        theirs = DeepseekV2Config(**values, **latent, topk_method="group_limited_greedy")
    else:
        interleave = c.rope_interleaved
        theirs = DeepseekV3Config(**values, **latent, norm_topk_prob=c.renormalise, rope_interleave=interleave)
    theirs._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float64).eval()
    return _lift_frequencies(model)


def _rope_by_hand(config: ModelConfig, length: int) -> dict[str, Any]:
    scaling = config.rope_scaling
    if length <= scaling.original_length:
        return {"rope_type": "default", "rope_theta": config.rope_theta}

    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1

    # A llama has no factor on the softmax scale; the whole head is turned, so the root of it goes with cos and sin.
    all_dim = 0.0 if config.attention == "gqa" else scaling.mscale_all_dim
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale_all_dim": all_dim,
        "attention_factor": m(scaling.mscale) / m(all_dim),
    }


def place(config: ModelConfig, entry: Entry) -> tuple[bool, str, tuple[int | slice, ...]]:
    """(whether it is in the MTP model, parameter or buffer there, index into it) of a released tensor: transformers
    stacks the experts, gate rows before up rows.
    """
    name, mtp = entry.name, False
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if found and int(found[1]) >= config.num_layers:
        mtp, rest = True, found[2]
        rest = rest.replace("shared_head.norm.", "post_norm.")
        own = rest.split(".")[0] in ("enorm", "hnorm", "eh_proj", "post_norm")
        name = f"layers.{int(found[1]) - config.num_layers}.{rest if own else f'mtp_block.{rest}'}"
    stacked = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if stacked is None:
        return mtp, name, (slice(None),)
    f = config.moe_intermediate_size
    rows = {"gate": slice(0, f), "up": slice(f, 2 * f), "down": slice(None)}[stacked[3]]
    return mtp, f"{stacked[1]}.{'down' if stacked[3] == 'down' else 'gate_up'}_proj", (int(stacked[2]), rows)


def their_tensors(
    config: ModelConfig, theirs: Any, their_mtp: Any = None, gradients: bool = False
) -> Iterator[tuple[Entry, torch.Tensor]]:
    """(entry, tensor or its gradient) of every released tensor but the copies; a gradient that is not there is 0.

    Raises AssertionError when a parameter of theirs has none of our names.
    """
    models = {False: theirs, True: their_mtp}
    named = {
        key: dict(model.named_parameters()) | dict(model.named_buffers())
        for key, model in models.items()
        if model is not None
    }
    seen: set[int] = set()
    for entry in released_entries(config):
        mtp, name, index = place(config, entry)
        if is_copy(entry) or (gradients and is_router_bias(entry.canonical)) or mtp not in named:
            continue
        tensor = named[mtp][name]
        seen.add(id(tensor))
        if gradients:
            tensor = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        yield entry, tensor.detach()[index]
    parameters = [(name, p) for model in models.values() if model is not None for name, p in model.named_parameters()]
    assert not [name for name, parameter in parameters if id(parameter) not in seen]


def copy_into(config: ModelConfig, tensors: dict[str, torch.Tensor], theirs: nn.Module) -> None:
    """Our canonical tensors into a model built by hand."""
    for entry, target in their_tensors(config, theirs):
        target.copy_(tensors[entry.canonical][entry.first_row : entry.last_row])


def their_gradients(config: ModelConfig, theirs: Any, their_mtp: Any = None) -> dict[str, torch.Tensor]:
    """Gradients by our canonical names."""
    found: dict[str, list[torch.Tensor]] = {}
    for entry, gradient in their_tensors(config, theirs, their_mtp, gradients=True):
        found.setdefault(entry.canonical, []).append(gradient)
    return {name: torch.cat(pieces) for name, pieces in found.items()}

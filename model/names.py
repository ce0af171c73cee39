"""Canonical names: the model's tensors free of layout, and which of them each parameter of a module holds.

A module's attribute path is the canonical name, except that a rank's experts are stacked: `experts.gate_up` [E_local,
2f, d] holds `experts.{first}.gate_up`, `experts.{first + 1}.gate_up`, ... in row order. `router.bias` is a buffer,
and canonical too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import nn

from model.config import ModelConfig
from model.experts import Experts
from parallel.optimizer.contract import Part

Shapes = dict[str, tuple[int, ...]]


def _attention_shapes(config: ModelConfig) -> Shapes:
    d, heads = config.hidden_size, config.num_heads
    queries, output = heads * config.qk_head_dim, heads * config.value_head_dim
    if config.attention == "gqa":
        width = config.num_key_value_heads * config.head_dim
        found: Shapes = {"q": (queries, d), "k": (width, d), "v": (width, d)}
    else:
        Q, L = config.q_lora_rank, config.kv_lora_rank
        found = {"q_a": (Q, d), "q_norm": (Q,), "q_b": (queries, Q)} if Q else {"q": (queries, d)}
        found |= {
            "kv_a": (L + config.qk_rope_head_dim, d),
            "kv_norm": (L,),
            "kv_b": (heads * (config.qk_nope_head_dim + config.v_head_dim), L),
        }
    return {f"attention.{name}": shape for name, shape in (found | {"o": (d, output)}).items()}


def layer_shapes(config: ModelConfig, moe: bool) -> Shapes:
    """Canonical tensors of one layer, without its prefix."""
    d, f = config.hidden_size, config.moe_intermediate_size
    shapes: Shapes = {"attn_norm": (d,)} | _attention_shapes(config) | {"mlp_norm": (d,)}
    if not moe:
        return shapes | {"mlp.gate_up": (2 * config.intermediate_size, d), "mlp.down": (d, config.intermediate_size)}
    experts, shared = config.num_routed_experts, config.num_shared_experts * f
    shapes |= {"router.weight": (experts, d)}
    shapes |= {"router.bias": (experts,)} if config.router_bias else {}
    shapes |= {"shared.gate_up": (2 * shared, d), "shared.down": (d, shared)}
    for expert in range(experts):
        shapes |= {f"experts.{expert}.gate_up": (2 * f, d), f"experts.{expert}.down": (d, f)}
    return shapes


def canonical_shapes(config: ModelConfig) -> Shapes:
    """Every canonical tensor of the model, router biases and MTP included, in the model's order. A head tied to the
    embedding is `embed`.
    """
    V, d = config.vocab_size, config.hidden_size
    shapes: Shapes = {"embed": (V, d)}
    for i in range(config.num_layers):
        layer = layer_shapes(config, config.is_moe(i))
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {"norm": (d,)} if config.tie_embeddings else {"norm": (d,), "head": (V, d)}
    for k in range(config.mtp_depth):
        shapes |= {f"mtp.{k}.embed_norm": (d,), f"mtp.{k}.hidden_norm": (d,), f"mtp.{k}.proj": (d, 2 * d)}
        shapes |= {f"mtp.{k}.layer.{name}": shape for name, shape in layer_shapes(config, config.has_experts).items()}
        shapes |= {f"mtp.{k}.norm": (d,)}
    return shapes


def moe_layers(config: ModelConfig) -> dict[int, str]:
    """Number -> canonical prefix of every layer with experts; MTP layers are numbered on from the main model's, as in
    the released weights.
    """
    if not config.has_experts:
        return {}
    main = {i: f"layers.{i}" for i in range(config.num_layers) if config.is_moe(i)}
    return main | {config.num_layers + k: f"mtp.{k}.layer" for k in range(config.mtp_depth)}


def is_router_bias(name: str) -> bool:
    """True for the selection biases: state of the run, but neither trained by gradients nor held by the optimizer."""
    return name.endswith("router.bias")


def is_norm(name: str) -> bool:
    """True for RMSNorm weights."""
    return name.endswith("norm")


def parts_of(path: str, shape: tuple[int, ...], prefix: str, first_expert: int) -> tuple[Part, ...]:
    """The canonical parts of one tensor of a module; `first_expert` only matters to stacked experts."""
    parent, _, leaf = path.rpartition(".")
    if parent == "experts" or parent.endswith(".experts"):
        local, rows, columns = shape
        return tuple(
            Part(f"{prefix}{parent}.{first_expert + e}.{leaf}", e * rows, (e + 1) * rows, columns, (rows, columns))
            for e in range(local)
        )
    return (Part(prefix + path, 0, shape[0], prod(shape[1:]), tuple(shape)),)


def module_parts(module: nn.Module, prefix: str = "", buffers: bool = False) -> dict[str, tuple[Part, ...]]:
    """Attribute path of each parameter of `module` -> its canonical parts in row order.

    prefix: the module's own place, with its dot (`layers.3.`, `mtp.0.`, or nothing for the whole model). buffers: the
    router biases as well. Works on meta tensors.
    """
    first_expert = {path: child.first for path, child in module.named_modules() if isinstance(child, Experts)}
    tensors: Iterator[tuple[str, torch.Tensor]] = iter(module.named_parameters())
    found = {path: tensor.shape for path, tensor in tensors}
    if buffers:
        found |= {path: tensor.shape for path, tensor in module.named_buffers()}
    return {
        path: parts_of(path, tuple(shape), prefix, first_expert.get(path.rpartition(".")[0], 0))
        for path, shape in found.items()
    }


@torch.no_grad()
def load_canonical(module: nn.Module, read: Callable[[str], torch.Tensor], prefix: str = "") -> None:
    """Fill every parameter and router bias of `module` from `read(canonical name)`, cast to each one's dtype.

    Raises ValueError naming the tensor when a shape differs.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for path, parts in module_parts(module, prefix, buffers=True).items():
        rows = tensors[path].view(-1, parts[0].columns)
        for part in parts:
            value = read(part.name)
            if tuple(value.shape) != part.shape:
                raise ValueError(f"{part.name}: shape {tuple(value.shape)}, expected {part.shape}")
            rows[part.first_row : part.last_row].copy_(value.reshape(-1, part.columns))


def canonical_tensors(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Views of `module`'s parameters and router biases by canonical name, in their canonical shapes."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    views: dict[str, torch.Tensor] = {}
    for path, parts in module_parts(module, prefix, buffers=True).items():
        rows = tensors[path].detach().view(-1, parts[0].columns)
        views |= {part.name: rows[part.first_row : part.last_row].view(part.shape) for part in parts}
    return views

"""The released names: which rows of which canonical tensor each tensor of a Hugging Face folder holds, in order.

One set of names serves every family: latent or grouped-query attention, with or without experts, router bias and MTP
layers. V2's and DeepSeekMoE's shared experts are one MLP in the folder, as they are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from model.names import is_norm, is_router_bias, layer_shapes

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_b": "self_attn.q_b_proj",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b": "self_attn.kv_b_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "router.weight": "mlp.gate",
    "router.bias": "mlp.gate.e_score_correction_bias",
}
SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Entry:
    """Released tensor `name` is rows [first_row, last_row) of canonical tensor `canonical`; `shape` is the released
    shape. linear: a matrix that V3's released folder holds in FP8 (V3 section 3.3: not embedding, head, router, norms
    and MTP projection).
    """

    name: str
    canonical: str
    first_row: int
    last_row: int
    shape: tuple[int, ...]
    linear: bool = False

    @property
    def scale_name(self) -> str:
        """The FP8 matrix's scales."""
        return self.name + SCALE_SUFFIX

    @property
    def scale_shape(self) -> tuple[int, int]:
        """One scale per block of 128 x 128, edges included."""
        return -(-self.shape[0] // 128), -(-self.shape[1] // 128)


def _layer_entries(config: ModelConfig, moe: bool, released: str, canonical: str) -> list[Entry]:
    entries = []
    for name, shape in layer_shapes(config, moe).items():
        rows = shape[0]
        if name in LAYER_NAMES:
            suffix = "" if is_router_bias(name) else ".weight"
            linear = name.startswith("attention.") and not is_norm(name)
            entries.append(Entry(f"{released}{LAYER_NAMES[name]}{suffix}", canonical + name, 0, rows, shape, linear))
            continue
        owner, _, leaf = name.rpartition(".")
        place = {"mlp": "mlp", "shared": "mlp.shared_experts"}.get(owner, f"mlp.{owner}")
        if leaf == "down":
            entries.append(Entry(f"{released}{place}.down_proj.weight", canonical + name, 0, rows, shape, True))
        else:
            half = (rows // 2, shape[1])
            entries.append(Entry(f"{released}{place}.gate_proj.weight", canonical + name, 0, rows // 2, half, True))
            entries.append(Entry(f"{released}{place}.up_proj.weight", canonical + name, rows // 2, rows, half, True))
    return entries


def released_entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of the folder in order; MTP depth k is layer `num_layers + k`, with its copies of embedding and
    head. A head tied to the embedding has no tensor of its own.
    """
    V, d = config.vocab_size, config.hidden_size

    def whole(name: str, canonical: str, *shape: int) -> Entry:
        return Entry(f"model.{name}.weight" if name != "lm_head" else "lm_head.weight", canonical, 0, shape[0], shape)

    entries = [whole("embed_tokens", "embed", V, d)]
    for i in range(config.num_layers):
        entries += _layer_entries(config, config.is_moe(i), f"model.layers.{i}.", f"layers.{i}.")
    head = "embed" if config.tie_embeddings else "head"
    entries.append(whole("norm", "norm", d))
    if not config.tie_embeddings:
        entries.append(whole("lm_head", head, V, d))
    for k in range(config.mtp_depth):
        place = f"layers.{config.num_layers + k}"
        entries += [
            whole(f"{place}.embed_tokens", "embed", V, d),
            whole(f"{place}.enorm", f"mtp.{k}.embed_norm", d),
            whole(f"{place}.hnorm", f"mtp.{k}.hidden_norm", d),
            whole(f"{place}.eh_proj", f"mtp.{k}.proj", d, 2 * d),
        ]
        entries += _layer_entries(config, config.has_experts, f"model.{place}.", f"mtp.{k}.layer.")
        entries += [
            whole(f"{place}.shared_head.norm", f"mtp.{k}.norm", d),
            whole(f"{place}.shared_head.head", head, V, d),
        ]
    return entries


def is_copy(entry: Entry) -> bool:
    """True for the MTP layers' copies of embedding and head: written for readers that expect them, not needed to
    read.
    """
    return entry.name.endswith((".embed_tokens.weight", ".shared_head.head.weight")) and ".layers." in entry.name

"""What a rank holds all step long: weights, gradient accumulators, and its share of masters and moments.

Follows `model/partition.py` (who holds what), `parallel/optimizer/bucket.py` (buffers) and `Ops.weight` (FP8 copies);
a test compares it with real buckets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from kernels.tiles import TILE, tile_count
from launch.ledger.choices import Choices
from launch.ledger.layout import Contents
from model.config import ModelConfig
from model.names import is_router_bias, layer_shapes
from model.precision import in_fp8
from parallel.optimizer.assignment import assign_rows, canonical_key
from parallel.optimizer.bucket import PIECE_UNIT
from parallel.optimizer.zero1 import GATHERS_IN_FLIGHT
from parallel.schedule.actions import Table

BF16, FP32 = 2, 4
UNIT_COLUMNS = 1024  # with owners=tiles
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Tensors of one gradient bucket on a rank, by canonical name, and how many ranks share them."""

    name: str
    tensors: tuple[tuple[str, Shape], ...]
    owners: int

    @property
    def elements(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors)

    @property
    def fp8_elements(self) -> int:
        """Of weights whose products take FP8."""
        return sum(prod(shape) for name, shape in self.tensors if in_fp8(name))

    @property
    def fp8_scales(self) -> int:
        return sum(prod(tile_count(n, TILE) for n in shape) for name, shape in self.tensors if in_fp8(name))

    def piece(self, widest: int | None = None) -> int:
        """Elements that each owner holds, padding included. widest: columns of a unit at most (None: whole rows)."""
        # Layers that are alike share one computation.
        alike = tuple((re.sub(r"^(layers|mtp)\.\d+\.", r"\1.0.", name), shape) for name, shape in self.tensors)
        return _piece(alike, self.owners, widest)


def _place(name: str) -> tuple[object, ...]:
    """Order within a bucket: that of parameters, a rank's experts being one parameter, stacked."""
    stacked = re.sub(r"experts\.\d+\.", "experts.", name)
    return *canonical_key(stacked), canonical_key(name)


@lru_cache(4096)
def _piece(tensors: tuple[tuple[str, Shape], ...], owners: int, widest: int | None) -> int:
    ordered = sorted(tensors, key=lambda tensor: _place(tensor[0]))
    whole = [(shape[0], prod(shape[1:])) for _, shape in ordered]
    shapes = [(rows, min(widest or c, c - at)) for rows, c in whole for at in range(0, c, widest or c)]
    loads = [sum((r.last - r.first) * shapes[r.index][1] for r in owned) for owned in assign_rows(shapes, owners)]
    return -(-max(loads) // PIECE_UNIT) * PIECE_UNIT


def _layer_buckets(config: ModelConfig, name: str, moe: bool, expert: int, dense: int, routed: int) -> list[Bucket]:
    shapes = {n: s for n, s in layer_shapes(config, moe).items() if not is_router_bias(n)}
    local = {str(e) for e in range(config.num_routed_experts // expert)}
    held = {n: s for n, s in shapes.items() if not n.startswith("experts.")}
    experts = {n: s for n, s in shapes.items() if n.startswith("experts.") and n.split(".")[1] in local}
    found = [Bucket(f"{name}.dense", tuple((f"{name}.{n}", s) for n, s in held.items()), dense)]
    if experts:
        found.append(Bucket(f"{name}.experts", tuple((f"{name}.{n}", s) for n, s in experts.items()), routed))
    return found


def rank_buckets(
    config: ModelConfig, contents: Sequence[Contents], table: Table, rank: int, expert: int, data: int
) -> list[Bucket]:
    """The gradient buckets of a pipeline rank, in the order in which they are published."""
    V, d = config.vocab_size, config.hidden_size
    held = [{stage for _, stage in table.stages_of(r)} for r in range(table.ranks)]
    embeds = {s for s, c in enumerate(contents) if c.embed or c.mtp or (c.head and config.tie_embeddings)}

    def replicas(stages: set[int]) -> int:
        return data * sum(bool(held[r] & stages) for r in range(table.ranks))

    found: list[Bucket] = []
    for stage in sorted(held[rank]):
        at, copies = contents[stage], replicas({stage})
        for i in range(at.first, at.last):
            moe = config.is_moe(i)
            found += _layer_buckets(config, f"layers.{i}", moe, expert, copies * expert, copies)
        if at.head:
            output: list[tuple[str, Shape]] = [("norm", (d,))]
            output += [] if config.tie_embeddings else [("head", (V, d))]
            found.append(Bucket("output", tuple(output), copies * expert))
        for k in range(at.mtp):
            join: list[tuple[str, Shape]] = [(f"mtp.{k}.embed_norm", (d,)), (f"mtp.{k}.hidden_norm", (d,))]
            join += [(f"mtp.{k}.proj", (d, 2 * d)), (f"mtp.{k}.norm", (d,))]
            layer = _layer_buckets(config, f"mtp.{k}.layer", config.has_experts, expert, copies * expert, copies)
            found.append(Bucket(f"mtp.{k}.dense", (*layer[0].tensors, *join), copies * expert))
            found += [Bucket(f"mtp.{k}.experts", experts.tensors, copies) for experts in layer[1:]]
    if held[rank] & embeds:
        found.append(Bucket("embed", (("embed", (V, d)),), replicas(embeds) * expert))
    return sorted(found, key=lambda bucket: canonical_key(bucket.name), reverse=True)


def _widest(choices: Choices) -> int | None:
    return UNIT_COLUMNS if choices.owners == "tiles" else None


def held_state(buckets: Sequence[Bucket], choices: Choices) -> dict[str, int]:
    """Bytes held during the whole step, by kind."""
    elements = sum(b.elements for b in buckets)
    fp8 = sum(b.fp8_elements for b in buckets)
    scales = FP32 * sum(b.fp8_scales for b in buckets)
    piece = {b.name: b.piece(_widest(choices)) for b in buckets}
    pieces = sum(piece.values())
    size = BF16 if choices.gradients == "bfloat16" else FP32
    whole = sum(piece[b.name] * b.owners for b in buckets)
    reduced = sum(piece[b.name] for b in buckets if b.owners > 1)
    found = {
        "BF16 weights": BF16 * (elements - fp8 if choices.fp8 and choices.weights == "fp8" else elements),
        "FP8 weights": fp8 + scales if choices.fp8 and choices.weights != "bf16" else 0,
        "gradient accumulators": size * (whole + reduced),
        "FP32 masters": FP32 * pieces,
        "BF16 moments": 2 * BF16 * pieces,
    }
    if choices.shard == "gradients":
        # The shards, and one whole bucket on its way into them.
        found["gradient accumulators"] = size * (pieces + max(piece[b.name] * b.owners for b in buckets))
    return found


def optimizer_transient(buckets: Sequence[Bucket], choices: Choices) -> int:
    """Bytes of the all-gathers in flight when weights are published: own rows and all rows, rounded to BF16."""
    sizes = [BF16 * b.piece(_widest(choices)) * ((b.owners if b.owners > 1 else 0) + 1) for b in buckets]
    flying = GATHERS_IN_FLIGHT + 1
    return max(sum(sizes[i : i + flying]) for i in range(len(sizes)))

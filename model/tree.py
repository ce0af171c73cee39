"""A model as a tree of components, equal layers and experts folded: shapes, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from model.config import ModelConfig
from model.count import matrix_flops, score_flops
from model.names import layer_shapes
from model.precision import precision_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A component, or (`shape`) a tensor of it. copies: of it in its parent. parameters: of all copies everywhere,
    router biases included. flops: forward and backward per token, likewise. precision: of a tensor, see
    `model.precision`. layers: [first, last) main layers that it stands for.
    """

    name: str
    parameters: int
    flops: float
    copies: int = 1
    shape: Shape | None = None
    precision: str = ""
    layers: tuple[int, int] | None = None
    children: tuple[Node, ...] = ()

    @property
    def title(self) -> str:
        """`experts x256`."""
        return self.name if self.copies == 1 else f"{self.name} x{self.copies}"


def _over(name: str, children: Iterable[Node], copies: int = 1, layers: tuple[int, int] | None = None) -> Node:
    children = tuple(children)
    parameters, flops = sum(c.parameters for c in children), sum(c.flops for c in children)
    return Node(name, parameters, flops, copies, layers=layers, children=children)


def _tensor(name: str, shape: Shape, times: int, flops: float) -> Node:
    return Node(name.rpartition(".")[2], prod(shape) * times, flops * times, 1, shape, precision_of(name))


def _run(first: int, last: int) -> str:
    return str(first) if last - first == 1 else f"{first}-{last - 1}"


def _layer(config: ModelConfig, moe: bool, times: int, length: int, causal: bool) -> list[Node]:
    """The components of one layer, counted `times`."""
    found: dict[str, list[Node]] = {}
    for name, shape in layer_shapes(config, moe).items():
        component, _, rest = name.partition(".")
        copies = times
        if component == "experts":
            if not rest.startswith("0."):
                continue
            copies = times * config.num_routed_experts
        found.setdefault(component, []).append(_tensor(name, shape, copies, matrix_flops(config, name, shape)))
    found["attention"].append(Node("scores", 0, score_flops(config, length, causal) * times))
    experts = config.num_routed_experts
    return [
        members[0]
        if component.endswith("norm")
        else _over(component, members, experts if component == "experts" else 1)
        for component, members in found.items()
    ]


def model_tree(config: ModelConfig, length: int, causal: bool = True) -> Node:
    """The whole model, MTP included, in the order of its tensors; the flops of the parts add up to
    `training_flops_per_token` with MTP.
    """
    V, d, n = config.vocab_size, config.hidden_size, config.num_layers
    head = 6.0 * V * d
    children = [_tensor("embed", (V, d), 1, 0.0)]
    for first, last, moe in ((0, config.dense_layers, False), (config.dense_layers, n, True)):
        if last > first:
            layer = _layer(config, moe, last - first, length, causal)
            children.append(_over(f"layers.{_run(first, last)}", layer, last - first, (first, last)))
    children.append(_tensor("norm", (d,), 1, 0.0))
    tied = Node("head, which is embed", 0, head)
    children.append(tied if config.tie_embeddings else _tensor("head", (V, d), 1, head))
    D = config.mtp_depth
    if D:
        norms = [_tensor(name, (d,), D, 0.0) for name in ("embed_norm", "hidden_norm", "norm")]
        projection = _tensor("proj", (d, 2 * d), D, 12.0 * d * d)
        layer_node = _over("layer", _layer(config, config.has_experts, D, length, causal))
        shared = Node("embed and head of the main model", 0, head * D)
        children.append(_over(f"mtp.{_run(0, D)}", [*norms[:2], projection, layer_node, norms[2], shared], D))
    return _over(config.name, children)

"""What one rank holds: its stages' modules, and for every parameter its canonical parts, replicas, bucket and uses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from model.config import ModelConfig
from model.count import part_flops
from model.groups import group_of
from model.layer import TransformerLayer
from model.mtp import MultiTokenPrediction
from model.names import module_parts, parts_of
from model.ops import Ops
from model.segments import SegmentedLayer
from model.stage import Depth, Output, TransformerStage
from parallel.balance import balanced_split
from parallel.expert.contract import Dispatcher
from parallel.layout import Layout, check, edges, make_layout, parse
from parallel.optimizer.contract import ParameterSpec
from parallel.schedule.actions import Table
from parallel.topology import Topology


def stage_layout(config: ModelConfig, table: Table, text: str) -> Layout:
    """The stages that `text` says, or where it is empty the split whose largest rank load is smallest, by FLOPs at the
    length before any extension (a run keeps one layout).

    Raises ValueError, one line, for a text that is not a layout or does not fit model and table.
    """
    if not text.strip():
        flops = part_flops(config, config.rope_scaling.original_length)
        sizes = balanced_split(flops.layers(config), flops.embedding, flops.output(config), table.rank_of)
        return make_layout(sizes, config.mtp_depth)
    try:
        layout = parse(text)
        check(layout, table.stages, config.num_layers, config.mtp_depth)
    except ValueError as error:
        raise ValueError(f"parallel.{error}") from None
    return layout


class RankModel(nn.Module):
    """The modules of one rank. A component that serves two stages (embedding on first and last) is one tensor.

    device: where the parameters live. They are laid out on `meta`, which takes no memory, and with `meta` left there:
    `specs` then says what the rank holds, and `materialise` makes room for it. Values come from the optimizer's
    `initialize`.

    Attributes: embed, head, norm (or None; a tied head is `embed` itself), layers {index: TransformerLayer}, mtp
    [MultiTokenPrediction], split ([first, last) layers of each stage). Raises ValueError when layout, table and model
    do not fit.
    """

    embed: nn.Parameter | None
    head: nn.Parameter | None
    norm: nn.Parameter | None

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        table: Table,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.topology, self.table, self.dtype = config, topology, table, dtype
        check(layout, table.stages, config.num_layers, config.mtp_depth)
        self.layout, self.split = layout, edges(layout)
        if config.num_routed_experts % topology.expert or (not config.has_experts and topology.expert > 1):
            raise ValueError(
                f"parallel.expert: {topology.expert} does not divide the model's {config.num_routed_experts} experts"
            )
        local = config.num_routed_experts // topology.expert
        experts = (topology.expert_rank * local, (topology.expert_rank + 1) * local)
        self._held = [self._components(rank) for rank in range(table.ranks)]
        mine = self._held[topology.pipeline_rank]
        V, d = config.vocab_size, config.hidden_size

        def parameter(held: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) if held else None

        self.embed = parameter("embed" in mine, V, d)
        tied = config.tie_embeddings and "norm" in mine
        self.head = self.embed if tied else parameter("head" in mine, V, d)
        self.norm = parameter("norm" in mine, d)
        self.layers = nn.ModuleDict(
            {
                str(i): TransformerLayer(config, config.is_moe(i), experts, dtype, device="meta")
                for i in range(config.num_layers)
                if f"layers.{i}" in mine
            }
        )
        depth = config.mtp_depth if "norm" in mine else 0
        self.mtp = nn.ModuleList(MultiTokenPrediction(config, experts, dtype, device="meta") for _ in range(depth))
        self.segmented: dict[str, SegmentedLayer] = {}
        self.stages: dict[tuple[int, int], TransformerStage] = {}
        if torch.device(device).type != "meta":
            self.materialise(device)

    @torch.no_grad()
    def materialise(self, device: torch.device | str) -> None:
        """Give this rank's parameters memory on `device`, uninitialised, and set its router biases to 0. The parameters
        are new objects: `specs` and `build_stages` come after it."""
        tied = self.head is not None and self.head is self.embed
        self.to_empty(device=device)
        if tied:
            self.head = self.embed  # to_empty makes two tensors of it
        for bias in self.buffers():
            bias.zero_()

    # Placement --------------------------------------------------------------------------------------------------------

    def _stage_components(self, stage: int) -> list[tuple[str, int]]:
        """(component, weight-gradient contributions per chunk) of one stage."""
        at, D = self.layout[stage], self.config.mtp_depth
        found = [(f"layers.{i}", 1) for i in range(*self.split[stage])]
        if at.embedding:
            found.append(("embed", 1))
        if at.output:
            head = "embed" if self.config.tie_embeddings else "head"
            found += [(head, 1 + D), ("norm", 1)] + [(f"mtp.{k}", 1) for k in range(D)]
            if D:
                found.append(("embed", D))
        return found

    def _components(self, pipeline_rank: int) -> set[str]:
        return {c for _, s in self.table.stages_of(pipeline_rank) for c, _ in self._stage_components(s)}

    def _uses(self, component: str) -> dict[int, int]:
        uses: dict[int, int] = {}
        for direction, stage in self.table.stages_of(self.topology.pipeline_rank):
            for name, count in self._stage_components(stage):
                if name == component:
                    uses[direction] = uses.get(direction, 0) + count
        return uses

    def replicas(self, component: str, expert_rank: int | None = None) -> tuple[int, ...]:
        """Global ranks that hold `component`, or its experts of `expert_rank`."""
        holders = [rank for rank, held in enumerate(self._held) if component in held]
        held = self.topology.grid[:, holders]
        if expert_rank is not None:
            held = held[:, :, expert_rank]
        return tuple(sorted(held.flatten().tolist()))

    def replica_groups(self) -> Iterator[tuple[int, ...]]:
        """Every replica group of the world, the same on every rank."""
        for rank in range(self.table.ranks):
            for component in self._held[rank]:
                yield self.replicas(component)
                if component.startswith(("layers.", "mtp.")):
                    for expert_rank in range(self.topology.expert):
                        yield self.replicas(component, expert_rank)

    def _modules_by_component(self) -> Iterator[tuple[str, nn.Module]]:
        for index, layer in self.layers.items():
            yield f"layers.{index}", layer
        for k, depth in enumerate(self.mtp):
            yield f"mtp.{k}", depth

    def specs(self) -> list[ParameterSpec]:
        """One per parameter of this rank, in canonical order."""
        found: list[ParameterSpec] = []
        tied = self.config.tie_embeddings
        for name, parameter in (("embed", self.embed), ("norm", self.norm), ("head", None if tied else self.head)):
            if parameter is not None:
                parts = parts_of(name, tuple(parameter.shape), "", 0)
                bucket = "embed" if name == "embed" else "output"
                found.append(
                    ParameterSpec(parameter, parts, self.replicas(name), bucket, self._uses(name), group_of(name))
                )
        for component, module in self._modules_by_component():
            parameters = dict(module.named_parameters())
            for path, parts in module_parts(module, f"{component}.").items():
                routed = path.startswith("experts.") or ".experts." in path
                replicas = self.replicas(component, self.topology.expert_rank if routed else None)
                bucket = f"{component}.{'experts' if routed else 'dense'}"
                group = group_of(parts[0].name)
                found.append(ParameterSpec(parameters[path], parts, replicas, bucket, self._uses(component), group))
        return found

    def router_biases(self) -> dict[str, torch.Tensor]:
        """Canonical name -> the bias buffer, for every MoE layer of this rank (none in a model without biases)."""
        return {
            f"{segmented.name}.router.bias": segmented.layer.router.bias
            for segmented in self.segmented.values()
            if segmented.layer.moe and segmented.layer.router.bias is not None
        }

    # Stages -----------------------------------------------------------------------------------------------------------

    def build_stages(self, ops: Ops, dispatcher: Dispatcher) -> dict[tuple[int, int], TransformerStage]:
        """The pipeline stages of this rank over its modules."""

        def segmented(name: str, layer: TransformerLayer) -> SegmentedLayer:
            if name not in self.segmented:
                self.segmented[name] = SegmentedLayer(layer, name, ops, dispatcher)
            return self.segmented[name]

        for direction, stage in self.table.stages_of(self.topology.pipeline_rank):
            layers = [segmented(f"layers.{i}", self.layers[str(i)]) for i in range(*self.split[stage])]  # type: ignore[arg-type]
            output = None
            if self.layout[stage].output:
                assert self.norm is not None and self.head is not None
                depths = [
                    Depth(depth, segmented(f"mtp.{k}.layer", depth.layer))  # type: ignore[arg-type]
                    for k, depth in enumerate(self.mtp)
                ]
                output = Output(self.norm, self.head, depths)
            key = (direction, stage)
            self.stages[key] = TransformerStage(
                key, ops, layers, self.embed, self.layout[stage].embedding, output, self.config.hidden_size
            )
        return self.stages

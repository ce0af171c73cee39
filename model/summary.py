"""`python -m model summary model=NAME|all ...`: what a model is made of, what it costs, and where its parts live."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from model.config import ModelConfig
from model.count import (
    cache_bytes_per_token,
    cache_ratio,
    cache_values_per_token,
    count_parameters,
    recompute_flops_per_token,
    training_flops_per_token,
)
from model.errors import ModelError
from model.named import model_names, named_config
from model.placement import Placement, place
from model.rope import Rotary
from model.tree import Node, model_tree
from parallel.arguments import pairs, whole_number

USAGE = (
    "usage: python -m model summary model=NAME|all [model.KEY=VALUE ...] [length=N] [style=terminal|markdown] "
    "[pipeline=N [expert=N] [ranks=N] [schedule=dualpipe] [layout=E...L]]"
)
PLACES = ("pipeline", "expert", "ranks", "schedule", "layout")
OPTIONS = ("model", "length", "style", *PLACES)
STYLES = ("terminal", "markdown")
REFERENCE = "llm_67b"  # whose grouped-query cache V2 measures its own by (V2 section 2.1.4)
BF16 = 2
WIDTH = 150


@dataclass(frozen=True)
class Grid:
    """A table; columns named in `text` are text, the others figures."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text: tuple[str, ...]

    def markdown(self) -> str:
        align = ["---" if column in self.text else "---:" for column in self.columns]
        lines = [self.columns, tuple(align), *self.rows]
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> RichTable:
        shown = RichTable(title=escape(self.title), title_justify="left")
        for column in self.columns:
            shown.add_column(escape(column), justify="left" if column in self.text else "right", overflow="fold")
        for row in self.rows:
            shown.add_row(*map(escape, row))
        return shown


def run(arguments: Sequence[str]) -> None:
    """Prints the tables, then one JSON object. ModelError: what is wrong."""
    try:
        grids, figures, style = _made(arguments)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if style == "markdown":
        print("\n\n".join(grid.markdown() for grid in grids))
    else:
        # A narrower terminal breaks lines itself: within a column they would break inside names and numbers.
        console = Console(highlight=False, width=max(WIDTH, Console().width) if sys.stdout.isatty() else WIDTH)
        for grid in grids:
            console.print(grid.rich())
    print(json.dumps(figures))


def _made(arguments: Sequence[str]) -> tuple[list[Grid], dict[str, Any], str]:
    changed = [argument.partition("=")[0] for argument in arguments if argument.startswith("model.")]
    given = pairs(arguments, (*OPTIONS, *changed), ("model",), USAGE)
    style = given.get("style", STYLES[0])
    if style not in STYLES:
        raise ValueError(f"style={style}: allowed: {', '.join(STYLES)}")
    changes = {key.removeprefix("model."): given[key] for key in changed}
    length = whole_number("length", given["length"]) if "length" in given else None
    places = [key for key in PLACES if key in given]
    if given["model"] == "all":
        if places:
            raise ValueError(f"{places[0]}={given[places[0]]}: a layout is one model's; model=all has none")
        configs = {name: named_config(name, changes) for name in model_names()}
        found = {name: figures_of(config, length or _length(config)) for name, config in configs.items()}
        kept = ("length", "parameters", "flops", "cache_bytes", "cache_ratio")
        totals = {name: {key: _total(figures[key]) for key in kept} for name, figures in found.items()}
        return [comparison(found)], {"models": totals}, style
    config = named_config(given["model"], changes)
    length = length or _length(config)
    placement = None
    if places:
        placement = _placement(config, given, length)
    figures = figures_of(config, length)
    grids = [tree_grid(config, length, placement), *_totals(config, figures)]
    if placement is not None:
        grids += [_stages(placement), _ranks(placement)]
        figures["placement"] = asdict(placement)
    return grids, figures, style


def _total(figure: Any) -> Any:
    """Figures by part without the parts."""
    if not isinstance(figure, dict):
        return figure
    return {
        key: value["total"] if isinstance(value, dict) else value
        for key, value in figure.items()
        if not isinstance(value, dict) or "total" in value
    }


def _length(config: ModelConfig) -> int:
    """The longest sequence before any extension."""
    return config.rope_scaling.original_length


def _placement(config: ModelConfig, given: dict[str, str], length: int) -> Placement:
    if "pipeline" not in given:
        raise ValueError(f"pipeline missing; {USAGE}")
    pipeline, expert = (whole_number(key, given.get(key, "1")) for key in ("pipeline", "expert"))
    ranks = whole_number("ranks", given.get("ranks", str(pipeline * expert)))
    return place(config, given.get("schedule", "dualpipe"), pipeline, expert, ranks, given.get("layout", ""), length)


def figures_of(config: ModelConfig, length: int) -> dict[str, Any]:
    """Every count of a model, for scripts. FLOPs and cache per token."""
    counts = count_parameters(config)
    rotary = Rotary(config, length)
    return {
        "model": config.name,
        "length": length,
        "parameters": asdict(counts),
        "flops": {
            f"{'causal' if causal else 'non_causal'}{'_with_mtp' if mtp else ''}": training_flops_per_token(
                config, length, causal, mtp
            )
            for causal in (True, False)
            for mtp in (False, True)
        },
        "recompute_flops": recompute_flops_per_token(config, length, mtp=True),
        "cache_bytes": cache_bytes_per_token(config, BF16),
        "cache_ratio": cache_ratio(config, named_config(REFERENCE)),
        "softmax_scale": rotary.softmax_scale,
        "rope": "yarn" if rotary.yarn else "plain",
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def giga(flops: float) -> str:
    return f"{flops / 1e9:.1f}" if flops >= 1e9 else f"{flops / 1e9:.3g}"


def comparison(found: dict[str, dict[str, Any]]) -> Grid:
    """A row for every model."""
    rows = []
    for name, figures in found.items():
        counts, flops = figures["parameters"], figures["flops"]
        rows.append(
            (
                name,
                *(f"{counts[key]:,}" for key in ("total", "active", "mtp")),
                f"{figures['length']}",
                *(giga(flops[key]["total"]) for key in ("causal", "non_causal")),
                f"{figures['cache_bytes']:,}",
                f"{figures['cache_ratio']:.1%}",
            )
        )
    columns = (
        "model",
        "parameters",
        "active",
        "MTP",
        "length",
        "GF causal",
        "GF non-causal",
        "cache bytes",
        "of LLM 67B's",
    )
    title = "Parameters (router biases included; active without the input embedding), FLOPs and BF16 cache per token"
    return Grid(title, columns, rows, ("model",))


def tree_grid(config: ModelConfig, length: int, placement: Placement | None) -> Grid:
    """The tree, one line for each component and tensor."""
    tree = model_tree(config, length)
    rows: list[tuple[str, ...]] = []

    def add(node: Node, lead: str, branch: str, below: str, stages: str) -> None:
        shape = " x ".join(map(str, node.shape)) if node.shape else ""
        parameters = f"{node.parameters:,}" if node.parameters else ""
        share = f"{node.parameters / tree.parameters:.1%}" if node.parameters else ""
        flops = (giga(node.flops), f"{node.flops / tree.flops:.1%}") if node.flops else ("", "")
        where = (stages,) if placement else ()
        rows.append((lead + branch + node.title, shape, node.precision, parameters, share, *flops, *where))
        for i, child in enumerate(node.children):
            last = i == len(node.children) - 1
            at = _stages_of(child, placement) if placement and node is tree else ""
            add(child, lead + below, "└─ " if last else "├─ ", "   " if last else "│  ", at)

    add(tree, "", "", "", "")
    columns = ("component", "shape", "precision", "parameters", "share", "GF/token", "of FLOPs")
    title = (
        f"{config.name} at {length} tokens: parameters of all copies; GFLOPs of forward and backward per token, "
        "causal, MTP included; precision of products with FP8 on"
    )
    return Grid(
        title, (*columns, "stages") if placement else columns, rows, ("component", "shape", "precision", "stages")
    )


def _stages_of(node: Node, placement: Placement) -> str:
    if node.layers is not None:
        first, last = node.layers
        held = [s.stage for s in placement.stages if s.layers[0] < last and s.layers[1] > first]
        return str(held[0]) if len(held) == 1 else f"{held[0]}-{held[-1]}"
    output = [s.stage for s in placement.stages if s.output]
    if node.name != "embed":
        return str(output[0])
    held = [s.stage for s in placement.stages if s.embedding]
    return ", ".join(map(str, dict.fromkeys(held + output if placement.embedding_at_output else held)))


def _totals(config: ModelConfig, figures: dict[str, Any]) -> list[Grid]:
    counts, flops = figures["parameters"], figures["flops"]
    biases, embedding = counts["router_biases"], config.vocab_size * config.hidden_size
    rows = [("total", f"{counts['total']:,}")]
    if biases:
        rows.append(("without router biases", f"{counts['total'] - biases:,}"))
    rows += [
        ("active", f"{counts['active']:,}"),
        ("active, with the input embedding", f"{counts['active'] + embedding:,}"),
    ]
    if config.mtp_depth:
        rows.append((f"MTP, {config.mtp_depth} deep, on top", f"{counts['mtp']:,}"))
        rows.append(("MTP, active", f"{counts['mtp_active']:,}"))
    parameters = Grid("Parameters", ("", "parameters"), rows, ("",))
    columns = ["causal", "non_causal"] + (["causal_with_mtp", "non_causal_with_mtp"] if config.mtp_depth else [])
    parts = flops[columns[-1]]
    cost = [(part.replace("_", " "), *(giga(flops[column].get(part, 0.0)) for column in columns)) for part in parts]
    again = [recompute_flops_per_token(config, figures["length"], *_kind(column)) for column in columns]
    for part in again[0]:
        name = "computed again, beside the total" if part == "total" else f"again: {part}"
        cost.append((name.replace("_", " "), *(giga(found[part]) for found in again)))
    names = tuple(column.replace("non_", "not ").replace("_", " ").replace("mtp", "MTP") for column in columns)
    title = f"GFLOPs per trained token at {figures['length']}"
    return [parameters, Grid(title, ("part", *names), cost, ("part",)), _cache(config, figures)]


def _kind(column: str) -> tuple[bool, bool]:
    return not column.startswith("non"), column.endswith("mtp")


def _cache(config: ModelConfig, figures: dict[str, Any]) -> Grid:
    reference = named_config(REFERENCE)
    values, others = cache_values_per_token(config), cache_values_per_token(reference)
    ratio, layers = figures["cache_ratio"], (values / config.num_layers, others / reference.num_layers)
    scaling = config.rope_scaling
    rope = f"plain, base {config.rope_theta:g}"
    if figures["rope"] == "yarn":
        rope = f"YaRN, base {config.rope_theta:g}, factor {scaling.factor:g} from {scaling.original_length} tokens"
    rows = [
        ("cache bytes per token, BF16", f"{figures['cache_bytes']:,} ({values:,} numbers)"),
        ("of a GQA of LLM 67B's shape", f"{ratio:.1%} of its {others * BF16:,} bytes, 1 : {1 / ratio:.2f}"),
        ("of one layer", f"{layers[0] / layers[1]:.1%} of {layers[1]:.0f} numbers"),
        (f"RoPE at {figures['length']} tokens", rope),
        ("softmax scale", f"{figures['softmax_scale']:.9f}"),
    ]
    return Grid("Decoding and positions", ("", "value"), rows, ("", "value"))


# Layout ---------------------------------------------------------------------------------------------------------------


def _stages(placement: Placement) -> Grid:
    rows = [
        (str(s.stage), s.contents, ", ".join(map(str, dict.fromkeys(s.ranks))), giga(s.flops)) for s in placement.stages
    ]
    title = f"Stages of {placement.schedule}, layout {placement.layout}"
    return Grid(title, ("stage", "holds", "pipeline ranks", "GF/token"), rows, ("holds", "pipeline ranks"))


def _ranks(placement: Placement) -> Grid:
    rows = []
    for at in placement.ranks:
        replicas = ", ".join(f"{kind} {'/'.join(map(str, sizes))}" for kind, sizes in at.replicas.items())
        rows.append(
            (
                str(at.rank),
                ", ".join(str(stage) for _, stage in at.stages),
                ", ".join(map(str, at.mirrors)) or "none",
                str(at.first) if at.first == at.last else f"{at.first}-{at.last}",
                f"{at.parameters:,}",
                f"{at.expert_parameters:,}",
                replicas,
                giga(at.flops),
            )
        )
    p = placement
    title = (
        f"Pipeline ranks: {p.data} data x {p.pipeline} pipeline x {p.expert} expert = {p.data * p.pipeline * p.expert}"
    )
    title += f" ranks; {p.experts_per_rank} experts of a MoE layer on each expert rank" if p.experts_per_rank else ""
    title += f"; data replica i is {p.pipeline * p.expert} i ranks further" if p.data > 1 else ""
    columns = ("rank", "stages", "mirror", "global ranks", "parameters of each", "in experts", "replicas", "GF/token")
    return Grid(title, columns, rows, ("stages", "mirror", "global ranks", "replicas"))

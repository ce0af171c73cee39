"""Bytes that the FP8 recipe sends and keeps, beside BF16: counted while layers of V3's widths run.

    python benchmarks/fp8_bytes.py [--tokens 64]

One dense layer on one process and one MoE layer over two gloo processes, as the chunk programs that training runs: once
in BF16 and once with the recipe, on the same weights. Widths are those of `conf/model/v3.yaml`; of its 256 experts
there are eight, in one group, and all serve every token. A row then carries V3's eight ids and weights and is expanded
to eight rows; it goes to two ranks, where V3's goes to seven on average.

- Payload: bytes handed to the all-to-all over rows handed to it, for each of the four movements.
- Cache: the storages that a layer's forward made, that live after it and no more once the layer's state of the chunk is
  gone; of all ranks, over the tokens of all ranks. A storage is known by its size: it counts for the item of
  `launch.ledger` that it makes up, and what makes up none has a line of its own.

Weights are no part of this. Plain-torch products widen FP8 operands to FP32, and Ops lets a CPU remember the widened
copy: of weights (left out: `CodesOnly`) and of activations, where it dies in the forward. Had one lived on, it would
have that line.

The last line is one JSON object. `payload_ratio`: dispatch(F), FP8 over BF16; `cache_ratio`: the same of what the
layers keep; `differs`: what is not, to the byte, what the formulas of `launch.ledger` say. Exit code 1 when there is
any; 69 when a process fails.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.layer_bytes import DENSE, MOE, MOVEMENTS, PRECISIONS, Counted, body
from benchmarks.processes import ProcessFailed, gloo
from kernels.tiles import TILE, tile_count
from launch.ledger.caches import layer_after_forward
from launch.ledger.choices import Choices
from launch.ledger.load import Load, balanced_load, ranks_per_token
from model.config import ModelConfig, config_problems
from train.command import CommandParser
from train.compose import fp8_problems

ROOT = Path(__file__).resolve().parents[1]
FEW_EXPERTS = ["num_routed_experts=8", "num_expert_groups=1", "groups_per_token=1"]
RANKS = {DENSE: 1, MOE: 2}
TITLES = {DENSE: "a dense", MOE: "an MoE"}
V3_EXPERT_RANKS, V3_LENGTH = 64, 4096
SILENCE_SECONDS = 900.0
BF16, FP32, INT64 = 2, 4, 8
OTHER = "in no item"


def model_config(changes: list[str]) -> ModelConfig:
    """`conf/model/v3.yaml` with KEY=VALUE changes."""
    loaded = OmegaConf.load(ROOT / "conf" / "model" / "v3.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), loaded, OmegaConf.from_dotlist(changes))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


def row_bytes(config: ModelConfig, fp8: bool) -> dict[str, int]:
    """What a row of each movement should weigh: scatters carry FP8 codes and scales, gathers BF16 sums; expert ids and
    router weights go with dispatch(F), gradients of these weights with dispatch(B)."""
    d, K = config.hidden_size, config.experts_per_token
    scattered = d + FP32 * tile_count(d, TILE) if fp8 else BF16 * d
    return dict(zip(MOVEMENTS, (scattered + (INT64 + FP32) * K, BF16 * d, scattered, BF16 * d + FP32 * K), strict=True))


def storages(config: ModelConfig, moe: bool, load: Load, fp8: bool) -> dict[str, list[int]]:
    """Bytes of each storage that the ledger's items consist of."""
    N, X, d, K, E = load.tokens, load.expanded, config.hidden_size, config.experts_per_token, config.num_routed_experts
    H, f = config.num_heads, config.moe_intermediate_size

    def tiles(rows: int, width: int, code: int = 1) -> list[int]:
        return [code * rows * width, FP32 * rows * tile_count(width, TILE)] if fp8 else [BF16 * rows * width]

    found = {
        "residual into attention": [BF16 * N * d],
        "residual into MLP": [BF16 * N * d],
        "latent keys and values": [BF16 * N * (config.kv_lora_rank + config.qk_rope_head_dim)],
        "attention output": tiles(N, H * config.v_head_dim, 2),
        "latent queries": [BF16 * N * config.q_lora_rank],
        "softmax statistics": [FP32 * N * H],
    }
    if not moe:
        return found | {"SwiGLU input": tiles(N, 2 * config.intermediate_size)}
    chosen = [FP32 * N * K, FP32 * N] if config.renormalise else []
    return found | {
        "SwiGLU input, shared": tiles(N, 2 * config.num_shared_experts * f),
        "rows dispatched here": tiles(X, d),
        "SwiGLU input, routed": tiles(X, 2 * f),
        "router weights of rows": [FP32 * X],
        "router": [FP32 * N * E, *chosen, FP32 * N, FP32 * N, FP32 * load.sequences * E, FP32 * load.sequences],
        "indices": [INT64 * N * K, INT64 * load.moved, INT64 * X, INT64 * X],
    }


def by_item(kept: list[int], items: dict[str, list[int]]) -> Counter[str]:
    """Bytes of the storages that were found, by item."""
    left, found = Counter(kept), Counter[str]()
    for name, sizes in items.items():
        for size in sizes:
            if left[size]:
                left[size] -= 1
                found[name] += size
    found[OTHER] = sum(size * times for size, times in left.items())
    return found


def cache(config: ModelConfig, kind: str, runs: dict[str, list[Counted]], differs: list[str]) -> dict[str, Any]:
    """Bytes per token that a layer keeps: by item and in all, counted and by the ledger."""
    row: dict[str, Any] = {}
    for precision, ranks in runs.items():
        items, ledger = Counter[str](), Counter[str]()
        for counted in ranks:
            fp8 = precision == "fp8"
            items += by_item(counted.kept, storages(config, kind == MOE, counted.load, fp8))
            ledger += Counter(layer_after_forward(config, kind == MOE, counted.load, Choices(caches=precision)))
        tokens, stays = sum(counted.load.tokens for counted in ranks), sum(counted.stays for counted in ranks)
        # The balance loss of a MoE layer stays for the step.
        if stays > FP32 * len(ranks) * (kind == MOE):
            differs.append(f"{kind} layer, {precision}: {stays} bytes outlive the chunk")
        if items != ledger or sum(items.values()) != sum(sum(counted.kept) for counted in ranks):
            differs.append(f"{kind} layer, {precision}: counted {dict(items)}, by the ledger {dict(ledger)}")
        row[precision] = {
            "items": {name: size / tokens for name, size in items.items()},
            "total": sum(items.values()) / tokens,
            "ledger": sum(ledger.values()) / tokens,
        }
    return row | {"ratio": round(row["fp8"]["total"] / row["bf16"]["total"], 4)}


def payload(config: ModelConfig, runs: dict[str, list[Counted]], differs: list[str]) -> dict[str, Any]:
    """Bytes of a row of each movement, counted and by the formulas."""
    found: dict[str, Any] = {movement: {} for movement in MOVEMENTS}
    for precision, ranks in runs.items():
        for movement, formula in row_bytes(config, precision == "fp8").items():
            rows, size = (sum(each) for each in zip(*(counted.sent[movement] for counted in ranks), strict=True))
            found[movement] |= {precision: size / rows, f"{precision}_formula": formula}
            if size != rows * formula:
                differs.append(
                    f"{movement}, {precision}: counted {size} bytes in {rows} rows, by formula {formula} each"
                )
    for row in found.values():
        row["ratio"] = round(row["fp8"] / row["bf16"], 4)
    return found


def v3_cache(kind: str) -> dict[str, float]:
    """The ledger's bytes per token with all of V3's experts, over 64 ranks, and its sequences of 4096."""
    config = model_config([])
    load = balanced_load(config, 1, V3_LENGTH, V3_EXPERT_RANKS)
    found = {
        precision: sum(layer_after_forward(config, kind == MOE, load, Choices(caches=precision)).values()) / V3_LENGTH
        for precision in PRECISIONS
    }
    return found | {"ratio": round(found["fp8"] / found["bf16"], 4)}


def print_payload(console: Console, found: dict[str, Any], ranks_of_token: float) -> None:
    grid = Table(title="Bytes of a row in the all-to-all", title_justify="left")
    columns = ("BF16", "FP8", "FP8 / BF16", "formula, BF16", "formula, FP8", "V3, a token, BF16", "V3, a token, FP8")
    for column in ("movement", *columns):
        grid.add_column(column, justify="left" if column == "movement" else "right")
    for movement, row in found.items():
        formulas = (f"{row['bf16_formula']}", f"{row['fp8_formula']}")
        token = (f"{row[precision] * ranks_of_token:.0f}" for precision in PRECISIONS)
        grid.add_row(movement, f"{row['bf16']:g}", f"{row['fp8']:g}", f"{row['ratio']:.3f}", *formulas, *token)
    console.print(grid)
    console.print(f"V3's token goes to {ranks_of_token:.2f} of {V3_EXPERT_RANKS} ranks on average (by the ledger).")


def print_cache(console: Console, kind: str, row: dict[str, Any], whole: dict[str, float]) -> None:
    grid = Table(title=f"Bytes per token that {TITLES[kind]} layer keeps for its backward", title_justify="left")
    for column in ("item", "BF16", "FP8", "FP8 / BF16"):
        grid.add_column(column, justify="left" if column == "item" else "right")

    def line(name: str, bf16: float, fp8: float) -> None:
        grid.add_row(name, f"{bf16:.1f}", f"{fp8:.1f}", f"{fp8 / bf16:.3f}" if bf16 else "")

    names = list(row["bf16"]["items"]) + [name for name in row["fp8"]["items"] if name not in row["bf16"]["items"]]
    for name in names:
        line(name, *(row[precision]["items"].get(name, 0.0) for precision in PRECISIONS))
    grid.add_section()
    line("counted", *(row[precision]["total"] for precision in PRECISIONS))
    line("by the ledger", *(row[precision]["ledger"] for precision in PRECISIONS))
    line("V3 whole, by the ledger", *(whole[precision] for precision in PRECISIONS))
    console.print(grid)


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(description="Bytes sent and kept by layers, FP8 beside BF16.")
    parser.add_argument("--tokens", type=int, default=64, help="of each process, one sequence")
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE", help="further changes to conf/model/v3")
    arguments = parser.parse_args(argv)
    try:
        config = model_config([*FEW_EXPERTS, *arguments.model])
    except (OmegaConfBaseException, ValueError) as error:
        parser.exit(64, f"fp8_bytes: --model: {' '.join(str(error).split())}\n")
    problems = config_problems(config) or fp8_problems(config)
    if config.attention != "mla" or not config.q_lora_rank or config.num_routed_experts % RANKS[MOE]:
        problems.append(
            "model: allowed here are latent attention with compressed queries and an even number of experts"
        )
    if arguments.tokens < 1:
        problems.append(f"--tokens: found {arguments.tokens}, must be at least 1")
    if problems:
        parser.exit(64, f"fp8_bytes: {problems[0]}\n")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    runs: dict[str, dict[str, list[Counted]]] = {DENSE: {}, MOE: {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("layers", total=len(RANKS) * len(PRECISIONS))
        try:
            for wanted, size in RANKS.items():
                given = (wanted, config, arguments.tokens)
                for kind, precision, found in gloo(body, size, *given, timeout=SILENCE_SECONDS):
                    runs[kind][precision] = found
                    progress.update(bar, advance=1, description=f"{kind} {precision}")
        except ProcessFailed as error:
            progress.stop()
            print(f"fp8_bytes: {error}", file=sys.stderr)
            return 69
    differs: list[str] = []
    sent = payload(config, runs[MOE], differs)
    kept = {kind: cache(config, kind, runs[kind], differs) for kind in RANKS}
    v3 = {kind: v3_cache(kind) for kind in RANKS}
    ranks_of_token = ranks_per_token(model_config([]), V3_EXPERT_RANKS)
    console.print(
        f"hidden {config.hidden_size}, {config.num_routed_experts} routed experts in {config.num_expert_groups} "
        f"group(s), {config.experts_per_token} of them for a token; {arguments.tokens} tokens a process"
    )
    print_payload(console, sent, ranks_of_token)
    for kind, row in kept.items():
        print_cache(console, kind, row, v3[kind])
    for line in differs:
        console.print(f"differs: {line}")
    merits = {
        "payload_ratio": sent[MOVEMENTS[0]]["ratio"],
        "cache_ratio": {kind: row["ratio"] for kind, row in kept.items()},
        "differs": differs,
        "tokens": arguments.tokens,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps({**merits, "payload": sent, "cache": kept, "v3_cache": v3, "v3_ranks_per_token": ranks_of_token}))
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())

"""A toy set of canonical tensors over four ranks, and one-process AdamW as its oracle.

Ranks 0 and 3 hold the experts 0 and 1, ranks 1 and 2 the experts 2 and 3; 2 and 3 run their stages in the opposite
order of 0 and 1, as mirrors do, and see other numbers of chunks per direction.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from parallel.optimizer.config import OptimizerConfig
from parallel.optimizer.contract import ParameterSpec, Part

WORLD = (0, 1, 2, 3)
EXPERTS = {0: (0, 3), 1: (0, 3), 2: (1, 2), 3: (1, 2)}
FLOAT64 = {"master_dtype": "float64", "moment_dtype": "float64", "accumulate_dtype": "float64"}

# name -> (true shape, ranks that hold it, uses, group, bucket)
TENSORS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[int, int], str, str]] = {
    "embed.weight": ((200, 24), WORLD, {0: 2, 1: 1}, "embedding", "embed"),
    "layers.2.norm.weight": ((40,), WORLD, {0: 1, 1: 1}, "norms", "layers.2.dense"),
    "layers.2.attention.weight": ((80, 24), WORLD, {0: 1, 1: 1}, "matrices", "layers.2.dense"),
    "layers.2.projection.weight": ((520, 8), WORLD, {0: 1, 1: 1}, "matrices", "layers.2.dense"),
    "layers.10.attention.weight": ((80, 24), WORLD, {0: 1, 1: 1}, "matrices", "layers.10.dense"),
    "layers.10.norm.weight": ((300,), WORLD, {0: 1, 1: 1}, "norms", "layers.10.dense"),
    "layers.10.projection.weight": ((520, 8), WORLD, {0: 1, 1: 1}, "matrices", "layers.10.dense"),
    "pair.weight": ((129, 5), (1, 3), {0: 1}, "matrices", "pair"),
    "head.weight": ((130, 6), (3,), {1: 1}, "head", "head"),
}
for expert, ranks in EXPERTS.items():
    TENSORS[f"layers.10.experts.{expert}.up.weight"] = ((200, 16), ranks, {0: 1, 1: 1}, "experts", "layers.10.experts")
    TENSORS[f"layers.10.experts.{expert}.down.weight"] = (
        (16, 200),
        ranks,
        {0: 1, 1: 1},
        "experts",
        "layers.10.experts",
    )


def chunks_of(rank: int) -> dict[int, int]:
    return {0: 3, 1: 1} if rank in (0, 1) else {0: 1, 1: 2}


def draw(*key: object, shape: tuple[int, ...]) -> torch.Tensor:
    """float64 noise that depends on the key alone."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def initial(name: str) -> torch.Tensor:
    return draw("initial", name, shape=TENSORS[name][0])


def initial_rows(name: str, first: int, last: int) -> torch.Tensor:
    whole = initial(name)
    return whole.reshape(whole.shape[0], -1)[first:last]


def contribution(step: int, rank: int, name: str, direction: int, chunk: int, use: int) -> torch.Tensor:
    scale = 1e-3 if step == 1 else 1.0  # step 1 is below the clipping norm
    return scale * draw("gradient", step, rank, name, direction, chunk, use, shape=TENSORS[name][0])


def groups() -> dict[tuple[int, ...], dist.ProcessGroup | None]:
    wanted = sorted({ranks for _, ranks, *_ in TENSORS.values()})
    return {ranks: dist.new_group(list(ranks)) if len(ranks) > 1 else None for ranks in wanted}


def make_specs(rank: int, dtype: torch.dtype) -> list[ParameterSpec]:
    """Parameters as a rank holds them: experts stacked, one weight stored transposed, mirrors in reverse order."""
    specs = []
    for name, (shape, ranks, uses, group, bucket) in TENSORS.items():
        if rank in ranks and "experts" not in name:
            data = torch.zeros(shape, dtype=dtype)
            if name == "layers.2.attention.weight":
                data = torch.zeros(shape[::-1], dtype=dtype).t()
            columns = data[0].numel()
            parts = (Part(name, 0, shape[0], columns, shape),)
            specs.append(ParameterSpec(nn.Parameter(data), parts, ranks, bucket, uses, group))
    mine = [e for e, ranks in EXPERTS.items() if rank in ranks]
    for kind, shape in (("up", (200, 16)), ("down", (16, 200))):
        parts = tuple(
            Part(f"layers.10.experts.{e}.{kind}.weight", i * shape[0], (i + 1) * shape[0], shape[1], shape)
            for i, e in enumerate(mine)
        )
        parameter = nn.Parameter(torch.zeros((len(mine), *shape), dtype=dtype))
        specs.append(ParameterSpec(parameter, parts, EXPERTS[mine[0]], "layers.10.experts", {0: 1, 1: 1}, "experts"))
    return specs if rank in (0, 1) else specs[::-1]


def feed(optimizer, specs: list[ParameterSpec], rank: int, step: int, change=None) -> None:
    """All contributions of one step; `change(name, direction, chunk, grad)` may replace one."""
    for direction, count in chunks_of(rank).items():
        for chunk in range(count):
            for spec in specs:
                for use in range(spec.uses.get(direction, 0)):
                    grads = [contribution(step, rank, p.name, direction, chunk, use) for p in spec.parts]
                    grad = torch.cat(grads).view(spec.parameter.shape)
                    if change is not None:
                        grad = change(spec.parts[0].name, direction, chunk, grad)
                    optimizer.accumulate(spec.parameter, grad)


def total_gradient(step: int, name: str) -> torch.Tensor:
    shape, ranks, uses, _, _ = TENSORS[name]
    total = torch.zeros(shape, dtype=torch.float64)
    for rank in ranks:
        for direction, count in chunks_of(rank).items():
            for chunk in range(count):
                for use in range(uses.get(direction, 0)):
                    total += contribution(step, rank, name, direction, chunk, use)
    return total


class Oracle:
    """torch AdamW and clipping on whole tensors in one process."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = {name: nn.Parameter(initial(name)) for name in TENSORS}
        decay = [p for name, p in self.parameters.items() if TENSORS[name][3] != "norms"]
        plain = [p for name, p in self.parameters.items() if TENSORS[name][3] == "norms"]
        settings = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(settings, betas=(config.beta1, config.beta2), eps=config.eps)

    def step(self, step: int, learning_rate: float) -> float:
        for name, parameter in self.parameters.items():
            parameter.grad = total_gradient(step, name)
        # torch adds 1e-6 to the norm it divides by, so it is asked for the norm only.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), float("inf")).item()
        for parameter in self.parameters.values():
            parameter.grad.mul_(min(1.0, self.config.clip / norm))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        return norm

    def state(self, name: str, kind: str) -> torch.Tensor:
        parameter = self.parameters[name]
        value = parameter.detach() if kind == "master" else self.adamw.state[parameter][kind]
        return value.reshape(value.shape[0], -1)

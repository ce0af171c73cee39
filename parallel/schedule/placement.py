"""Which rank holds which stage, for one-direction schedules with one or more stages on a rank."""

from __future__ import annotations


def in_turn(ranks: int, stages_per_rank: int = 1) -> tuple[tuple[int, ...], ...]:
    """`rank_of` with stage s on rank s % ranks (Megatron's placement)."""
    return (tuple(range(ranks)) * stages_per_rank,)


def v_shape(ranks: int) -> tuple[tuple[int, ...], ...]:
    """`rank_of` with stages r and 2P-1-r on rank r: down the ranks and up again, turning on the last one."""
    return ((*range(ranks), *reversed(range(ranks))),)


def at_least(schedule: str, **numbers: tuple[int, int]) -> None:
    """Raises ValueError naming the first of `name=(given, smallest allowed)` that is too small."""
    for name, (given, smallest) in numbers.items():
        if given < smallest:
            raise ValueError(f"{schedule}: {name}={given}: must be at least {smallest}")

"""The default split of layers into stages: the largest load of a *rank* is smallest.

A rank's load is the cost of all stages it holds (both directions). Splits are compared by, in this order:
1. the largest rank load;
2. the largest stage;
3. the sum of the squares of all rank loads and stage costs (29 bits of the total): the rest as even as possible;
4. the stages rank by rank (a rank's own in order): the earlier one longer.

One stage per rank and mirrored pairs (s and S-1-s on one rank: DualPipe and V schedules) are solved exactly by
dynamic programming, other placements (interleaved) by enumeration where that is cheap, else by local search.

Shape letters: n layers, S stages, G groups of stages that share a rank, C candidate splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from math import comb, inf, isqrt, lcm
from typing import Any

import numpy as np

TOTAL_BITS = 61  # so that sums fit in int64
SQUARE_BITS = 29  # so that sums of squares do
MOST_ENUMERATED = 50_000
FAR = np.int64(2**62)


def balanced_split(
    costs: Sequence[float], embed_cost: float, output_cost: float, rank_of: Sequence[Sequence[int]]
) -> list[int]:
    """Layers of each stage, in order; 0 is allowed.

    costs: of each layer (any unit, 0 or more). embed_cost: on top for the first stage. output_cost: on top for the
    last one (head, loss, MTP). rank_of[direction][stage]: a table's placement. Raises ValueError for costs that are
    not numbers of 0 or more.
    """
    scaled = _integers([*costs, embed_cost, output_cost], len(rank_of))
    problem = _Problem(scaled[:-2], scaled[-2], scaled[-1], rank_of)
    if problem.mirrored or problem.single:
        return _Exact(problem).solve()
    if comb(problem.n + problem.S - 1, problem.S - 1) <= MOST_ENUMERATED:
        return _best(problem, _all_splits(problem.n, problem.S))
    return local_search(problem)


def interleaved_heuristic(
    costs: Sequence[float], embed_cost: float, output_cost: float, rank_of: Sequence[Sequence[int]]
) -> list[int]:
    """`balanced_split` by local search whatever the placement; what large interleaved placements get."""
    scaled = _integers([*costs, embed_cost, output_cost], len(rank_of))
    return local_search(_Problem(scaled[:-2], scaled[-2], scaled[-1], rank_of))


def _integers(costs: Sequence[float], directions: int) -> list[int]:
    """The costs in one unit as integers, exact if they fit, so that equal sums compare equal."""
    for cost in costs:
        if not 0 <= cost < inf:
            raise ValueError(f"layer costs: found {cost}, allowed numbers of 0 or more")
    exact = [Fraction(cost) for cost in costs]
    unit = lcm(*(cost.denominator for cost in exact))
    whole = [int(cost * unit) for cost in exact]
    excess = (sum(whole) * directions).bit_length() - TOTAL_BITS
    return [round(Fraction(cost, 2**excess)) for cost in whole] if excess > 0 else whole


class _Problem:
    """Integer costs and the groups of stages whose costs add up to a rank's load."""

    def __init__(self, costs: list[int], embed: int, output: int, rank_of: Sequence[Sequence[int]]) -> None:
        self.n, self.S = len(costs), len(rank_of[0])
        self.prefix = np.concatenate(([0], np.cumsum(np.array(costs, dtype=np.int64)))).astype(np.int64)
        self.embed, self.output = embed, output
        held: dict[int, list[int]] = {}
        for row in rank_of:
            for stage, rank in enumerate(row):
                held.setdefault(rank, []).append(stage)
        # Two ranks of the same stages (DualPipe's mirror) have the same load.
        self.groups = list(dict.fromkeys(tuple(sorted(held[rank])) for rank in sorted(held)))
        self.weights = np.zeros((len(self.groups), self.S), dtype=np.int64)
        for g, group in enumerate(self.groups):
            for stage in group:
                self.weights[g, stage] += 1
        pairs = {(s, self.S - 1 - s) for s in range(self.S // 2)}
        self.mirrored = self.S % 2 == 0 and set(self.groups) == pairs
        self.single = set(self.groups) == {(s,) for s in range(self.S)}
        total = (int(self.prefix[-1]) + embed + output) * len(rank_of)
        self.shift = max(0, total.bit_length() - SQUARE_BITS)
        self.order = list(dict.fromkeys(s for group in self.groups for s in group))

    def measures(self, sizes_CS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Largest rank load, largest stage, sum of squares: [C] each."""
        edges = np.concatenate((np.zeros((len(sizes_CS), 1), np.int64), np.cumsum(sizes_CS, 1)), 1)
        stage_CS = np.diff(self.prefix[edges], axis=1)
        stage_CS[:, 0] += self.embed
        stage_CS[:, -1] += self.output
        load_CG = stage_CS @ self.weights.T
        squares = ((load_CG >> self.shift) ** 2).sum(1) + ((stage_CS >> self.shift) ** 2).sum(1)
        return load_CG.max(1), stage_CS.max(1), squares


# Exact ----------------------------------------------------------------------------------------------------------------


class _Exact:
    """Dynamic programming from the outside in: step k cuts x layers off the front for stage k and, for mirrored
    pairs, y layers off the back for stage S-1-k. State: (a, b) layers gone from the front and from the back."""

    def __init__(self, problem: _Problem) -> None:
        self.p = p = problem
        self.front = p.prefix
        self.back = p.prefix[-1] - p.prefix[::-1]
        self.steps = p.S // 2 if p.mirrored else p.S
        self.most_back = p.n if p.mirrored else 0

    def _extras(self, step: int) -> tuple[int, int]:
        first = self.p.embed if step == 0 else 0
        if self.p.mirrored:
            return first, self.p.output if step == 0 else 0
        return first + (self.p.output if step == self.steps - 1 else 0), 0

    def _cuts(
        self, step: int, largest_load: int, largest_stage: int
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """(x, y, cost of the front stage by a, cost of the back stage by b), lengths descending, those that can fit."""
        n = self.p.n
        for_front, for_back = self._extras(step)

        def windows(sums: np.ndarray, most: int, extra: int) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for size in range(most + 1):
                cost = sums[size:] - sums[: n + 1 - size] + extra
                if cost.min() > min(largest_load, largest_stage):
                    break
                found.append(cost)
            return found

        fronts = windows(self.front, n, for_front)
        backs = windows(self.back, self.most_back, for_back)
        if not self.most_back:
            backs = [cost[:1] for cost in backs]
        for x in reversed(range(len(fronts))):
            for y in reversed(range(len(backs))):
                if x + y <= n and fronts[x].min() + backs[y].min() <= largest_load:
                    yield x, y, fronts[x], backs[y]

    def _solve(
        self,
        local: Callable[[np.ndarray, np.ndarray], np.ndarray],
        join: Callable[[np.ndarray, np.ndarray], np.ndarray],
        largest_load: list[int],
        largest_stage: int,
    ) -> list[np.ndarray]:
        """best[k][a, b]: the smallest value of steps k, k+1, ... under the limits (a load's by step); FAR where there
        is none."""
        n, wide = self.p.n, self.most_back + 1
        a, b = np.ogrid[: n + 1, :wide]
        best = [np.where(a + b == n, np.int64(0), FAR)]
        for step in reversed(range(self.steps)):
            after, now = best[0], np.full((n + 1, wide), FAR)
            for x, y, front, back in self._cuts(step, largest_load[step], largest_stage):
                f, g = front[:, None], back[None, :]
                allowed = (f + g <= largest_load[step]) & (f <= largest_stage) & (g <= largest_stage)
                rest = after[x:, y:]
                value = np.where(allowed & (rest < FAR), join(local(f, g), rest), FAR)
                target = now[: n + 1 - x, : wide - y]
                np.minimum(target, value, out=target)
            best.insert(0, now)
        return best

    def _squares(self, f: Any, g: Any) -> Any:
        shift = self.p.shift
        total = ((f + g) >> shift) ** 2 + (f >> shift) ** 2
        return total + (g >> shift) ** 2 if self.most_back else total

    def solve(self) -> list[int]:
        """A good split bounds the search: lengths that must be worse than it are never tried."""
        good = _descend(self.p, [self.p.n // self.p.S + (s < self.p.n % self.p.S) for s in range(self.p.S)])
        good_load, good_stage, squares = (int(measure[0]) for measure in self.p.measures(np.array([good])))
        extras = [self._extras(step) for step in range(self.steps)]
        # Where embedding and output alone make the largest load or stage, there is nothing to search.
        load = good_load
        if load > max(sum(pair) for pair in extras):
            load = int(self._solve(lambda f, g: f + g, np.maximum, [load] * self.steps, load)[0][0, 0])
        stage = good_stage if load == good_load else load
        if stage > max(max(pair) for pair in extras):
            stage = int(self._solve(np.maximum, np.maximum, [load] * self.steps, stage)[0][0, 0])
        found = (load, stage) == (good_load, good_stage)
        limits = self._limits(load, squares, extras) if found else [load] * self.steps
        best = self._solve(self._squares, np.add, limits, stage)
        sizes, a, b = [0] * self.p.S, 0, 0
        for step in range(self.steps):
            for x, y, front, back in self._cuts(step, limits[step], stage):
                if a + b + x + y > self.p.n:
                    continue
                f, g = front[a : a + 1], back[b : b + 1]
                rest = best[step + 1][a + x, b + y]
                fits = f + g <= limits[step] and f <= stage and g <= stage and rest < FAR
                if fits and self._squares(f, g)[0] + rest == best[step][a, b]:
                    sizes[step] = x
                    if self.p.mirrored:
                        sizes[self.p.S - 1 - step] = y
                    a, b = a + x, b + y
                    break
        return sizes

    def _limits(self, load: int, squares: int, extras: list[tuple[int, int]]) -> list[int]:
        """Largest load of each step in a split whose sum of squares is at most `squares`: that of a load alone is
        below what the other steps leave of it, which is at least their embedding and output."""
        alone = [int(self._squares(np.int64(f), np.int64(g))) for f, g in extras]
        rest = [squares - (sum(alone) - mine) for mine in alone]
        return [min(load, (isqrt(left) + 1) << self.p.shift) for left in rest]


# Other placements -----------------------------------------------------------------------------------------------------


def _all_splits(n: int, S: int) -> np.ndarray:
    """Every way to split n layers into S stages: [C, S]."""
    bars = np.array(list(combinations(range(n + S - 1), S - 1)), dtype=np.int64).reshape(-1, S - 1)
    ends = np.full((len(bars), 1), n + S - 1)
    return np.diff(np.concatenate((np.full((len(bars), 1), -1), bars, ends), 1), axis=1) - 1


def _best(problem: _Problem, sizes_CS: np.ndarray) -> list[int]:
    load, stage, squares = problem.measures(sizes_CS)
    keys = [-sizes_CS[:, s] for s in reversed(problem.order)]
    return sizes_CS[np.lexsort([*keys, squares, stage, load])[0]].tolist()


def _key(problem: _Problem, sizes: list[int]) -> tuple[int, ...]:
    load, stage, squares = problem.measures(np.array([sizes]))
    return int(load[0]), int(stage[0]), int(squares[0]), *(-sizes[s] for s in problem.order)


def local_search(problem: _Problem) -> list[int]:
    """From a few starts, the best of moving one or two layers from a stage to another, until nothing improves. The
    stages in between keep their lengths and shift."""
    return min((_descend(problem, start) for start in _starts(problem)), key=lambda sizes: _key(problem, sizes))


def _starts(problem: _Problem) -> Iterator[list[int]]:
    n, S = problem.n, problem.S
    yield [n // S + (s < n % S) for s in range(S)]
    yield [n // S + (s >= S - n % S) for s in range(S)]
    one_each = _Problem(np.diff(problem.prefix).tolist(), problem.embed, problem.output, [range(S)])
    yield _Exact(one_each).solve()


def _moves(sizes: list[int]) -> np.ndarray:
    """Neighbours of a split [C, S]: one or two layers from stage i to stage j."""
    S = len(sizes)
    unit = np.eye(S, dtype=np.int64)
    moves = (unit[None, :] - unit[:, None]).reshape(-1, S)
    moves = moves[np.abs(moves).sum(1) > 0]
    found = np.array(sizes) + np.concatenate((moves, 2 * moves))
    return found[(found >= 0).all(1)]


def _descend(problem: _Problem, sizes: list[int]) -> list[int]:
    while True:
        neighbours = _moves(sizes)
        if not len(neighbours):
            return sizes
        found = _best(problem, neighbours)
        if _key(problem, found) >= _key(problem, sizes):
            return sizes
        sizes = found

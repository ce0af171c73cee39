"""The mixture of sources as one periodic table, so that the source of any sample is found in O(1).

Weights are rationals; scaled to integers w_i with sum W they repeat after W samples. Sample k (1-based) goes, of the
sources with n_i < w_i k / W, to the one with the smallest (n_i + 1) / w_i (earliest deadline first; Tijdeman 1980):
every source then stays within one sample of its share at every step. Taking the largest deficit alone would not, from
about six skewed sources on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np

from data.config import MAX_WEIGHT_PERIOD
from data.errors import UsageError


class Mixture:
    """Which source each sample comes from. Samples are counted from 0.

    names: sources in the order given. share: integer weight w_i of each. period: W.
    Error: UsageError when the period exceeds MAX_WEIGHT_PERIOD (choose weights with smaller denominators).
    """

    def __init__(self, weights: Mapping[str, Fraction]) -> None:
        if not weights or any(weight <= 0 for weight in weights.values()):
            raise UsageError(f"mixture weights must be more than 0, found {dict(weights)}")
        scale = math.lcm(*(weight.denominator for weight in weights.values()))
        whole = [int(weight * scale) for weight in weights.values()]
        common = math.gcd(*whole)
        self.names = tuple(weights)
        share = [weight // common for weight in whole]
        self.period = sum(share)
        if self.period > MAX_WEIGHT_PERIOD:
            # A weight such as 1e9999 has more digits than anybody reads, or Python writes.
            short = self.period < 10**18
            shown = "".join(f" {name}={weight}" for name, weight in weights.items()) if short else ""
            period = str(self.period) if short else "more than 10^18"
            raise UsageError(f"mixture weights{shown} repeat only after {period} samples, allowed {MAX_WEIGHT_PERIOD}")
        self.share = np.array(share, dtype=np.int64)
        self.source_K = _table(self.share)
        self.rank_K = np.empty(self.period, dtype=np.int64)
        for source in range(len(self.names)):
            places = np.flatnonzero(self.source_K == source)
            self.rank_K[places] = np.arange(len(places))

    def locate(self, sample_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source index, how many samples of that source came before), int64 [N] each, for sample indices int64 [N]."""
        turn_N, place_N = np.divmod(sample_N, self.period)
        source_N = self.source_K[place_N]
        return source_N, turn_N * self.share[source_N] + self.rank_K[place_N]

    def taken(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source gave, int64 [sources]."""
        turns, rest = divmod(samples, self.period)
        return turns * self.share + np.bincount(self.source_K[:rest], minlength=len(self.share))


def _table(share_S: np.ndarray) -> np.ndarray:
    share, period = share_S.tolist(), int(share_S.sum())
    taken = [0] * len(share)
    # Source i may give its next sample from the step at which its share exceeds what it gave.
    released: list[list[int]] = [[] for _ in range(period + 1)]
    released[1] = list(range(len(share)))
    ready: list[tuple[float, int]] = []
    source_K = []
    for k in range(1, period + 1):
        for source in released[k]:
            # Quotients of integers below 2^53 are equal as floats exactly when they are equal as rationals of
            # denominators this small.
            heappush(ready, ((taken[source] + 1) / share[source], source))
        _, chosen = heappop(ready)
        source_K.append(chosen)
        taken[chosen] += 1
        if taken[chosen] < share[chosen]:
            released[max(k, taken[chosen] * period // share[chosen]) + 1].append(chosen)
    return np.array(source_K, dtype=np.int64)


def table_reference(share_S: np.ndarray) -> np.ndarray:
    """Definition of the table, a look at every source at every step: int64 [W]."""
    period = int(share_S.sum())
    taken_S = np.zeros_like(share_S)
    source_K = np.empty(period, dtype=np.int64)
    for k in range(1, period + 1):
        deadline_S = np.where(taken_S * period < share_S * k, (taken_S + 1) / share_S, np.inf)
        source_K[k - 1] = chosen = int(np.argmin(deadline_S))
        taken_S[chosen] += 1
    return source_K

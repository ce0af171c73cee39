"""Ranges of samples that are never served, such as those that went before a spike of the loss.

A stage's samples are numbered as if nothing were skipped (`raw` indices). Served sample j is the j-th raw one outside
the ranges, found in O(log n); a skipped sample's sequence counts as read in its source.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data.errors import UsageError


class SkipList:
    """Ranges [first, end) of raw samples; overlapping and touching ones are joined. Error: UsageError for an empty or
    negative one.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        joined: list[list[int]] = []
        for first, end in sorted(ranges):
            if not 0 <= first < end:
                raise UsageError(f"skipped samples: found {first} to {end}, need 0 <= first < end")
            if joined and first <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([first, end])
        self.ranges = tuple((first, end) for first, end in joined)
        first_R, end_R = np.array(joined, dtype=np.int64).reshape(-1, 2).T
        self._skipped_R = np.concatenate([[0], np.cumsum(end_R - first_R)])
        # Samples served before each range.
        self._served_R = first_R - self._skipped_R[:-1]

    def raw(self, served_N: np.ndarray) -> np.ndarray:
        """Raw indices int64 [N] of served samples int64 [N]."""
        if not self.ranges:
            return served_N
        return served_N + self._skipped_R[np.searchsorted(self._served_R, served_N, side="right")]

    def raw_end(self, served: int) -> int:
        """Raw samples passed when `served` samples have been served: one more than the last of them."""
        return int(self.raw(np.array([served - 1], dtype=np.int64))[0]) + 1 if served else 0

    def before(self, raw_end: int) -> list[list[int]]:
        """The ranges that lie before a served sample: what a resumed stream must agree on."""
        return [list(span) for span in self.ranges if span[0] < raw_end]

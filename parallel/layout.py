"""Which layers each pipeline stage holds: a readable string in Megatron's manner (`--pipeline-model-parallel-layout`).

`E` is the embedding, `t` a transformer layer, `m` an MTP depth, `L` the output (final norm, head and loss); `|` ends a
stage; `*n` repeats the letter, `|` or (group) before it; commas and spaces mean nothing. `Et*3|(tt|)*29,m|L` in
Megatron; here MTP and output share a stage, since their tied tensors are one: `Et*3|(tt|)*28tt|mL`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

LETTERS = "EtmL|"
MOST_ITEMS = 100_000  # a slip such as t*1000000000 is refused before it fills the memory
MOST_OPEN = 50


@dataclass(frozen=True)
class StageLayout:
    """One pipeline stage: embedding first, then `layers` transformer layers, `mtp` MTP depths, the output."""

    embedding: bool = False
    layers: int = 0
    mtp: int = 0
    output: bool = False


Layout = tuple[StageLayout, ...]


def make_layout(sizes: Sequence[int], mtp_depth: int) -> Layout:
    """Stages of `sizes` layers; embedding on the first, MTP depths and output on the last."""
    last = len(sizes) - 1
    return tuple(StageLayout(s == 0, size, mtp_depth if s == last else 0, s == last) for s, size in enumerate(sizes))


def edges(layout: Layout) -> list[tuple[int, int]]:
    """[first, last) transformer layers of each stage."""
    return list(pairwise(sum(stage.layers for stage in layout[:s]) for s in range(len(layout) + 1)))


# Reading --------------------------------------------------------------------------------------------------------------


def parse(text: str) -> Layout:
    """The stages that `text` says.

    Raises ValueError, one line with the position (from 1) in `text`, for what is not a layout: a letter unknown, a
    bracket open, a repeat of nothing, `E` not first, `L` not last, `m` anywhere but before `L`.
    """
    stages: list[StageLayout] = []
    embedding, layers, mtp, output = False, 0, 0, False
    items = [*_Reader(text).items(), ("|", len(text))]
    opened = False
    for item, at in items:
        if output and item != "|":
            raise _mistake(text, at, f"'{item}' after L", "L ends the last stage")
        if item == "|":
            stages.append(StageLayout(embedding, layers, mtp, output))
            if mtp and not output:
                raise _mistake(text, at, "a stage ends after m without L", "m directly before L, in one stage")
            if output and at < len(text):
                raise _mistake(text, at, "'|' after L", "L ends the last stage")
            embedding, layers, mtp, output = False, 0, 0, False
        elif item == "E":
            if opened:
                raise _mistake(text, at, "'E' is not the first item", "one E, which opens the first stage")
            embedding = True
        elif item == "t":
            if mtp:
                raise _mistake(text, at, "'t' after m", "m directly before L, in one stage")
            layers += 1
        elif item == "m":
            mtp += 1
        else:
            output = True
        if not opened and item != "E":
            raise _mistake(
                text, at, f"'{item}' is the first item" if at < len(text) else "nothing", "E as the first item"
            )
        opened = True
    if not stages[-1].output:
        raise _mistake(text, len(text), "the last stage ends without L", "L closes the last stage")
    return tuple(stages)


class _Reader:
    """Recursive descent over `sequence := (unit ['*' number])*`, `unit := letter | '(' sequence ')'`."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.open = text, 0, 0

    def items(self) -> list[tuple[str, int]]:
        """Letters with their offsets in the text, repeats written out."""
        found = self._sequence(None)
        assert self.at == len(self.text)
        return found

    def _skip(self) -> str:
        while self.at < len(self.text) and (self.text[self.at] in ", " or self.text[self.at].isspace()):
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def _sequence(self, opened: int | None) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        while True:
            letter, start = self._skip(), self.at
            if not letter and opened is not None:
                raise _mistake(self.text, opened, "'(' is never closed", "a ')' for each '('")
            if not letter:
                return found
            self.at += 1
            if letter == ")" and opened is not None:
                return found
            if letter == ")":
                raise _mistake(self.text, start, "')' without '('", "a '(' before each ')'")
            if letter == "*":
                raise _mistake(self.text, start, "'*' repeats nothing", "an item or (...) before it")
            if letter != "(" and letter not in LETTERS:
                raise _mistake(self.text, start, f"'{letter}'", "E t m L | ( ) *number, commas and spaces")
            unit = self._group(start) if letter == "(" else [(letter, start)]
            times = self._times()
            if len(found) + len(unit) * times > MOST_ITEMS:
                raise _mistake(self.text, start, f"more than {MOST_ITEMS} items", f"at most {MOST_ITEMS}")
            found += unit * times

    def _group(self, start: int) -> list[tuple[str, int]]:
        self.open += 1
        if self.open > MOST_OPEN:
            raise _mistake(self.text, start, f"more than {MOST_OPEN} brackets open", f"at most {MOST_OPEN}")
        found = self._sequence(start)
        self.open -= 1
        return found

    def _times(self) -> int:
        if self._skip() != "*":
            return 1
        star = self.at
        self.at += 1
        self._skip()
        number = re.compile("[0-9]+").match(self.text, self.at)
        if number is None or not 1 <= len(number[0].lstrip("0")) <= 9:
            raise _mistake(self.text, star, f"'*{number[0] if number else ''}'", "'*' and a number of 1 or more")
        self.at = number.end()
        return int(number[0])


def _mistake(text: str, offset: int, found: str, allowed: str) -> ValueError:
    return ValueError(f"layout '{text}', position {offset + 1}: found {found}; allowed: {allowed}")


def check(layout: Layout, stages: int, layers: int, mtp_depth: int) -> None:
    """Raises ValueError, one line, unless `layout` has these numbers."""
    for name, found, wanted in (
        ("stages", len(layout), stages),
        ("transformer layers (t)", sum(stage.layers for stage in layout), layers),
        ("MTP depths (m)", sum(stage.mtp for stage in layout), mtp_depth),
    ):
        if found != wanted:
            raise ValueError(f"layout '{describe(layout)}': found {found} {name}, allowed {wanted}")


# Writing --------------------------------------------------------------------------------------------------------------


def describe(layout: Layout) -> str:
    """The canonical string: runs of a letter as `t*3`, equal stages that follow each other as `(tt|)*29`."""
    *before, last = [_stage_text(stage) for stage in layout]
    return "".join(_runs(before)) + last


def _runs(stages: list[str]) -> Iterator[str]:
    for text, run in groupby(stages):
        count = len(list(run))
        if count < 3 or not text:
            yield f"{text}|" * count if count < 3 else f"|*{count}"
        else:
            yield f"({text}|)*{count}"


def _stage_text(stage: StageLayout) -> str:
    counted = "".join(
        letter * count if count < 3 else f"{letter}*{count}"
        for letter, count in (("t", stage.layers), ("m", stage.mtp))
    )
    return "E" * stage.embedding + counted + "L" * stage.output

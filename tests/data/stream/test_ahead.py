"""Reading ahead hides behind the step, changes nothing, and fails where it should."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.stream.ahead import ReadAhead, Wanted
from data.stream.stream import Stream, open_stream
from tests.data.synthetic import token_corpus

STEPS, SEQUENCES = 8, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    token_corpus(directory, {"one": 70, "two": 41})
    return directory


def stream(corpus: Path) -> Stream:
    return open_stream(corpus, 32, mtp_depth=1, seed=5, stage="a", fim_rate=0.2, verify=False)


def wanted(step: int) -> Wanted[int]:
    first = step * SEQUENCES
    return Wanted(first, SEQUENCES, {chunk: [first + 2 * chunk, first + 2 * chunk + 1] for chunk in range(4)})


def test_the_same_batches_as_without(corpus: Path) -> None:
    plain = stream(corpus)
    with ReadAhead[int](stream(corpus)) as ahead:
        found = []
        for step in range(STEPS):
            found.append(ahead.step(wanted(step)))
            ahead.announce(wanted(step + 1))
    for step, read in enumerate(found):
        assert read.counts == plain.counts(step * SEQUENCES, SEQUENCES)
        for chunk, samples in wanted(step).order.items():
            assert np.array_equal(read.batches[chunk].tokens, plain.read(samples).tokens)


def slow(opened: Stream, seconds: float) -> Stream:
    read = opened.read

    def slowly(samples: list[int]) -> Any:
        time.sleep(seconds)
        return read(samples)

    opened.read = slowly  # type: ignore[method-assign, assignment]
    return opened


def test_reading_hides_behind_the_step(corpus: Path) -> None:
    opened = stream(corpus)
    read, main = opened.read, threading.current_thread()
    done = {step: threading.Event() for step in range(STEPS)}
    on_main = []

    def watched(samples: list[int]) -> Any:
        batch = read(samples)
        step, place = divmod(samples[-1] + 1, SEQUENCES)
        if threading.current_thread() is main:
            on_main.append(samples[0] // SEQUENCES)
        if not place:
            done[step - 1].set()
        return batch

    opened.read = watched  # type: ignore[method-assign, assignment]
    with ReadAhead[int](opened) as ahead:
        for step in range(STEPS):
            ahead.step(wanted(step))
            if step + 1 < STEPS:
                ahead.announce(wanted(step + 1))
                # The step itself, which ends only after the next one has been read.
                assert done[step + 1].wait(30)
    assert on_main == [0] * 4


def test_a_fault_appears_in_the_step_that_needs_it(corpus: Path) -> None:
    opened = stream(corpus)
    read = opened.read

    def damaged(samples: list[int]) -> Any:
        if samples[0] >= 2 * SEQUENCES:
            raise DataError("block 7 is damaged")
        return read(samples)

    opened.read = damaged  # type: ignore[method-assign, assignment]
    with ReadAhead[int](opened) as ahead:
        for step in range(2):
            ahead.step(wanted(step))
            ahead.announce(wanted(step + 1))
        with pytest.raises(DataError, match="block 7 is damaged"):
            ahead.step(wanted(2))
        ahead.announce(wanted(3))
        ahead.step(wanted(0))


def test_it_ends_cleanly(corpus: Path) -> None:
    earlier = set(threading.enumerate())

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread not in earlier]

    opened = slow(stream(corpus), 0.01)
    with pytest.raises(KeyboardInterrupt), ReadAhead[int](opened) as ahead:
        ahead.announce(wanted(0))
        assert threads()
        raise KeyboardInterrupt
    opened.close()
    assert not threads()

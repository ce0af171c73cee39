"""Reading ahead: the next step's batches are read in a thread while this step runs.

What is read is a function of the request alone, so reading ahead changes no order; it only moves the reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from data.contract import MicroBatch, StepCounts
from data.stream.stream import Stream

Key = TypeVar("Key")


@dataclass(frozen=True)
class Wanted(Generic[Key]):
    """One step as one rank reads it. first_sample, sequences: of the whole step, over all ranks. order: the samples of
    each of this rank's micro-batches.
    """

    first_sample: int
    sequences: int
    order: Mapping[Key, list[int]]


@dataclass(frozen=True)
class Step(Generic[Key]):
    """A step's denominators and this rank's micro-batches."""

    counts: StepCounts
    batches: dict[Key, MicroBatch]


class ReadAhead(Generic[Key]):
    """Steps of one stream. A step that was announced comes out of the thread, any other is read on the spot; what went
    wrong in the thread is raised by the `step` that needs it. Use as a context, or `close` it.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._announced: tuple[Wanted[Key], Future[Step[Key]]] | None = None

    def announce(self, wanted: Wanted[Key]) -> None:
        """Begin to read a step that will be asked for next."""
        self._drop()
        self._announced = wanted, self._thread.submit(self._read, wanted)

    def step(self, wanted: Wanted[Key]) -> Step[Key]:
        """The step. Errors: those of `Stream.counts` and `Stream.read`."""
        if self._announced is not None and self._announced[0] == wanted:
            future = self._announced[1]
            self._announced = None
            return future.result()
        self._drop()
        return self._read(wanted)

    def close(self) -> None:
        """Wait for what is being read and end the thread; its result and its error are let go."""
        self._drop()
        self._thread.shutdown(wait=True)

    def __enter__(self) -> ReadAhead[Key]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop(self) -> None:
        if self._announced is not None:
            self._announced[1].cancel()
            self._announced = None

    def _read(self, wanted: Wanted[Key]) -> Step[Key]:
        self.stream.prefetch(wanted.first_sample)
        counts = self.stream.counts(wanted.first_sample, wanted.sequences)
        return Step(counts, {key: self.stream.read(samples) for key, samples in wanted.order.items()})

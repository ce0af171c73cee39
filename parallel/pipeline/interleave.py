"""Advancing chunk programs: one alone, or a forward and a backward together in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.pipeline.contract import Program
from parallel.trace.recorder import NO_RECORDER, Kind, Recorder


class Running:
    """A program with its next step in view. `steps` receives the name of every step it runs, `recorder` its times."""

    def __init__(
        self, program: Program, steps: list[str] | None = None, recorder: Recorder | None = NO_RECORDER
    ) -> None:
        self.program = program
        self.steps = steps
        self.recorder = recorder
        self.result: Any = None
        self.next: str | None = None
        self._step()

    def _step(self) -> None:
        try:
            self.next = next(self.program)
        except StopIteration as stop:
            self.next, self.result = None, stop.value

    def advance(self) -> None:
        """Run the step in view, up to the next boundary."""
        if self.steps is not None and self.next is not None:
            self.steps.append(self.next)
        if self.recorder is None:
            self._step()
            return
        name, start = self.next, self.recorder.now()
        self.recorder.step = name
        self._step()
        self.recorder.add(Kind.STEP, name, start, self.recorder.now())
        self.recorder.step = None

    def drain(self) -> Any:
        """Run to the end; the program's return value."""
        while self.next is not None:
            self.advance()
        return self.result


def overlap(forward: Running, backward: Running, order: Sequence[str]) -> tuple[Any, Any]:
    """Advance two programs in `order`, round after round, then drain what is left (unequal layer counts).

    The order never depends on what has arrived: peers must issue the same collectives in the same order. A step the
    order does not name (embedding, head) runs as soon as its program's turn comes; a named step that a layer lacks is
    passed over.
    """
    named = frozenset(order)
    try:
        while forward.next is not None and backward.next is not None:
            for name in order:
                running = forward if name.endswith("(F)") else backward
                while running.next is not None and running.next not in named:
                    running.advance()
                if running.next == name:
                    running.advance()
        return forward.drain(), backward.drain()
    except BaseException:
        forward.program.close()
        backward.program.close()
        raise

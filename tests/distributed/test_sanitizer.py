"""Every schedule, dispatch and weight-gradient store run on the stream sanitizer without a finding; seeded faults are
found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parallel.config import ParallelConfig
from parallel.sanitizer.findings import Finding, Rule
from parallel.schedule.registry import SCHEDULES
from tests.distributed.sanitized import SanitizedEngine, engine_of, evaluate, findings_of, sanitized_step
from tests.distributed.seeded_faults import SCHEDULE_OF, SEEDED
from tests.distributed_helper import run_distributed
from train.engine import ORDERS

PAIRED = {"dualpipe", "dualpipev"}
LAYOUTS = {"pp4": (4, 1, 6), "pp2_ep2": (2, 2, 4)}  # pipeline, expert, micro-batches where there are pairs
# On one expert rank a pair exchanges nothing; a second order is there to be sure.
ORDERS_OF = {"pp4": ["default", "published"], "pp2_ep2": list(ORDERS)}
Found = dict[str, list[Finding]]


def run_all(rank: int, world_size: int) -> tuple[Found, Found]:
    """Findings of this rank by case: every schedule (FP8 and plain numbers; all orders where a table has pairs;
    forward only, with two directions and one), and every seeded fault."""
    clean = {}
    for schedule in SCHEDULES:
        for layout, (pipeline, expert, most) in LAYOUTS.items():
            engine = engine_of(rank, ParallelConfig(pipeline, expert, schedule=schedule))
            paired = schedule in PAIRED
            orders = ORDERS_OF[layout] if paired else ["default"]
            for number, order in enumerate(orders):
                fp8 = (number % 2 == 0) == (layout == "pp4")
                case = f"{schedule} {layout} {order} fp8={fp8}"
                clean[case] = sanitized_step(engine, most if paired else pipeline, fp8, order)
        if paired:
            evaluate(engine, 2)
            clean[f"{schedule} forward only"] = findings_of(engine)
    seeded = {}
    for fault in SEEDED:
        schedule = SCHEDULE_OF.get(fault, "dualpipe")
        engine = engine_of(rank, ParallelConfig(pipeline=2, expert=2, schedule=schedule))
        fault(engine)
        # Pairs only where they are needed.
        seeded[fault.__name__] = sanitized_step(engine, 4 if SEEDED[fault][0] is Rule.COLLECTIVE else 2, False)
    return clean, seeded


@pytest.fixture(scope="module")
def found() -> list[tuple[Found, Found]]:
    return run_distributed(run_all, 4, timeout=240)


def test_every_schedule_is_clean(found: list[tuple[Found, Found]]) -> None:
    cases = found[0][0]
    assert {name.split()[0] for name in cases} == set(SCHEDULES)
    assert {tuple(name.split()[1:3]) for name in cases if name.startswith("dualpipe ")} >= {
        (layout, order) for layout in LAYOUTS for order in ORDERS_OF[layout]
    }
    lines = {f"{case}: {finding}" for clean, _ in found for case, findings in clean.items() for finding in findings}
    assert not lines, "\n".join(sorted(lines))


@pytest.mark.parametrize("fault", SEEDED, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_is_found(found: list[tuple[Found, Found]], fault: Callable[[SanitizedEngine], None]) -> None:
    rule, words = SEEDED[fault]
    lines = [finding for _, seeded in found for finding in seeded[fault.__name__]]
    matching = [f.line for f in lines if f.rule is rule and all(word in f.line for word in words)]
    assert matching, "\n".join(map(str, lines)) or "nothing was found"
    assert all("missing:" in line and "\n" not in line for line in matching)

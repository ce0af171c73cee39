"""All schedules on the same model, the same ranks and the same micro-batches: which schedule when.

Costs are those of all the layers that one rank runs for one micro-batch. A stage of a V or interleaved schedule has a
v-th of them, so its actions take a v-th of the time and its chunks a v-th of the room. DualPipe's rank runs one of two
stages of full size for each micro-batch, so its actions take the full time, and its parameters are there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.schedule.actions import Table
from parallel.schedule.checker import check
from parallel.schedule.registry import SCHEDULES, build, stages_per_rank
from parallel.schedule.simulator import Costs, Simulation, simulate

# Dispatch and combine over compute in DeepSeek's published trace (profile-data, train.json; ms per MoE layer): forward
# 6.7 + 8.7 over attention 4.4 + experts 4.6; backward 5.8 + 7.5 over experts 5.3 + 5.3 and attention 9.3 + 2.4.
FORWARD_RATIO = (6.7 + 8.7) / (4.4 + 4.6)
BACKWARD_RATIO = (5.8 + 7.5) / (5.3 + 5.3 + 9.3 + 2.4)


@dataclass(frozen=True)
class Row:
    """One schedule. Times in the unit of the costs, without all-to-all except `with_all_to_all`.

    bubble: of the most idle rank. bubble_share: idle part of all ranks' time. peak: most activations on any rank, in
    chunks of all the layers a rank runs. parameters: copies of the model in one pipeline. overlap_share: forwards
    inside an F&B pair, mean over ranks. with_all_to_all: makespan with dispatch and combine; all_to_all_adds: the part
    by which that is longer.
    """

    table: Table
    run: Simulation
    makespan: float
    bubble: float
    bubble_share: float
    peak: float
    parameters: int
    overlap_share: float
    with_all_to_all: float
    all_to_all_adds: float
    run_all_to_all: Simulation

    def figures(self) -> dict[str, float | int | str]:
        """The numbers by name, rounded for printing."""
        return {
            "schedule": self.table.name,
            "stages": self.table.stages,
            "makespan": round(self.makespan, 6),
            "bubble": round(self.bubble, 6),
            "bubble_share": round(self.bubble_share, 6),
            "peak": self.peak,
            "parameters": self.parameters,
            "overlap_share": round(self.overlap_share, 6),
            "with_all_to_all": round(self.with_all_to_all, 6),
            "all_to_all_adds": round(self.all_to_all_adds, 6),
        }


def compare(ranks: int, micro_batches: int, costs: Costs) -> list[Row]:
    """Every schedule over `ranks` ranks, oldest first; ValueError where one of them has no table."""
    return [_row(name, ranks, micro_batches, costs) for name in reversed(SCHEDULES)]


def measured_all_to_all(costs: Costs) -> Costs:
    """`costs` with all-to-all times in DeepSeek's measured proportion to the compute."""
    return replace(
        costs,
        all_to_all_forward=FORWARD_RATIO * costs.forward,
        all_to_all_backward=BACKWARD_RATIO * costs.backward,
    )


def _row(name: str, ranks: int, micro_batches: int, costs: Costs) -> Row:
    held = stages_per_rank(name)
    table = build(name, ranks, micro_batches)
    report = check(table)
    loaded = costs.divided(held)
    plain = replace(loaded, all_to_all_forward=0.0, all_to_all_backward=0.0)
    run, run_all_to_all = simulate(table, plain), simulate(table, loaded)
    bubbles = [run.bubble(rank) for rank in range(ranks)]
    return Row(
        table=table,
        run=run,
        makespan=run.makespan,
        bubble=max(bubbles),
        bubble_share=sum(bubbles) / (ranks * run.makespan),
        peak=max(report.peak_chunks) / held,
        parameters=table.directions,
        overlap_share=sum(report.overlap_share) / ranks,
        with_all_to_all=run_all_to_all.makespan,
        all_to_all_adds=run_all_to_all.makespan / run.makespan - 1,
        run_all_to_all=run_all_to_all,
    )


HEADINGS = (
    "schedule",
    "stages",
    "makespan",
    "bubble",
    "of all time",
    "peak activations",
    "parameters",
    "overlapped",
    "with all-to-all",
    "adds",
)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the printed table, under HEADINGS."""
    return (
        row.table.name,
        str(row.table.stages),
        f"{row.makespan:.4g}",
        f"{row.bubble:.4g}",
        f"{row.bubble_share:.1%}",
        f"{row.peak:.4g}",
        f"{row.parameters}x",
        f"{row.overlap_share:.0%}",
        f"{row.with_all_to_all:.4g}",
        f"{row.all_to_all_adds:+.0%}",
    )


def page(rows: Sequence[Row], subtitle: str, pictures: Sequence[tuple[str, str]]) -> str:
    """The comparison as one HTML page that needs no other file. pictures: (caption, SVG text)."""
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells(row)) + "</tr>\n" for row in rows)
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{svg[svg.index('<svg') :]}</figure>\n" for caption, svg in pictures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which schedule when</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1.5em 0; }}
th, td {{ padding: .35em .9em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; font-weight: 600; }}
figure {{ margin: 2em 0; }} figcaption {{ font-weight: 600; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>Which schedule when</h1><p>{subtitle}</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table>
<p>Times are in units of one forward through all the layers a rank runs. <em>bubble</em>: the most idle rank's.
<em>peak activations</em>: chunks of a rank's full layers held at once. <em>parameters</em>: copies of the model.
<em>overlapped</em>: forwards run together with a backward, so that each hides the other's all-to-all. <em>adds</em>:
by how much the makespan grows with all-to-all.</p>
{figures}</body></html>
"""

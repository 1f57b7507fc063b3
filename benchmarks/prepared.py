"""Times the agent's planning after the loss of a worker: with a new search, and with a search done in advance. Both plans must be equal.

    python benchmarks/prepared.py --workers 8 --workers 64 --json build/prepared.json

It starts no process: it measures the pure part of a proposal, for a transformer of equal blocks between an embedding and a head. It plans
for the loss of each single worker. Figures are CPU time, medians of the rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))

from report import write_json

from elastic.plan.fleet import Fleet
from elastic.plan.planner import Answers, PlannedChange, fastest, plan
from elastic.plan.search import preparing
from elastic.plan.workload import LayerCost, Workload

app = typer.Typer(add_completion=False)


def transformer(blocks: int) -> Workload:
    """Returns a workload with the example's proportions: a fast embedding, blocks of 10 ms, and a head with loss as slow as a block."""
    block = LayerCost(forward_s=0.0033, backward_s=0.0067, parameters=790_000, activation_bytes=7_000_000, output_bytes=524_288)
    embedding = LayerCost(forward_s=0.0002, backward_s=0.0003, parameters=100_000, activation_bytes=8_192, output_bytes=524_288)
    return Workload(layers=(embedding, *[block] * blocks, block), micro_batches=16, grains=16, state_bytes=8.0)


def measured(workers: int, stages: int | None, blocks: int, rounds: int) -> dict[str, Any]:
    """Returns the figures of one job, in milliseconds."""
    workload, whole = transformer(blocks), tuple(range(workers))
    before = fastest(Fleet(workers=whole), workload, stages)
    losses = [Fleet(workers=tuple(worker for worker in whole if worker != lost)) for lost in whole]
    began = time.process_time()
    prepared = preparing(losses, workload, stages)
    while prepared.advance():
        continue
    search_ms = (time.process_time() - began) * 1000

    def seconds(ahead: Answers | None, left: Fleet) -> tuple[float, PlannedChange]:
        began = time.process_time()
        found = plan(left, workload, before, 6, stages=stages, brief=True, prepared=ahead)
        return time.process_time() - began, found

    fresh: list[float] = []
    quick: list[float] = []
    for _ in range(rounds):
        for left in losses:
            (took, found), (took_prepared, found_prepared) = seconds(None, left), seconds(prepared, left)
            if found != found_prepared:
                raise SystemExit(f"the prepared plan for {left.workers} is another one")
            fresh.append(took * 1000)
            quick.append(took_prepared * 1000)
    return {
        "workers": workers,
        "stages": stages,
        "classes": prepared.classes,
        "prepare_ms": search_ms,
        "fresh_ms": statistics.median(fresh),
        "prepared_ms": statistics.median(quick),
        "ratio": statistics.median(fresh) / statistics.median(quick),
        "saved_ms": statistics.median(fresh) - statistics.median(quick),
        "plans_equal": True,
    }


@app.command()
def main(
    workers: Annotated[list[int] | None, typer.Option(help="Workers of a job; may be given again. 8 and 64 by default.")] = None,
    blocks: Annotated[int, typer.Option(help="Blocks of the model.")] = 24,
    rounds: Annotated[int, typer.Option(help="How often every loss is planned for.")] = 3,
    path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Prints a table, and one JSON object per job."""
    table = Table(title="planning for one lost worker, milliseconds of processor time")
    for heading in ("workers", "stages", "classes", "preparing", "new search", "prepared", "ratio"):
        table.add_column(heading)
    found: list[dict[str, Any]] = []
    for count in workers or (8, 64):
        for stages in (4, None):
            each = measured(count, stages, blocks, rounds)
            found.append(each)
            figures = (f"{each[name]:.1f}" for name in ("prepare_ms", "fresh_ms", "prepared_ms", "ratio"))
            table.add_row(str(count), "any" if stages is None else str(stages), str(each["classes"]), *figures)
            print(json.dumps(each), flush=True)
    Console(stderr=True).print(table)
    write_json(path, found)


if __name__ == "__main__":
    app()

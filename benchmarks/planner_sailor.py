"""Makes plans for the models and devices of Sailor's data, under its reference cost rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sailor
from planner_timing import timed
from sailor_rules import ReferenceRules

from elastic.errors import PlanError
from elastic.plan.division.division import Division
from elastic.plan.division.search import SearchLimits, divide
from elastic.plan.division.shapes import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class SailorRequest:
    """A planning request. `batch` None: the training configuration's batch; `size` None: any micro-batch size."""

    model: str
    gpus: Mapping[str, int]
    batch: int | None = None
    size: int | None = None
    mixed: bool = False
    repeat: int = 5


def counts(text: str) -> dict[str, int]:
    """Reads `A100-40=32,V100-16=96`. Raises PlanError naming the part that cannot be read."""
    found: dict[str, int] = {}
    for part in text.split(","):
        kind, _, count = part.partition("=")
        if not kind or not count.isdecimal() or kind in found:
            raise PlanError(f"--gpus: {part!r} is not like A100-40=32, each kind once")
        found[kind] = int(count)
    return found


def search(data: Path, request: SailorRequest, export: Path | None) -> dict[str, Any]:
    """Returns the best plan, its step time and the median time of the search; also writes the plan to `export`."""
    loaded = sailor.load(data, request.model)
    batch = request.batch if request.batch is not None else loaded.batch
    if batch is None:
        raise PlanError(f"{request.model} has no training configuration in the data: --gbs is needed")
    limits = SearchLimits(sizes=None if request.size is None else (request.size,), mixed=request.mixed)
    rules = ReferenceRules(loaded.cluster(request.gpus), loaded.profiles)
    plan, search_s = timed(lambda: divide(ReferenceRules(loaded.cluster(request.gpus), loaded.profiles), batch, limits), request.repeat)
    if export is not None:
        export.write_text(json.dumps(sailor.plan_to_json(plan, rules.pools, rules.per_host, batch)) + "\n")
    return {"step_s": plan.step_s, "search_s": search_s, "plan": _shown(plan, rules.pools)}


def _shown(plan: Division, pools: Sequence[Pool]) -> dict[str, Any]:
    """Returns the plan as JSON types; a part of a stage's replicas is `[kind, zone, tp, count]`."""
    used: dict[str, int] = {}
    for number, pool in enumerate(pools):
        used[pool.kind] = used.get(pool.kind, 0) + sum(stage.makeup.devices(number) for stage in plan.stages)
    stages = [
        {
            "layers": [stage.layers.start, stage.layers.stop],
            "replicas": [[pools[shape.pool].kind, pools[shape.pool].zone, shape.tp, count] for shape, count in stage.makeup.parts],
        }
        for stage in plan.stages
    ]
    return {
        "summary": plan.summary(pools),
        "micro_batch": plan.micro_batch,
        "micro_batches": plan.micro_batches,
        "replicas": plan.replicas,
        "exact": plan.exact,
        "stages": stages,
        "gpus": {kind: count for kind, count in used.items() if count},
    }

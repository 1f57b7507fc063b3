"""Describes a job's plan for people: one row per stage, with its workers, predicted seconds and memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from elastic.plan.fleet import Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import needs_in
from elastic.plan.plan import Plan
from elastic.plan.prediction import predict
from elastic.plan.saved import SavedPlan
from elastic.plan.workload import Workload


def described(plan: Plan, fleet: Fleet, workload: Workload) -> dict[str, Any]:
    """Returns JSON types: the plan as `SavedPlan.to_json` writes it, predicted seconds, and per stage its members, grains and memory."""
    predicted, needed = (
        predict(JobCosts(workload, fleet), plan.stages, plan.routes),
        needs_in(workload, plan.stages, plan.routes, fleet, **plan.order),
    )
    places = {worker: place for place, worker in enumerate(fleet.workers)}
    stages: list[dict[str, Any]] = []
    for number, (stage, route) in enumerate(zip(plan.stages, plan.routes, strict=True)):
        grains = Counter(route)
        limits = [fleet.memory[worker] for worker in stage.members if worker in fleet.memory]
        on_device = [fleet.device_memory[worker] for worker in stage.members if worker in fleet.device_memory]
        stages.append(
            {
                "layers": [stage.layers.start, stage.layers.stop],
                "members": [[places[worker], fleet.host(worker), grains[worker]] for worker in stage.members],
                "busy_s": predicted.stage_s[number],
                "memory_bytes": max(needed[worker].host_bytes for worker in stage.members),
                "memory_limit_bytes": min(limits, default=None),
                "device_memory_bytes": max(needed[worker].device_bytes for worker in stage.members),
                "device_memory_limit_bytes": min(on_device, default=None),
            }
        )
    saved = SavedPlan.of(plan, {worker: fleet.host(worker) for worker in fleet.workers}, workload)
    return {
        "step_s": plan.step_s,
        "exchange_s": predicted.exchange_s,
        "bottleneck_stage": predicted.bottleneck,
        "stages": stages,
        "why": plan.why,
        "plan": saved.to_json(),
    }

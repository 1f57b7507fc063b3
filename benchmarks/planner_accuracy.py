"""Compares measured runs of Sailor's data with the predictions of the physical cost model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sailor

from elastic.errors import PlanError
from elastic.plan.division.costs import costs
from elastic.plan.division.physical import PhysicalRules


def accuracy(data: Path, model: str, runs: Sequence[Path]) -> dict[str, Any]:
    """Returns the relative errors of step time and peak memory, on average and for every run."""
    loaded = sailor.load(data, model)
    rows = [_compare(loaded, path) for path in runs]
    times, memories = ([abs(row[key]) for row in rows] for key in ("time_error", "memory_error"))
    return {
        "time_error_mean": statistics.mean(times),
        "time_error_max": max(times),
        "memory_error_mean": statistics.mean(memories),
        "runs": rows,
    }


def _compare(loaded: sailor.Sailor, path: Path) -> dict[str, Any]:
    run = sailor.load_run(path)
    rules = PhysicalRules(loaded.cluster(run.devices, run.zone), loaded.profiles)
    predicted = costs(rules, run.sections(rules.pools), run.size, run.micro_batches)
    if run.step_s <= 0 or run.peak_bytes <= 0:
        raise PlanError(f"{path.name}: real and max_mem must be positive")
    return {
        "run": path.stem,
        "step_s": predicted.step_s,
        "measured_step_s": run.step_s,
        "time_error": predicted.step_s / run.step_s - 1,
        "peak_bytes": max(predicted.stage_bytes),
        "measured_peak_bytes": run.peak_bytes,
        "memory_error": max(predicted.stage_bytes) / run.peak_bytes - 1,
    }

"""The file `energy.json` in a run directory: what a job's steps take in seconds and joules, by stage, and the frontier of its plan."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError
from elastic.plan.clocks import Clocked
from elastic.power.cycle import Cycle
from elastic.power.windows import Figures

NAME = "energy.json"

_FIELDS = {"job", "mode", "state", "epoch", "now", "usual", "predicted", "stages", "models", "faults", "frontier"}


def described(job: str, cycle: Cycle, tokens: int, faults: dict[str, str], frontier: tuple[Clocked, ...]) -> dict[str, Any]:
    """Returns JSON types. Joules are of a step; None where a GPU's energy cannot be read. `tokens` are those of a step, 0 if not known."""
    view, figures = cycle.view, cycle.figures
    stages: list[dict[str, Any]] = []
    if view is not None and figures is not None and set(view.workers) <= set(figures.workers):
        for number, stage in enumerate(view.plan.stages):
            each = [figures.workers[worker] for worker in stage.members]
            joules = None if any(worker.joules is None for worker in each) else sum(worker.joules or 0.0 for worker in each)
            stages.append(
                {
                    "stage": number,
                    "layers": [stage.layers.start, stage.layers.stop],
                    "workers": list(stage.members),
                    "gpus": [cycle.facts[worker].uuid for worker in stage.members if worker in cycle.facts],
                    "clocks_mhz": _clocks(cycle, stage.members),
                    "busy_s": max(worker.busy_s for worker in each),
                    "joules": joules,
                    "joules_per_token": joules / tokens if joules is not None and tokens else None,
                }
            )
    return {
        "job": job,
        "pid": os.getpid(),
        "mode": cycle.mode or "off",
        "state": cycle.state,
        "epoch": 0 if view is None else view.epoch,
        "now": _figures(figures, tokens),
        "usual": _figures(cycle.before, tokens),
        "predicted": None if cycle.plan is None else {"chosen": _clocked(cycle.plan.chosen), "usual": _clocked(cycle.plan.usual)},
        "stages": stages,
        "models": cycle.confidence,
        "faults": faults,
        "frontier": [_clocked(each) for each in frontier],
    }


def _clocks(cycle: Cycle, workers: tuple[int, ...]) -> list[int]:
    return sorted({cycle.clocks.get(worker) or cycle.facts[worker].usual_mhz for worker in workers if worker in cycle.facts})


def _figures(figures: Figures | None, tokens: int) -> dict[str, Any] | None:
    if figures is None:
        return None
    per_token = figures.joules / tokens if figures.joules is not None and tokens else None
    return {"step_s": figures.step_s, "joules": figures.joules, "joules_per_token": per_token, "steps": figures.steps}


def _clocked(found: Clocked) -> dict[str, Any]:
    return {"step_s": found.step_s, "joules": found.joules, "clocks_mhz": list(found.clocks)}


def write(directory: Path, content: dict[str, Any]) -> None:
    """Replaces the file. A directory that is full or gone is no reason to disturb a job."""
    with suppress(OSError):
        new = directory / "energy.new"
        try:
            new.write_text(json.dumps(content))
            os.replace(new, directory / NAME)
        except OSError:
            new.unlink()
            raise


def read(job: str, temporary: Path) -> dict[str, Any]:
    """Returns what a job wrote: `job` is its run directory, or its name if its directory is in `temporary`. Raises SettingsError."""
    found = [Path(job) / NAME, *sorted(temporary.glob(f"elastic-*/{NAME}"))]
    for number, path in enumerate(found):
        with suppress(OSError, ValueError, RecursionError):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and content.keys() >= _FIELDS and (number == 0 or content["job"] == job):
                return content
    raise SettingsError(
        f"no energy figures of a job {job!r} on this host: give its name while it runs, or its directory=; its train function must say "
        "which GPU each worker uses (job.use_gpu), and figures come after some steps"
    )

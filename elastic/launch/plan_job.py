"""`elastic plan` for a train function on this machine: a job starts, measures its layers, and ends with its first plan."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from elastic.errors import PlanError
from elastic.launch.run import launched
from elastic.script.target import name_of
from elastic.settings import JobSettings, best_isa


def find(
    target: str,
    *,
    workers: int,
    stages: int | None = None,
    args: Sequence[Any] = (),
    threads: int = 1,
    isa: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the plan in the form of `elastic.plan.described`, without training. Raises what `run` raises; PlanError without a Trainer."""
    settings = JobSettings(
        name=f"plan-{secrets.token_hex(4)}",
        workers=workers,
        train_fn=name_of(target),
        isa=best_isa() if isa is None else isa,
        args=tuple(args),
        stages=stages,
        threads=threads,
        seed=seed,
        plans_only=True,
    )
    found = launched(settings).value
    if not isinstance(found, dict) or "plan" not in found:
        raise PlanError(f"{target} returned without making a Trainer: there is nothing to plan")
    return found

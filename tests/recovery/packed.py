"""`outliving.train` with the cases that have several dtypes in a layer, float64, or frozen packed weights."""

from __future__ import annotations

from typing import Any

from tests.engine import packed
from tests.recovery import outliving

outliving.CASES |= {name: {"loss": packed.loss, "optimizer": packed.models.adamw, **packed.CASES[name]} for name in packed.CASES}


def train(job: Any, folder: str, case: str, steps: int, fates: dict[str, list[Any]], saves: dict[str, Any] | None = None) -> Any:
    """Returns what `outliving.train` does, without buffers: a worker has those of its layers only."""
    return {**outliving.train(job, folder, case, steps, fates, saves), "buffers": None}

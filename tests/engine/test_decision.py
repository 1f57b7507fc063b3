"""Tests how a step ends by what all members have sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elastic.engine.decision import decide
from elastic.plan.workload import LayerCost, Workload

COST = LayerCost(forward_s=1.0, backward_s=1.0, parameters=1, activation_bytes=1)
WORKLOAD = Workload(layers=(COST,), micro_batches=2, grains=1)


def ready(worker: int, sample: tuple[bool, str] | None) -> Any:
    said = {"leaves": [[worker, 1.0, 1.0, 0]] if worker < 2 else [], "drew": False, "settings": "", "sample": sample}
    said |= dict.fromkeys(("stop", "pause", "save", "no_save"), False)
    return said, {"squares": np.ones(1)}


@pytest.mark.parametrize(
    ("samples", "stray"),
    [
        ([None, None], None),
        ([(False, "a"), None], None),
        ([(False, "a"), (False, "a"), (False, "a")], None),
        ([(False, "a"), (False, "b"), (False, "b")], "worker 0"),
        ([(False, "b"), (False, "a")], "worker 1"),
        ([(False, "a"), (False, "b")], "worker 1"),
        ([(False, "a"), (True, "b")], "worker 0"),
        ([(True, "b"), (False, "a"), (False, "a")], "workers 1, 2"),
        ([(True, "a"), (True, "b"), None, (True, "b"), (False, "b")], "worker 0"),
        ([None, (True, "a"), (True, "a"), (False, "a")], None),
    ],
)
def test_who_found_something_else_is_named(samples: list[tuple[bool, str] | None], stray: str | None) -> None:
    """The flag is whether a worker is known to be right."""
    told = {worker: ready(worker, sample) for worker, sample in enumerate(samples)}
    answer = decide(3, told, WORKLOAD, clip_norm=None, lr=0.1, skips=False)
    assert answer.stray == stray
    assert answer.alike == tuple(worker for worker, sample in enumerate(samples) if sample is not None)

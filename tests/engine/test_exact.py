"""The promise of the engine: losses, norms and parameters are the same to the last bit on every layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import harness
import models
import pytest

LAYOUTS = [(2, 1), (2, 2), (3, 2), (4, 2), (5, 3), (6, 2), (4, 4)]
CASES = list(models.CASES)


@cache
def alone(name: str) -> dict[str, Any]:
    return harness.run(models.train, workers=1, stages=1, args=(name,))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_layouts_give_the_same_bits(name: str) -> None:
    """Of the seven, those whose turn it is."""
    first = CASES.index(name)
    check(name, [LAYOUTS[(first + more) % len(LAYOUTS)] for more in (0, 2, 4)])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_the_same_bits(name: str) -> None:
    check(name, LAYOUTS)


def check(name: str, layouts: list[tuple[int, int]]) -> None:
    one = alone(name)
    assert len({report[1] for report in one["reports"]}) == len(one["reports"]), "the loss does not change: nothing was trained"
    for workers, stages in layouts:
        results = harness.run(models.train, workers=workers, stages=stages, args=(name,))
        layout = results[0]["layout"]
        for result in results:
            assert result["reports"] == one["reports"], layout
        assert results[0]["digest"] == one["digest"], layout
        assert [result["digest"] for result in results[1:]] == [None] * (workers - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (3, 1), (3, 2), (6, 2), (7, 1)])
def test_shares_add_up_to_one_copy(workers: int, stages: int) -> None:
    result = harness.run(models.train, workers=workers, stages=stages, args=("dropout",))[0]
    shares = result["statistics"]
    one = alone("dropout")["statistics"][0]
    assert result["digest"] == alone("dropout")["digest"]
    assert sum(share["owned_parameter_bytes"] for share in shares) == one["owned_parameter_bytes"]
    scalars = 4  # each piece of AdamW's state has a float32 step count of its own
    assert abs(sum(share["optimizer_bytes"] for share in shares) - one["optimizer_bytes"]) <= scalars * 8 * workers * 5
    for layer in range(5):
        run = sum(n for share in shares if layer in share["layers"] for n in share["micro_batches"].values())
        assert run == 6 * 4, f"layer {layer}"

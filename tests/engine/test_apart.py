"""Tests that training has the same bits if tensors and host bytes do not share memory, as on another device."""

from __future__ import annotations

from typing import Any

import harness
import models
import pytest

from tests.apart import landings, put_apart


def train(job: Any, name: str, apart: bool) -> tuple[Any, int]:
    with pytest.MonkeyPatch.context() as patch:
        if apart:
            put_apart(patch)
        found = models.train(job, name)
        return (found["digest"], found["reports"]), len(landings)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stages"), [(2, 1), (4, 2)])
def test_nothing_relies_on_memory_that_is_shared_with_the_host(workers: int, stages: int) -> None:
    shared, apart = (harness.run(train, workers=workers, stages=stages, args=("tied", each)) for each in (False, True))
    assert [found for found, _ in apart] == [found for found, _ in shared]
    assert all(count for _, count in apart)
    assert not any(count for _, count in shared)

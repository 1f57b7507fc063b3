"""Tests what is refused of a running job, since the model would not fit into the memory of the workers that stay."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.agent.fitting import misfit_without
from elastic.agent.requests import answer
from elastic.membership.founding import Ready, found
from elastic.plan.site import Site
from elastic.settings import JobSettings
from tests.announcement import announcement

SETTINGS = JobSettings(name="job", workers=3, train_fn="m:f", isa="avx2")


def driver(memory: int, spares: Collection[int] = (), unable: Collection[int] = ()) -> Any:
    """Has a view of three workers, each of which may use so many bytes, and spares that are like them."""
    ready = {worker: replace(Ready.from_json(announcement(profile=not worker), "host"), memory=memory) for worker in range(3)}
    view = found(ready, None, Site())
    waiting = {worker: replace(view.members[0], worker=worker) for worker in spares}
    state = SimpleNamespace(ready=waiting, spares=frozenset(spares), unable=frozenset(unable), live=view.workers)
    return SimpleNamespace(view=view, state=state)


ENOUGH_FOR = {2: 400_000, 3: 345_000}
"""Bytes of a worker that are enough for so many workers, but not for one less."""


@pytest.mark.parametrize(
    ("least", "leaving", "fits"), [(2, (), True), (2, (1,), True), (2, (0, 2), False), (3, (), True), (3, (1,), False)]
)
def test_workers_may_leave_if_the_model_fits_without_them(least: int, leaving: tuple[int, ...], fits: bool) -> None:
    why = misfit_without(driver(ENOUGH_FOR[least]), SETTINGS, leaving)
    assert (why is None) == fits
    assert fits or "bytes more than the" in str(why)


def test_a_spare_takes_the_place_of_one_that_leaves() -> None:
    memory = ENOUGH_FOR[3]
    assert misfit_without(driver(memory, [7]), SETTINGS, [1]) is None
    assert misfit_without(driver(memory, [7], unable=[7]), SETTINGS, [1]) is not None, "a stopped one cannot"
    assert misfit_without(driver(memory, [7]), SETTINGS, [1, 7]) is not None, "it leaves too"
    assert misfit_without(driver(memory, [7, 8]), SETTINGS, [1, 2]) is None


@pytest.mark.parametrize("request_", [{"what": "scale", "workers": 2}, {"what": "drain", "host": "far"}], ids=["scale", "drain"])
def test_a_request_that_would_leave_too_little_memory_is_refused(request_: dict[str, Any]) -> None:
    known, done = driver(ENOUGH_FOR[3]), list[str]()
    hosts = SimpleNamespace(
        present={"host": SimpleNamespace(spares=0), "far": SimpleNamespace(spares=0)}, capacity=3, workers_of=lambda _: [2]
    )
    coordinator: Any = SimpleNamespace(
        hosts=hosts,
        driver=known,
        least=1,
        left_without=lambda _: 2,
        no_room_without=lambda leaving: misfit_without(known, SETTINGS, leaving),
        drain=done.append,
        scale=done.append,
    )
    told = answer(coordinator, request_)
    assert "the model does not fit into memory in 1 to 2 stages" in told["refused"]
    assert done == []
    known.view = driver(ENOUGH_FOR[2]).view
    assert "refused" not in answer(coordinator, {"what": "scale", "workers": 3})
    done.clear()
    assert "refused" not in answer(coordinator, request_)
    assert len(done) == 1

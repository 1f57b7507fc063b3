"""Tests what hosts have for members: the memory of spares is not theirs, and that of a spare that has become a member is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic.agent.resources import site
from elastic.host.facts import HostFacts
from elastic.plan.fleet import SHARE, Fleet
from elastic.view import Member


def host(name: str = "a", room: int = 2, spares: int = 1, memory: int | None = 1000) -> Any:
    return SimpleNamespace(name=name, room=room, spares=spares, facts=HostFacts(processors=4, memory=memory))


@pytest.mark.parametrize(("members", "spares"), [(2, 1), (1, 1), (3, 0), (4, 0)])
def test_members_share_what_spares_leave(members: int, spares: int) -> None:
    found = site([host()], ["a"] * members, 1, 90)
    fleet = Fleet.of([Member(worker=number, host="a", address="x") for number in range(members)], found)
    assert sum(fleet.memory.values()) == pytest.approx(SHARE * 1000 - 90 * spares, abs=members)


def test_each_host_has_its_own_spares() -> None:
    found = site([host(), host("b", spares=0), host("c", memory=None)], ["a", "a", "b", "b", "c"], 2, 90)
    assert dict(found.memory) == {"a": 900, "b": 1000}
    assert dict(found.places) == {"a": 2.0, "b": 2.0, "c": 2.0}


def test_spares_may_leave_nothing() -> None:
    assert site([host(spares=20)], ["a", "a"], 1, 90).memory["a"] == 0

"""Tests jobs of several hosts, with replicas and segments, in which a bit flips: copies on another host show it, and all go back."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import elastic
from tests.hosts.agents import Cluster, cluster
from tests.recovery import flipping

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 24


@functools.cache
def calm() -> Any:
    return elastic.run(flipping.train, args=["adamw", STEPS, {}], workers=1).value


@pytest.fixture
def hosts(leftovers: Any) -> Iterator[Cluster]:
    with cluster(leftovers.directory / "cluster") as made:
        made.folder.mkdir(exist_ok=True)
        yield made
    shutil.rmtree(made.folder)


ROWS = [
    ("ready", "live", "exp_avg", None, 13),
    ("backward", "live", "exp_avg", 2, None),
    ("ready", "replica", "param", None, 12),
    ("arrival", "gathered", "first", 2, None),
]


@pytest.mark.parametrize(("phase", "what", "state", "named", "back"), [pytest.param(*row, marks=pytest.mark.long) for row in ROWS])
def test_one_bit_on_one_of_two_hosts(hosts: Cluster, phase: str, what: str, state: str, named: int | None, back: int | None) -> None:
    arguments = ["adamw", STEPS, {"2": [[phase, 14, what, state]]}]
    target = f"{flipping.__file__}:train"
    first = hosts.host(*arguments, hosts_min=2, target=target)
    first.until("waiting for 1 more host")
    second = hosts.host(*arguments, target=target)
    one, other = first.result(), second.result()
    assert one["digest"] == other["digest"] == calm()["digest"]
    assert sum(one["flipped"]) == 1
    assert first.incidents == second.incidents
    (incident,) = first.incidents
    assert (incident["kind"], incident["worker"], incident["went_back_to"], incident["restored"]) == ("damage", named, back, None)
    found = incident["findings"][0]
    assert found["digests"]
    assert len({each.partition("(host ")[2] for each in found["digests"]}) == (2 if named is None else 1)

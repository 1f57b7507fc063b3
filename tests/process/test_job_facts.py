from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from elastic.agent.job_facts import JobFacts
from elastic.host.packed import Packed
from elastic.membership.founding import found
from tests.etcd_access import mark
from tests.membership.test_founding import ready


def view(epoch: int, attempt: int) -> dict[str, Any]:
    return {"epoch": epoch, "attempt": attempt}


def proposed(epoch: int, attempt: int) -> dict[str, Any]:
    proposal = Packed({"view": view(epoch, attempt), "transfers": []})
    return {"type": "propose", "epoch": epoch, "attempt": attempt, "proposal": proposal}


def committed(epoch: int, attempt: int) -> dict[str, Any]:
    return {"type": "view", "epoch": epoch, "attempt": attempt, "view": Packed(view(epoch, attempt))}


def founded() -> JobFacts:
    return JobFacts(settings={}, founder={}, views=[view(1, 0)])


def test_the_committed_view_stays_known_however_many_are_proposed() -> None:
    facts = founded().knowing(committed(2, 1))
    for attempt in range(1, 9):
        facts = facts.knowing(proposed(3, attempt))
    known = JobFacts.from_json(json.loads(json.dumps(facts.to_json())))
    assert known.views == [view(2, 1), view(3, 6), view(3, 7), view(3, 8)]
    assert (known.committed, known.heard) == ((2, 1), (3, 8))
    facts = facts.knowing(committed(3, 8))
    assert (facts.to_json()["views"], facts.committed) == ([view(3, 8)], (3, 8))


def test_an_attempt_that_stopped_workers_is_known_even_if_nothing_was_proposed() -> None:
    assert founded().knowing({"type": "quiesce", "epoch": 2, "attempt": 4}).heard == (2, 4)
    assert founded().knowing({"type": "stop"}).heard == (0, 0)


def test_two_hosts_know_together_what_either_knows() -> None:
    one = replace(founded(), last_worker=3).knowing(proposed(2, 1))
    other = JobFacts(settings={}, founder={}, views=[view(2, 1)], last_worker=5)
    assert one.joined(other).views == [view(1, 0), view(2, 1)]
    assert one.joined(other).last_worker == 5
    assert one.joined(other).heard == other.joined(one).heard == (2, 1)


def test_of_two_hosts_the_one_that_heard_of_the_later_commit_knows_the_last_view() -> None:
    behind, ahead = founded().knowing(committed(2, 1)).knowing(proposed(3, 1)), founded().knowing(committed(3, 1))
    for both in (behind.joined(ahead), ahead.joined(behind)):
        assert both.views == [view(3, 1), view(2, 1)]
        assert both.committed == (3, 1)


def test_the_last_view_is_the_newest_that_was_heard_of_or_is_named_at_etcd() -> None:
    first = found({0: ready(profile=True), 1: ready()}, None)
    second, third = replace(first, epoch=2, attempt=1), replace(first, epoch=3, attempt=2)
    facts = JobFacts(settings={}, founder={}, views=[first.to_json()])
    assert facts.last(None) is None, "nobody has heard that it was committed"
    assert facts.last(mark(first)) == first
    facts = facts.knowing({"type": "view", "epoch": 2, "attempt": 1, "view": Packed(second.to_json())})
    assert facts.last(None) == facts.last(mark(first)) == facts.last(mark(second)) == second
    assert facts.last(mark(third)) is None, "it was committed, and this host does not know it"
    facts = facts.knowing({"type": "propose", "epoch": 3, "attempt": 2, "proposal": Packed({"view": third.to_json()})})
    assert facts.last(mark(third)) == third
    assert facts.last(None) == second

from __future__ import annotations

import json
from typing import Any

from elastic.agent.job_facts import JobFacts
from elastic.host.packed import Packed


def view(epoch: int, attempt: int) -> dict[str, Any]:
    return {"epoch": epoch, "attempt": attempt}


def proposed(epoch: int, attempt: int) -> dict[str, Any]:
    return {"type": "propose", "proposal": Packed({"view": view(epoch, attempt), "transfers": []})}


def test_the_committed_view_stays_known_however_many_are_proposed() -> None:
    facts = JobFacts(settings={}, founder={}, views=[view(1, 0)])
    facts = facts.knowing({"type": "view", "view": Packed(view(2, 1))})
    for attempt in range(1, 9):
        facts = facts.knowing(proposed(3, attempt))
    known = JobFacts.from_json(json.loads(json.dumps(facts.to_json()))).views
    assert known == [view(2, 1), view(3, 6), view(3, 7), view(3, 8)]
    assert facts.knowing({"type": "view", "view": Packed(view(3, 8))}).to_json()["views"] == [view(3, 8)]


def test_two_hosts_know_together_what_either_knows() -> None:
    one = JobFacts(settings={}, founder={}, views=[view(1, 0)], last_worker=3).knowing(proposed(2, 1))
    other = JobFacts(settings={}, founder={}, views=[view(2, 1)], last_worker=5)
    assert one.joined(other).views == [view(1, 0), view(2, 1)]
    assert one.joined(other).last_worker == 5

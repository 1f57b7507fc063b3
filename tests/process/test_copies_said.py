"""Tests what a job says of the number of copies of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from elastic.agent.copies import copies_said
from elastic.plan.site import Site
from elastic.view import View
from tests.recovery.recovering import view_of


def kept(hosts: Sequence[str], copies: int, *, segments: bool = True) -> View:
    view = view_of(range(4), hosts=hosts)
    return replace(view, members=tuple(replace(each, segment=segments) for each in view.members), site=Site(copies=copies))


@pytest.mark.parametrize(
    ("hosts", "copies", "before", "said"),
    [
        ("abc", 3, None, None),
        ("abc", 3, 3, None),
        ("abcd", 2, 1, "there are 2 copies of the state again"),
        ("ab", 3, 2, None),
        (
            "ab",
            3,
            3,
            "there are 2 hosts, so there are 2 copies of the state instead of copies=3: if 2 hosts are lost at once, the job goes on from "
            "a checkpoint",
        ),
        (
            "a",
            2,
            None,
            "there is 1 host, so there is 1 copy of the state instead of copies=2: if this host is lost, the job goes on from a checkpoint",
        ),
    ],
)
def test_hosts_that_are_too_few_for_the_copies_are_named(hosts: str, copies: int, before: int | None, said: str | None) -> None:
    found = copies_said(kept(hosts, copies), before, shared=True)
    assert found == said


def test_a_job_of_one_host_does_not_say_what_everybody_expects() -> None:
    assert copies_said(kept("a", 2), None, shared=False) is None
    assert copies_said(kept("a", 2, segments=False), 1, shared=False) is None
    assert copies_said(kept("a", 1), None, shared=False) is None
    assert "1 copy of the state instead of copies=3" in (copies_said(kept("a", 3), None, shared=False) or "")


def test_without_segments_workers_count() -> None:
    said = copies_said(kept("a", 9, segments=False), None, shared=False)
    assert said is not None
    assert said.startswith("there are 4 workers, so there are 4 copies of the state instead of copies=9: if 4 workers are lost at once")

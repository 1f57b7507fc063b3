"""Tests how outcomes are left at etcd."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.membership import outcomes
from elastic.membership.etcd import ROOT, VALUE_BYTES
from tests.etcd_access import EtcdClient

DONE: dict[str, Any] = {"type": "done", "value": {"digest": "x"}, "epoch": 3, "stopped": False, "incidents": [{"kind": "death"}]}


def test_an_outcome_is_there_for_its_own_incarnation_and_ends_with_its_lease(client: EtcdClient) -> None:
    outcomes.leave(client, "job", "first", DONE)
    assert outcomes.left(client, "job", "first") == DONE
    assert outcomes.left(client, "job", "second") is None
    entry = client.get(f"{ROOT}job/ended/first")
    assert entry is not None
    client.revoke(entry.lease)
    assert outcomes.left(client, "job", "first") is None


def test_what_is_too_large_is_left_out(client: EtcdClient) -> None:
    outcomes.leave(client, "job", "first", {**DONE, "incidents": ["x" * VALUE_BYTES]})
    assert outcomes.left(client, "job", "first") == {**DONE, "incidents": []}
    outcomes.leave(client, "job", "first", {**DONE, "value": "x" * VALUE_BYTES})
    found = outcomes.left(client, "job", "first") or {}
    assert (found["type"], found["kind"]) == ("failed", "JobFailed")
    assert "has ended well" in found["message"]


@pytest.mark.parametrize("text", ["", "no JSON", "[]"])
def test_what_no_agent_wrote_is_no_outcome(client: EtcdClient, text: str) -> None:
    client.put(f"{ROOT}job/ended/first", text)
    assert outcomes.left(client, "job", "first") is None

"""Tests that a host with another script than the job's is refused, with the reason, and the other hosts go on or wait on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.agents import SCRIPT, Cluster
from tests.hosts.test_hosts import STEPS, calm, hosts  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

REASON = "its script.py is not the file that the job began with: copy the same file to every host"


def edited(folder: Path) -> str:
    """A train function in a file that differs from the tests' script by a comment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(SCRIPT.read_text() + "# edited\n")
    return f"{folder / 'script.py'}:train"


def test_a_founder_waits_on_for_a_host_with_its_script(hosts: Cluster) -> None:  # noqa: F811
    first = hosts.host(STEPS, hosts_min=2, workers=1)
    first.until("waiting for 1 more host")
    other = hosts.host(STEPS, workers=1, target=edited(hosts.folder / "other"))
    assert REASON in other.failure(2)
    assert REASON in first.said
    assert first.process.poll() is None
    third = hosts.host(STEPS, workers=1)
    assert first.result() == third.result() == calm()


def test_a_job_that_trains_goes_on_without_a_host_with_another_script(hosts: Cluster) -> None:  # noqa: F811
    copy = hosts.folder / "script.py"
    copy.write_text(SCRIPT.read_text())
    target = f"{copy}:train"
    first = hosts.host(STEPS * 4, {}, 0.2, workers=1, target=target, hosts_min=1)
    first.has_members()
    copy.write_text(SCRIPT.read_text() + "# edited\n")
    assert REASON in hosts.host(STEPS * 4, {}, 0.2, workers=1, target=target).failure(2)
    same = hosts.host(STEPS * 4, {}, 0.2, workers=1)
    assert first.result() == same.result() == calm(STEPS * 4)
    assert [each["kind"] for each in first.incidents] == ["join"]


def test_an_agent_without_its_secret_file_says_so(hosts: Cluster) -> None:  # noqa: F811
    absent = hosts.folder / "absent"
    assert f"secret_file='{absent}' cannot be read: No such file" in hosts.host(STEPS, secret=absent).failure(2)

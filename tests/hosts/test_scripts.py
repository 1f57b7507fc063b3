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


def with_module(folder: Path, text: str) -> str:
    """A train function in the tests' script, in a folder of its own, which imports a module of this text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text("import more\n" + SCRIPT.read_text().replace("from __future__ import annotations\n", ""))
    (folder / "more.py").write_text(text)
    return f"{folder / 'script.py'}:train"


def test_the_founding_begins_again_without_a_host_whose_module_differs(hosts: Cluster) -> None:  # noqa: F811
    ours, theirs = with_module(hosts.folder / "ours", "X = 1\n"), with_module(hosts.folder / "theirs", "X = 2\n")
    first = hosts.host(STEPS, hosts_min=2, workers=1, target=ours)
    first.until("waiting for 1 more host")
    other = hosts.host(STEPS, workers=1, target=theirs)
    reason = f"its {hosts.folder / 'theirs' / 'more.py'} is not the file that the job began with: copy the same file to every host"
    assert reason in other.failure(2)
    first.until(reason)
    assert first.said.count("waiting for 1 more host") == 2
    third = hosts.host(STEPS, workers=1, target=ours)
    assert first.result() == third.result() == calm()


def test_a_founder_whose_script_is_edited_once_it_is_there_is_refused(hosts: Cluster) -> None:  # noqa: F811
    copy = hosts.folder / "script.py"
    copy.write_text(SCRIPT.read_text())
    first = hosts.host(STEPS, hosts_min=3, workers=1)
    first.until("waiting for 2 more hosts")
    other = hosts.host(STEPS, workers=1, target=f"{copy}:train")
    first.until("is there with room for 1 worker")
    copy.write_text(SCRIPT.read_text() + "# edited\n")
    third = hosts.host(STEPS, workers=1)
    assert f"its {copy} is not the file that the job began with" in other.failure(2)
    fourth = hosts.host(STEPS, workers=1)
    assert first.result() == third.result() == fourth.result() == calm()


def test_a_host_that_joins_with_another_module_is_refused_and_the_job_goes_on(hosts: Cluster) -> None:  # noqa: F811
    target, folder = with_module(hosts.folder / "ours", "X = 1\n").replace(":train", ":until"), hosts.folder / "progress"
    module = hosts.folder / "ours" / "more.py"
    folder.mkdir()
    first = hosts.host(str(folder), 0.05, workers=1, target=target, hosts_min=1)
    first.has_members()
    module.write_text("X = 2\n")
    other = hosts.host(str(folder), 0.05, workers=2, target=target)
    assert f"its {module} is not the file that the job began with" in other.failure(2)
    module.write_text("X = 1\n")
    same = hosts.host(str(folder), 0.05, workers=1, target=target)
    same.has_members()
    (folder / "stop").write_text(str(max(int(path.read_text()) for path in folder.glob("*.step")) + 60))
    assert first.result() == same.result()
    assert [each["kind"] for each in first.incidents if each["kind"] != "rebalance"] == ["join"]


def test_an_agent_without_its_secret_file_says_so(hosts: Cluster) -> None:  # noqa: F811
    absent = hosts.folder / "absent"
    assert f"secret_file='{absent}' cannot be read: No such file" in hosts.host(STEPS, secret=absent).failure(2)


def test_a_founder_says_how_many_workers_it_waits_for(hosts: Cluster) -> None:  # noqa: F811
    first = hosts.host(4, workers=1, min_workers=3)
    first.until("waiting for hosts with room for 2 more workers, since the job needs 3 (min_workers)")
    second = hosts.host(4, workers=1)
    first.until("waiting for hosts with room for 1 more worker, since the job needs 3 (min_workers)")
    third = hosts.host(4, workers=1)
    assert first.result() == second.result() == third.result()

"""Tests that a host of several leaves a job when it gets a notice of termination, in the time that the notice leaves."""

from __future__ import annotations

import signal

import pytest

from tests.hosts.agents import Cluster
from tests.hosts.test_hosts import STEPS, calm, hosts  # noqa: F401  (a fixture)
from tests.process.metadata_service import serving

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

ACTION = "/latest/meta-data/spot/instance-action"


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_notice_drains_the_host_and_no_step_is_taken_again(hosts: Cluster, leaver: int) -> None:  # noqa: F811
    with serving() as service:
        service.answers["/latest/api/token"] = (200, "token")
        given = [{"drain_on": f"aws={service.address}"} if number == leaver else {} for number in range(2)]
        both = [hosts.host(STEPS * 3, {}, 0.05, hosts_min=2, **given[0])]
        both[0].until("waiting for 1 more host")
        both.append(hosts.host(STEPS * 3, {}, 0.05, **given[1]))
        for host in both:
            host.has_members()
        service.answers[ACTION] = (200, '{"action": "stop", "time": "2023-11-14T22:14:20Z"}')
        assert both[leaver].process.wait(30) == 128 + signal.SIGTERM, both[leaver].said
    assert "this machine is about to be taken away, in 60 s (AWS: this spot instance gets the action 'stop')" in both[leaver].said
    stays = both[1 - leaver]
    assert stays.result() == calm(STEPS * 3)
    assert [(each["kind"], each["steps_redone"]) for each in stays.incidents] == [("drain", 0)]


def test_a_host_whose_time_is_over_before_the_boundary_leaves_and_the_others_go_on(hosts: Cluster) -> None:  # noqa: F811
    notice = hosts.folder / "leave"
    first = hosts.host(4, {}, 6.0, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(4, {}, 6.0, drain_on=f"file:{notice}")
    for host in (first, second):
        host.has_members()
    notice.write_text("3")
    assert second.process.wait(20) == 128 + signal.SIGTERM, second.said
    assert "the time that this machine has left is over" in second.said
    assert first.result() == calm(4)
    assert first.incidents[0]["kind"] == "death"
    assert "its connection ended" in first.said

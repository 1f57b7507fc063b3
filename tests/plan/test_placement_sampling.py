"""Links are measured once per pair of hosts, and expanded to all pairs of workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few

from elastic.errors import PlanError
from elastic.plan.placement import place
from elastic.plan.placement.sampling import Link, expanded, representatives

host_lists = st.lists(st.sampled_from("abcde"), min_size=1, max_size=14)


@few
@given(host_lists, st.randoms())
def test_one_link_per_pair_of_hosts_restores_a_network_of_hosts(hosts, random):
    links = {}
    for one in sorted(set(hosts)):
        for two in sorted(set(hosts)):
            links[one, two] = links.get((two, one), Link(random.random(), 1 + random.random()))
    pairs = representatives(hosts)
    assert len(pairs) == len({frozenset((hosts[one], hosts[two])) for one, two in pairs})
    latency, bandwidth = expanded(hosts, {(one, two): links[hosts[one], hosts[two]] for one, two in pairs})
    for one in range(len(hosts)):
        for two in range(len(hosts)):
            expected = links[hosts[one], hosts[two]] if one != two else Link(0, np.inf)
            assert (latency[one, two], bandwidth[one, two]) == pytest.approx(expected)


def test_the_number_grows_with_hosts_not_workers_and_is_spread_over_workers():
    hosts = [f"h{worker // 8}" for worker in range(512)]
    pairs = representatives(hosts)
    assert len(pairs) == 64 * 63 // 2 + 64
    assert max(Counter(worker for pair in pairs for worker in pair).values()) <= 9


def test_a_pair_that_was_measured_has_its_own_link_and_others_the_mean():
    hosts = ["a", "a", "b"]
    measured = {(0, 1): Link(0.5, 9.0), (0, 2): Link(1.0, 2.0), (1, 2): Link(3.0, 4.0), (2, 1): Link(5.0, 6.0)}
    latency, bandwidth = expanded(hosts, measured)
    assert (latency[0, 2], latency[2, 0], latency[1, 2], latency[2, 1]) == (1.0, 1.0, 3.0, 5.0)
    assert (bandwidth[1, 0], bandwidth[2, 1]) == (9.0, 6.0)
    hosts = ["a", "b", "a", "b"]
    latency, _ = expanded(hosts, {(0, 2): Link(0.0, 1.0), (1, 3): Link(0.0, 1.0), (0, 1): Link(1.0, 1.0), (2, 1): Link(2.0, 1.0)})
    assert latency[0, 3] == latency[3, 2] == 1.5


def test_what_was_not_measured_is_named():
    with pytest.raises(PlanError, match="no link was measured from host a to b"):
        expanded(["a", "b"], {})
    with pytest.raises(PlanError, match="no link was measured from host a to a"):
        expanded(["a", "a"], {})
    with pytest.raises(PlanError, match=r"pair \(0, 5\) is not of two of the 2 workers"):
        expanded(["a", "b"], {(0, 5): Link(1.0, 1.0)})
    assert expanded(["a"], {})[1] == np.inf


def test_expanded_links_can_be_placed():
    hosts = [f"h{worker % 3}" for worker in range(12)]
    measured = {(one, two): Link(1e-4, 1e10) if hosts[one] == hosts[two] else Link(1e-3, 1e9) for one, two in representatives(hosts)}
    found = place(*expanded(hosts, measured), 3, 1e10, 1e6, budget=400_000)
    assert all(len({hosts[device] for device in group}) == 1 for group in found.groups)

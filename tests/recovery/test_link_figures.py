"""Tests the conversion of measured links between workers to links between hosts."""

from __future__ import annotations

from elastic.control.link_figures import LinkFigures
from elastic.plan.site import BETWEEN, LinkSpeed, Site

HOSTS = {0: "a", 1: "a", 2: "b"}


def test_the_best_that_a_pair_of_hosts_did_is_what_it_can_do():
    link_figures = LinkFigures()
    link_figures.note(0, [[2, 2e-4, 1e9], [1, 1e-5, 8e9]])
    link_figures.note(2, [[1, 1e-4, 3e9], [0, 5e-4, 2e9]])
    assert link_figures.links(HOSTS, Site()) == {
        ("a", "a"): LinkSpeed(latency_s=1e-5, bytes_per_s=8e9),
        ("a", "b"): LinkSpeed(latency_s=1e-4, bytes_per_s=3e9),
    }


def test_what_is_newer_counts_and_strangers_do_not():
    link_figures = LinkFigures()
    link_figures.note(0, [[2, 2e-4, 1e9], [9, 1e-9, 9e9]])
    link_figures.note(0, [[2, 2e-4, 5e8]])
    assert link_figures.links(HOSTS, Site()) == {("a", "b"): LinkSpeed(latency_s=2e-4, bytes_per_s=5e8)}
    assert link_figures.links({0: "a"}, Site()) == {}


def test_without_a_rate_there_is_no_link_and_without_a_latency_the_known_one():
    link_figures = LinkFigures()
    link_figures.note(0, [[1, 1e-5, None], [2, None, 1e9]])
    assert link_figures.links(HOSTS, Site()) == {("a", "b"): LinkSpeed(latency_s=BETWEEN.latency_s, bytes_per_s=1e9)}

"""Checks this host before it joins a job: links to the other agents, a product of matrices, memory, processors, the run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic.agent.agent_link import Address
from elastic.agent.fitness import HostReport
from elastic.agent.link_probes import LinkProbes, LinkReport
from elastic.host.measures import Steal, available_bytes, unwritable


class NodeCheck:
    """One check; `report` is complete when `done` is called, once."""

    def __init__(self, probes: LinkProbes, directory: Path, others: Mapping[str, Address], done: Callable[[], None]) -> None:
        self._probes, self._directory, self._others, self._done, self._steal = probes, directory, others, done, Steal()
        self._links: dict[str, LinkReport] | None = None
        self._computed: dict[str, Any] | None = None
        self.report: HostReport | None = None
        probes.check(others, self._linked)

    def again(self) -> NodeCheck:
        """Returns another check of the same kind, which begins now."""
        return NodeCheck(self._probes, self._directory, self._others, self._done)

    def measured(self, computed: dict[str, Any]) -> None:
        """Takes what a process of the fork server has computed, the result of `worker.node_check.measured` or `{"broken": why}`."""
        self._computed = computed
        self._check()

    def _linked(self, links: dict[str, LinkReport]) -> None:
        self._links = links
        self._check()

    def _check(self) -> None:
        if self.report is None and self._links is not None and self._computed is not None:
            self.report = HostReport(
                links=self._links,
                available=available_bytes(),
                steal=self._steal.part(),
                disk=unwritable(self._directory),
                **self._computed,
            )
            self._done()

"""One worker inside the test's process, for tests that need no second one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch

from elastic.worker import job as jobs
from elastic.worker.told_steps import ToldSteps


class LoneJob(harness.FakeJob):
    """A job of one worker, in this process."""

    def __init__(self) -> None:
        self.worker, self.workers, self.host, self.secret, self.tls = 0, 1, "here", b"secret of a test", None
        self.profile = self.exact = self.leader = True
        self.stop_requested = self.pause_requested = self.recovers = False
        self.progressed = []
        self.steps = ToldSteps(lambda _: None, lambda: True)
        self.sent: list[dict[str, Any]] = []

    def send(self, message):
        self.sent.append(message)

    def announce(self, ready):
        self.ready = ready
        return harness.View.from_json(harness.agree([ready], 1))


@pytest.fixture
def lone_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoneJob]:
    job = LoneJob()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(jobs, "_current", job)
    yield job
    torch.set_num_threads(threads)

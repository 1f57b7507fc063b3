"""A worker without a job, and jobs of one layer in forked processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic.worker.job import Job
from elastic.worker.plain import backwards
from tests.recovery import forks


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LAYERS", 1)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker that has not announced itself: bodies are tried out before."""
    monkeypatch.setattr(torch.autograd, "backward", backwards._original)
    errors: list[BaseException] = []
    job = SimpleNamespace(profile=False, gpu=None, behind=None, clips=None, weighs=None, raised=errors.append, errors=errors)
    job.prepare = lambda *given, **options: Job.prepare(job, *given, **options)  # pyright: ignore[reportArgumentType]
    job.clip_grad_norm_ = lambda norm: Job.clip_grad_norm_(job, norm)  # pyright: ignore[reportArgumentType]
    job.weighted = lambda loss, weight: Job.weighted(job, loss, weight)  # pyright: ignore[reportArgumentType]
    return job

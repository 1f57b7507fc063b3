"""Tests that a framework's training whose data is loaded by processes has the bits of one without, also if a worker dies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.loading.test_training import noted, one_layer  # noqa: F401  (fixtures)
from tests.recovery import forks
from tests.recovery.forks import die, when

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers", "one_layer")]


def accelerate(folder: Path, processes: int) -> Any:
    pytest.importorskip("accelerate", reason="needs accelerate")
    from tests.frameworks import loops

    return partial(loops.accelerated, processes=processes)


def lightning(folder: Path, processes: int) -> Any:
    pytest.importorskip("lightning", reason="needs lightning")
    from tests.frameworks import modules

    return partial(modules.train, processes=processes)


def huggingface(folder: Path, processes: int) -> Any:
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    from tests.frameworks import trainings

    return partial(trainings.train, folder=str(folder), dataloader_num_workers=processes)


@pytest.mark.parametrize("framework", [accelerate, lightning, huggingface])
def test_processes_load_what_the_worker_would(framework: Any, tmp_path: Path, noted: Path) -> None:  # noqa: F811
    def prepare(job: Any) -> None:
        if job.worker == 1:
            when(job, "backward", 3, die)

    calm = forks.run(1, train=framework(tmp_path, 0)).results[0]
    assert not list(noted.iterdir())
    agent = forks.run(2, train=framework(tmp_path, 2), prepare=prepare, least=2)
    assert sorted(agent.results) == [0, 2]
    assert len(list(noted.iterdir())) > 8, "micro-batches that processes have loaded"
    assert {result["digest"] for result in agent.results.values()} == {calm["digest"]}

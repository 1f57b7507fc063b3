"""Tests that a framework's training whose data is loaded by processes has the bits of one without, also if a worker dies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize("framework", [accelerate, lightning])
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


ROOT = Path(__file__).parents[2]
DOCUMENTED = 'what is padded has no label."""\n'
NOTES = """
    if Path("/proc/self/comm").read_text().startswith("elastic-load"):
        Path("loaded").touch()
"""
SEEDED = "    torch.manual_seed(1)\n"
WAITS = """
    from elastic.worker.loading.pool import Pool
    from tests.loading import data

    Pool.start = data.wait_for_processes
"""


@pytest.mark.timeout(600)
def test_processes_load_for_a_trainer_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real job: torch's own processes load for evaluations, and the workers of test jobs may not have any."""
    for package in ("transformers", "datasets", "accelerate"):
        pytest.importorskip(package, reason=f"needs {package}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain = (ROOT / "examples" / "hf_trainer.py").read_text().replace("num_train_epochs=4", "num_train_epochs=2")
    loads = plain.replace("import random\n", "import random\nfrom pathlib import Path\n")
    loads = loads.replace(DOCUMENTED, DOCUMENTED + NOTES).replace(SEEDED, SEEDED + WAITS)
    digests = []
    for name, text, workers in (("one", plain, "1"), ("two", loads.replace("use_cpu=True", "use_cpu=True, dataloader_num_workers=2"), "2")):
        (tmp_path / f"{name}.py").write_text(text)
        command = [sys.executable, "-m", "elastic.cli.main", "run", f"{name}.py:main", "--workers", workers]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.splitlines()[-1])
    assert (tmp_path / "loaded").exists()
    assert digests[0] == digests[1]
    assert re.fullmatch('"[0-9a-f]{64}"', digests[0])

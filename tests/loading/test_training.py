"""Tests that trainings whose data is loaded by processes have the bits of those without, whoever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from elastic.worker.job import Job
from elastic.worker.loading.pool import Answer, Key, Pool
from tests.conftest import Leftovers
from tests.loading import data
from tests.plain import loops
from tests.recovery import forks
from tests.recovery.forks import Agent, die, when

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers", "one_layer", "noted")]

LOADER = DataLoader(loops.Rows(), batch_size=loops.SIZES["batch_size"], shuffle=True, num_workers=2)
IN_ORDER = DataLoader(loops.Rows(), batch_size=loops.SIZES["batch_size"], num_workers=2)
Train = Callable[[Job], dict[str, Any]]


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LAYERS", 1)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which workers note which keys they got from processes."""
    folder, take = tmp_path / "noted", Pool.take
    folder.mkdir()

    def takes(pool: Pool, key: Key, timeout_s: float) -> Answer:
        answer = take(pool, key, timeout_s)
        if answer.found:
            (folder / "-".join(map(str, key))).touch()
        return answer

    monkeypatch.setattr(Pool, "start", data.wait_for_processes)
    monkeypatch.setattr(Pool, "take", takes)
    monkeypatch.setattr(forks, "TIMEOUT_S", 100)
    return folder


@cache
def calm(train: Train) -> dict[str, Any]:
    return forks.run(1, train=train).results[0]


def check(agent: Agent, noted: Path, wanted: dict[str, Any]) -> None:
    assert len(list(noted.iterdir())) > 2 * 8  # micro-batches, of 5 steps of 8
    assert agent.results[0]["reports"] == wanted["reports"]
    assert agent.results[0]["digest"] == wanted["digest"]


by_loop = partial(loops.by_loop, data=LOADER)
by_trainer = partial(loops.by_trainer, data=LOADER)
TRAININGS = [pytest.param(by_loop, id="loop"), pytest.param(by_trainer, id="trainer")]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("train", TRAININGS)
def test_it_has_the_bits_of_a_training_without_processes(train: Train, workers: int, noted: Path) -> None:
    check(forks.run(workers, train=train), noted, calm(partial(loops.by_trainer, data=loops.Rows())))


@pytest.mark.parametrize("train", [loops.by_loop, loops.by_trainer])
def test_an_order_without_shuffling_is_kept(train: Any, noted: Path) -> None:
    in_order = calm(partial(loops.by_loop, data=DataLoader(loops.Rows(), batch_size=32)))
    check(forks.run(2, train=partial(train, data=IN_ORDER)), noted, in_order)
    assert in_order["digest"] != calm(partial(loops.by_trainer, data=loops.Rows()))["digest"]


@pytest.mark.parametrize("train", TRAININGS)
@pytest.mark.parametrize("least", [1, 2], ids=["shrinks", "replaced"])
def test_a_worker_that_dies_changes_nothing_and_leaves_no_process(train: Train, least: int, noted: Path) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 2, die)

    agent = forks.run(2, train=train, prepare=prepare, least=least)
    check(agent, noted, calm(partial(loops.by_trainer, data=loops.Rows())))


SCRIPT = '''
import json, os, signal, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
import elastic
from elastic.worker.loading.pool import Pool
from tests.loading.data import wait_for_processes

Pool.start = wait_for_processes

class Rows(Dataset):
    """Notes which process loads; the first loader process that loads the sample `kill` kills itself."""

    def __init__(self, folder, kill):
        self.folder, self.kill = folder, kill

    def __len__(self):
        return 96

    def __getitem__(self, index):
        if get_worker_info() is not None:
            Path(self.folder, f"loader-{os.getpid()}").touch()
            if index == self.kill:
                try:
                    Path(self.folder, "killed").touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(16) + index, index % 3

def train(job, folder, processes, kills):
    torch.manual_seed(1)
    model = torch.nn.Linear(16, 3)
    data = DataLoader(Rows(folder, 17 if "loader" in kills else -1), batch_size=16, shuffle=True, num_workers=processes)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = job.prepare(model, optimizer, data, micro_batch_size=4, steps=60)
    losses = []
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.report is not None:
            losses.append(loader.report.loss)
            Path(folder, f"worker-{job.worker}-{os.getpid()}").touch()
            if "worker" in kills and job.worker == 1 and loader.report.step == 30:
                os.kill(os.getpid(), signal.SIGKILL)
    return [losses[-1], loader.digest()]

if __name__ == "__main__":
    folder, processes, *kills = sys.argv[1:]
    result = elastic.run(train, workers=2, args=[folder, int(processes), kills])
    print(json.dumps([*result.value, [incident["kind"] for incident in result.incidents]]))
'''
ROOT = Path(__file__).parents[2]


def run(folder: Path, processes: int, *kills: str) -> list[Any]:
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "train.py"), str(folder), str(processes), *kills]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(done.stdout.splitlines()[-1]), done.stderr]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(tmp_path_factory.mktemp("without") / "run", 0)[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", [(), ("loader",), ("worker",), ("loader", "worker")], ids=lambda kills: "+".join(kills) or "none")
def test_a_script_has_the_same_bits_and_its_job_leaves_nothing(
    kills: tuple[str, ...], without: list[Any], tmp_path: Path, leftovers: Leftovers
) -> None:
    shared = set(os.listdir("/dev/shm"))
    (loss, digest, incidents), said = run(tmp_path / "run", 2, *kills)
    assert [loss, digest] == without[:2]
    assert incidents == (["death"] if "worker" in kills else [])
    assert len(list(tmp_path.glob("run/loader-*"))) >= 4
    assert ("a process of the DataLoader died" in said) == (tmp_path / "run" / "killed").exists() == ("loader" in kills)
    leftovers.wait(5.0)
    assert leftovers.processes() == {}
    assert leftovers.files() == []
    assert set(os.listdir("/dev/shm")) <= shared

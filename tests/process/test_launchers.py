"""Programs that call `elastic.run` in other ways than `python script.py`: torchrun, `python -c`, pytest, a notebook."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import elastic
from elastic.errors import HostLost, JobFailed, SettingsError, Terminated
from elastic.launch import ranks
from elastic.settings import LaunchedRank, own_environment
from tests.conftest import Leftovers

ROOT = Path(__file__).parents[2]
RANKED = Path(__file__).with_name("ranked.py")
PROGRAM = (
    "import elastic\n\n"
    "def train(job):\n    return job.settings.workers\n\n"
    "if __name__ == '__main__':\n    print('returned', elastic.run(train, workers=2).value)\n"
)
RANK = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def called(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=400, check=False
    )


def set_rank(patch: pytest.MonkeyPatch, **changed: str | None) -> None:
    for name, value in {**RANK, **changed}.items():
        patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)


@pytest.mark.parametrize("local", ["2", None])
def test_there_is_a_worker_for_each_rank_of_a_host(monkeypatch: pytest.MonkeyPatch, local: str | None) -> None:
    set_rank(monkeypatch, LOCAL_WORLD_SIZE=local)
    with pytest.raises(SettingsError, match=rf"workers=1, but {local or 4} processes.*leave workers= out.*--nproc-per-node=1"):
        elastic.run("train:train", workers=1, secret="0123456789abcdef")
    found = ranks.check(shared=True)
    assert ranks.workers_of(found, None) == ranks.workers_of(found, int(local or 4)) == int(local or 4)


def test_without_a_launcher_the_number_of_workers_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rank(monkeypatch, RANK=None)
    with pytest.raises(SettingsError, match="workers= is missing"):
        elastic.run("train:train")


@pytest.mark.parametrize("local", ["1", "2"])
def test_hosts_that_would_train_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch, local: str) -> None:
    set_rank(monkeypatch, LOCAL_WORLD_SIZE=local, LOCAL_RANK="0")
    with pytest.raises(SettingsError, match=r"give elastic\.run etcd=, name= and secret="):
        ranks.check(shared=False)
    ranks.check(shared=True)


def test_workers_do_not_see_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rank(monkeypatch, MASTER_PORT="29500", TORCHELASTIC_RUN_ID="some", OTHER="kept")
    seen = own_environment()
    assert not [name for name in seen if name in RANK or name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    assert seen["OTHER"] == "kept"


class Ranks:
    """Local rank 0 and others of one host, each in a thread."""

    def __init__(self, of: int, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(ranks, "signal_with_parent", lambda number: None)
        meeting = uuid4().hex
        self.ranks = [LaunchedRank(rank=each, world=of, on_host=of, local=each, meeting=meeting) for each in range(of)]

    def run(self, launch: Callable[[], int]) -> list[Any]:
        def one(rank: LaunchedRank) -> Any:
            try:
                return ranks.hosted(rank, launch, lambda value: {"value": value}, lambda data: data["value"])
            except BaseException as error:
                return error

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return list(pool.map(one, self.ranks))


def test_all_ranks_of_a_host_get_the_result_of_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    assert Ranks(3, monkeypatch).run(lambda: launched.append(1) or 7) == [7, 7, 7]
    assert launched == [1]


@pytest.mark.parametrize("error", [JobFailed("worker 1 raised"), Terminated(143)], ids=["failed", "terminated"])
def test_all_ranks_of_a_host_get_the_error_of_the_job(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fails() -> int:
        raise error

    first, second = Ranks(2, monkeypatch).run(fails)
    assert first is error
    assert isinstance(second, SystemExit if isinstance(error, SystemExit) else JobFailed)
    assert str(second) == str(error)


def test_ranks_whose_first_one_dies_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies() -> int:
        raise RuntimeError("as a process that dies: without a word")

    monkeypatch.setattr(ranks, "_MEET_S", 0.2)  # it may die before the other one has come
    assert isinstance(Ranks(2, monkeypatch).run(dies)[1], HostLost)


def test_a_rank_whose_first_one_does_not_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_MEET_S", 0.1)
    found = Ranks(2, monkeypatch)
    found.ranks = found.ranks[1:]
    with pytest.raises(HostLost, match=r"local rank 0 of this host did not call elastic\.run"):
        raise found.run(lambda: 7)[0]


@pytest.mark.parametrize("changed", [{"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, {"LOCAL_RANK": None}, {"RANK": "some"}])
def test_a_program_alone_is_not_refused(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None]) -> None:
    set_rank(monkeypatch, **changed)
    ranks.check(shared=False)


def torchrun(folder: Path, ranks: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    options = ["--standalone", "--monitor-interval=0.2", f"--log-dir={folder / 'logs'}", f"--nproc-per-node={ranks}"]
    return called("-m", "torch.distributed.run", *options, *words, cwd=folder)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_torchrun_with_one_process_a_host_runs_a_job(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    done = torchrun(tmp_path, 1, "train.py")
    assert "returned 2" in done.stdout, done.stderr
    done = torchrun(tmp_path, 2, "train.py")
    assert done.stdout.splitlines().count("returned 2") == 2, done.stderr
    done = torchrun(tmp_path, 3, "train.py")
    assert done.returncode == 1
    assert "workers=2, but 3 processes of this program were started" in done.stderr


WHOLE = """
import sys, elastic
print("argument", sys.argv[1])
job = elastic.current_job()
print("worker", job.worker, "of", job.settings.workers)
"""


FAILS = """
import elastic
elastic.current_job()
raise ValueError("of the user's own")
"""


@pytest.mark.long
def test_torchrun_runs_a_script_that_runs_as_a_whole(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "whole.py").write_text(WHOLE)
    done = torchrun(tmp_path, 2, "whole.py", "--lr=1")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert sorted(line for line in said if line.startswith("worker")) == ["worker 0 of 2", "worker 1 of 2"]
    assert done.stdout.count("--lr=1") == 4  # lines of two processes may run into each other
    (tmp_path / "fails.py").write_text(FAILS)
    done = torchrun(tmp_path, 2, "fails.py")
    assert done.returncode == 1
    assert done.stderr.count("ValueError: of the user's own") == 1, done.stderr
    assert "launch/whole.py" not in done.stderr


def digests(out: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("ranked ")) for line in out.splitlines() if line.startswith("ranked ")]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the example by two workers of torchrun, none of which dies."""
    folder = tmp_path_factory.mktemp("calm")
    done = torchrun(folder, 2, RANKED, folder / "run", "")
    assert [each["kinds"] for each in digests(done.stdout)] == [[], []], done.stderr
    return digests(done.stdout)[0]["digest"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_killed_workers_of_torchrun_change_nothing_and_restart_nothing(calm: str, tmp_path: Path, leftovers: Leftovers) -> None:
    done = torchrun(tmp_path, 2, RANKED, tmp_path / "run", "", "1@20:forward", "0@45:backward")
    found = digests(done.stdout)
    assert sorted(each["rank"] for each in found) == ["0", "1"], done.stderr
    assert [(each["digest"], each["kinds"].count("death"), each["missed"], each["again"]) for each in found] == [(calm, 2, 0, "0")] * 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_makes_torchrun_start_all_ranks_again_from_the_checkpoint(
    calm: str, rank: int, tmp_path: Path, leftovers: Leftovers
) -> None:
    folder = tmp_path / "run"

    def kill() -> None:
        while not list(tmp_path.glob("saved/step-*")) and not stopped.wait(0.05):
            pass
        os.kill(int((folder / f"rank-{rank}-0").read_text()), signal.SIGKILL)

    stopped, killer = threading.Event(), threading.Thread(target=kill)
    killer.start()
    try:
        done = torchrun(tmp_path, 2, "--max-restarts=1", RANKED, folder, tmp_path / "saved")
    finally:
        stopped.set()
        killer.join()
    assert [(each["digest"], each["again"]) for each in digests(done.stdout)] == [(calm, "1")] * 2, done.stderr


@pytest.mark.long
def test_a_command_line_runs_a_function_of_a_module(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "own.py").write_text(PROGRAM)
    done = called("-c", "import elastic, own; print('returned', elastic.run(own.train, workers=2).value)", cwd=tmp_path)
    assert "returned 2" in done.stdout, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_a_test_runs_a_job(tmp_path: Path, leftovers: Leftovers, mode: str) -> None:
    (tmp_path / "test_own.py").write_text(
        "import elastic\n\n\ndef train(job):\n    return 7\n\n\ndef test():\n    assert elastic.run(train, workers=1).value == 7\n"
    )
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--import-mode={mode}", "test_own.py"]
    done = called(*words, cwd=tmp_path)
    assert "1 passed" in done.stdout or (mode == "importlib" and "set pythonpath" in done.stdout), done.stdout
    if mode == "importlib":
        assert "1 passed" in called(*words, "-o", "pythonpath=.", cwd=tmp_path).stdout


CELLS = """
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in (
    "import elastic",
    "def train(job): return 7",
    "elastic.run(train, workers=1)",
    "%%writefile train.py\\ndef train(job):\\n    return 7\\n",
    "print('returned', elastic.run('train.py:train', workers=1).value)",
):
    shell.run_cell(cell)
"""


@pytest.mark.long
def test_a_notebook_runs_a_file_that_a_cell_writes(tmp_path: Path, leftovers: Leftovers) -> None:
    pytest.importorskip("IPython")
    (tmp_path / "cells.py").write_text(CELLS)
    done = called("cells.py", cwd=tmp_path, HOME=str(tmp_path))
    assert "begin the cell that defines it with `%%writefile train.py`" in done.stdout + done.stderr
    assert "returned 7" in done.stdout

"""Tests jobs on hosts without segments, and what is left in a host's memory and in tables of descriptors when processes die."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.errors import JobFailed
from tests.conftest import wait_for_end
from tests.recovery import outliving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

ROOT = Path(__file__).parents[2]
STEPS, MANY = 9, 1 << 20
WITHOUT = "so workers keep copies of each other's state, and what a worker has in memory is lost with it"

PROGRAM = """
import json, elastic
options = {{"workers": 3, "stages": 1, "rebalance": False, "args": json.loads({args!r}), "directory": {directory!r}}}
result = elastic.run("tests.recovery.outliving:train", **options)
print(json.dumps([result.value, [incident["worker"] for incident in result.incidents if incident["kind"] == "death"]]))
"""


def run_program(folder: Path, fates: dict[str, Any], prelude: str = "", **environment: str) -> tuple[Any, list[int], str]:
    """Runs a job from a program of its own; returns its value, who died, and what was printed."""
    program = prelude + PROGRAM.format(args=json.dumps([str(folder), "adamw", STEPS, fates]), directory=str(folder / "run"))
    paths = ":".join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**os.environ, **environment, "PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    value, died = json.loads(done.stdout)
    return value, died, done.stderr


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("calm")
    return elastic.run(outliving.train, args=[str(folder), "adamw", STEPS, {}], workers=1, directory=folder / "run").value


def test_where_files_may_not_be_large_replicas_do(tmp_path: Path, calm: Any) -> None:
    prelude = f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, ({1 << 30}, {1 << 30}))\n"
    value, died, said = run_program(tmp_path, {"1": ["enter", 4, 2, "backward", [1]]}, prelude)
    assert (value, died) == (calm, [1])
    assert said.count(WITHOUT) == 1
    assert f"File too large: {WITHOUT}" in said


@pytest.mark.long
def test_where_there_are_no_anonymous_files_replicas_do(tmp_path: Path, calm: Any) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\ndel os.memfd_create\n")
    value, died, said = run_program(tmp_path, {"1": ["enter", 4, 2, "backward", [1]]}, PYTHONPATH=str(tmp_path / "site"))
    assert (value, died) == (calm, [1])
    assert said.count(f"no anonymous files in memory (memfd): {WITHOUT}") == said.count(WITHOUT) == 1


# Processes


class Members:
    """The members of a running job, as the run directory lists them."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "members.json"
        self.over = threading.Event()

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Returns the list as soon as it is as wanted."""
        while not self.over.wait(0.01):
            with suppress(FileNotFoundError):
                found = json.loads(self._path.read_text())
                if condition(found):
                    return found
        raise TimeoutError("the job is over")


@contextmanager
def watched(directory: Path, act: Callable[[Members], None]) -> Iterator[None]:
    """Runs `act` in a thread; raises what it raised."""
    members, errors = Members(directory), []

    def acting() -> None:
        try:
            act(members)
        except BaseException as error:
            errors.append(error)
            if not members.over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=acting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        members.over.set()
        thread.join()
    if errors:
        raise errors[0]


def mappings(pid: int) -> int:
    """Returns how many runs of segments a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:elastic-segment")


def numbers(record: dict[str, Any]) -> list[int]:
    return sorted(member["worker"] for member in record["members"])


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def has_steps(folder: Path, worker: int, steps: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(folder, f"steps-{worker}.jsonl").read_text().count('"step"') >= steps
    return False


def test_the_workers_and_their_memory_end_with_the_agent(tmp_path: Path) -> None:
    before, pids = shared_memory(), []

    def act(members: Members) -> None:
        found = members.wait(lambda _: has_steps(tmp_path, 0, 3))
        pids.extend(member["pid"] for member in found["members"])
        assert all(mappings(pid) for pid in pids)
        assert shared_memory() <= before
        os.kill(found["agent"], signal.SIGKILL)

    with watched(tmp_path / "run", act), pytest.raises(JobFailed, match="the agent, which supervises the workers, died"):
        elastic.run(outliving.train, args=[str(tmp_path), "adamw", MANY, {}], workers=3, stages=2, directory=tmp_path / "run")
    assert len(pids) == 3
    for pid in pids:
        with suppress(ProcessLookupError):
            assert wait_for_end(pid, 3.0)
    assert shared_memory() <= before


@pytest.mark.long
def test_twenty_deaths_leave_no_descriptor_and_no_memory(tmp_path: Path) -> None:
    """Every third time two of three workers die at once, and in between one of them."""
    counts: list[dict[str, int]] = []

    def act(members: Members) -> None:
        workers = 2
        for death in range(20):
            found = members.wait(lambda found, last=workers: numbers(found)[2:] == [last])
            members.wait(lambda _, newest=workers: has_steps(tmp_path, newest, 3))
            pids = {"agent": found["agent"], "fork server": found["forkserver"], "worker 0": found["members"][0]["pid"]}
            time.sleep(0.2)  # old copies are freed
            counts.append({name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()})
            counts[-1]["mapped"] = mappings(pids["worker 0"])
            killed = found["members"][1 : 3 if death % 3 == 2 else 2]
            for member in killed:
                os.kill(member["pid"], signal.SIGKILL)
            workers += len(killed)
        os.kill(os.getpid(), signal.SIGINT)

    with watched(tmp_path / "run", act):
        elastic.run(outliving.train, args=[str(tmp_path), "adamw", MANY, {}], workers=3, stages=1, directory=tmp_path / "run")
    assert len(counts) == 20
    early = {name: max(each[name] for each in counts[2:8]) for name in counts[0]}
    late = {name: min(each[name] for each in counts[14:]) for name in counts[0]}
    assert all(late[name] <= early[name] for name in early), counts

"""Tests that workers that fail without announcing it are replaced: the right one, with the evidence, and with the bits of a calm run."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.engine.stage import LayerRunner
from elastic.errors import JobFailed
from tests.engine import models
from tests.process.test_quota import group_with_quota
from tests.recovery import outliving
from tests.recovery.trainings import Log

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 16


def sleeps() -> None:
    time.sleep(3600)


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spins() -> None:
    while True:
        pass


def awaits() -> None:
    """As a collective does that not all have joined."""
    os.read(os.pipe()[0], 1)


def locks() -> None:
    """Another thread keeps the interpreter lock."""
    threading.Thread(target=lambda: ctypes.PyDLL(None).sleep(3600), daemon=True).start()


def computes() -> None:
    until = time.monotonic() + 6.0
    while time.monotonic() < until:
        pass


FAULTS: dict[str, Callable[[], None]] = {each.__name__: each for each in (sleeps, stops, spins, awaits, locks, computes)}


def train(job: Any, folder: str, steps: int, faults: dict[str, Any], fates: dict[str, Any], body: dict[str, Any]) -> Any:
    """`faults` by worker: `[fault, where, step]`; each happens once. `where`: "forward", "backward", "load", or a phase of a recovery.

    The fault "slows" stays, in this process. `body`: how long a loop body sleeps or computes, by "worker step".
    """
    fault, where, step = faults.get(str(job.worker), ("", "", 0))

    def happens() -> None:
        first = Path(folder, f"fault-{job.worker}")
        if fault == "always sleeps":
            sleeps()
        elif fault == "slows":
            time.sleep(0.05)
        elif not first.exists():
            first.touch()
            FAULTS[fault]()

    if where == "micro-batch":
        run_all = LayerRunner.forward

        def run_some(self: LayerRunner, now: int, micro_batch: int, *rest: Any) -> Any:
            if (now, micro_batch) == (step, 2):
                happens()
            return run_all(self, now, micro_batch, *rest)

        LayerRunner.forward = run_some  # pyright: ignore[reportAttributeAccessIssue]
    elif where in ("forward", "backward"):
        method = {"backward": "backward_in_parts"}.get(where, where)
        run = getattr(LayerRunner, method)

        def runs(self: LayerRunner, now: int, *rest: Any, **options: Any) -> Any:
            if now == step or (fault == "slows" and now > step):
                happens()
            return run(self, now, *rest, **options)

        setattr(LayerRunner, method, runs)
    elif where == "load":
        take = models.Rows.__getitem__
        models.Rows.__getitem__ = lambda self, index: (happens() if job.step == step else None, take(self, index))[1]
    elif where == "train_fn":
        happens()
    elif where:
        enter = job.enter
        job.enter = lambda phase, now, micro_batch=-1: (enter(phase, now, micro_batch), happens() if phase == where else None)
    seen = Log.add

    def add(self: Log, what: str, number: int, *more: Any) -> None:
        seen(self, what, number, *more)
        kind, seconds = body.get(f"{job.worker} {number}", ("", 0)) if what == "step" else ("", 0)
        until = time.monotonic() + seconds
        if kind == "sleeps":
            time.sleep(seconds)
        while kind == "computes" and time.monotonic() < until:
            pass

    Log.add = add
    return outliving.train(job, folder, "adamw", steps, fates)


def run(
    tmp_path: Path,
    faults: dict[str, Any],
    fates: dict[str, Any] | None = None,
    body: dict[str, Any] | None = None,
    *,
    steps: int = STEPS,
    **options: Any,
) -> elastic.JobResult:
    arguments = [str(tmp_path), steps, faults, fates or {}, body or {}]
    options = {"workers": 3, "stages": 1, "rebalance": False, **options}
    return elastic.run(train, args=arguments, directory=tmp_path / "run", **options)


@functools.cache
def calm(steps: int = STEPS) -> Any:
    """Returns the value of a job that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), {}, workers=1, steps=steps).value


def lost(result: elastic.JobResult) -> set[int]:
    found = [incident for incident in result.incidents if incident["kind"] in ("death", "eviction")]
    return {worker for incident in found for worker in (incident["worker"], *incident["also"])}


def eviction(result: elastic.JobResult) -> dict[str, Any]:
    (found,) = (incident for incident in result.incidents if incident["kind"] == "eviction")
    return found


@pytest.mark.parametrize("stages", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("fault", "where", "cause", "evidence"),
    [
        ("sleeps", "forward", "hung", r"it has used no processor for 1.*in forward of step 9, micro-batch \d.*\(state S in .*sleep"),
        pytest.param(
            *("awaits", "backward", "hung", r"it has used no processor for 1.*in backward of step 9, micro-batch \d.*\(state S in .*pipe"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("spins", "forward", "spinning", r"it has used [01]\.\d s of processor time in .* in forward of step 9, micro-batch \d"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_hung_in_a_step(tmp_path: Path, fault: str, where: str, cause: str, evidence: str, stages: int) -> None:
    result = run(tmp_path, {"1": [fault, where, 9]}, stages=stages, hung_after=1.0)
    assert result.value == calm()
    assert lost(result) == {1}
    found = eviction(result)
    assert (found["cause"], found["step"], found["phase"]) == (cause, 9, where)
    assert re.search(evidence, found["why"])
    assert found["why"].endswith("workers 0 and 2 wait for it")
    assert found["detected_ms"] >= (1000 / 3 if cause == "spinning" else 1000)


@pytest.mark.long
def test_hung_in_a_data_loader(tmp_path: Path) -> None:
    result = run(tmp_path, {"0": ["awaits", "load", 9]}, hung_after=1.0)
    assert result.value == calm()
    assert lost(result) == {0}
    assert eviction(result)["cause"] == "hung in its data loader"
    assert re.search(r"no processor for 3.*in the data loader of step 9, micro-batch \d.*test_unannounced", eviction(result)["why"])


@pytest.mark.long
@pytest.mark.parametrize(("where", "cause"), [("forward", "hung"), ("load", "hung in its data loader")])
def test_one_thread_holds_the_interpreter_lock(tmp_path: Path, where: str, cause: str) -> None:
    result = run(tmp_path, {"1": ["locks", where, 9]}, hung_after=1.0)
    assert result.value == calm()
    assert lost(result) == {1}
    assert eviction(result)["cause"] == cause


@pytest.mark.long
def test_hung_in_the_code_of_train_fn(tmp_path: Path) -> None:
    result = run(tmp_path, {}, body={"2 9": ["sleeps", 3600]}, hung_after=0.2)
    assert result.value == calm()
    assert lost(result) == {2}
    assert eviction(result)["cause"] == "hung in train_fn"
    assert re.search(r"no processor for 2\d.* s, in the code of train_fn after step 9, test_unannounced.py:\d+", eviction(result)["why"])


@pytest.mark.parametrize("phase", ["quiesce", pytest.param("migrate", marks=pytest.mark.long)])
def test_silent_in_a_recovery(tmp_path: Path, phase: str) -> None:
    """Worker 0 dies, and worker 2 does not answer."""
    result = run(tmp_path, {"2": ["sleeps", phase, 0]}, {"0": ["enter", 9, 1, "forward", [0]]}, hung_after=0.7)
    assert result.value == calm()
    assert lost(result) == {0, 2}
    first = next(incident for incident in result.incidents if incident["kind"] == "death")
    assert re.search(rf"worker 2 is silent in a recovery: it has used no processor for 0.*in {phase}", first["why"])


@pytest.mark.long
def test_a_new_worker_that_never_is_ready_is_replaced(tmp_path: Path) -> None:
    """The loop bodies of worker 1 last longer, in all, than it takes to give worker 3 up."""
    body = {f"1 {step}": ["sleeps", 0.06] for step in range(20, 300)}
    result = run(tmp_path, {"3": ["sleeps", "train_fn", 0]}, {"0": ["enter", 9, 1, "forward", [0]]}, body, steps=320, hung_after=0.1)
    assert result.value == calm(320)
    assert any(4 in incident["joined"] for incident in result.incidents)


@pytest.mark.long
def test_a_founder_that_never_is_ready_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, {"1": ["sleeps", "train_fn", 0]}, hung_after=0.1)
    assert result.value == calm()
    said = r"worker 1 \(process \d+\) was ended \(never ready: it has used no processor for 10.\d s, before its first step .*\) before tr"
    assert re.search(said, capfd.readouterr().err)


@pytest.mark.long
def test_a_founder_that_is_stopped_is_replaced(tmp_path: Path) -> None:
    result = run(tmp_path, {"1": ["stops", "train_fn", 0]})
    assert result.value == calm()


@pytest.mark.long
def test_a_micro_batch_in_which_every_worker_hangs_ends_the_job(tmp_path: Path) -> None:
    faults = {str(worker): ["always sleeps", "micro-batch", 9] for worker in range(9)}
    with pytest.raises(JobFailed, match=r"micro-batch 2 of step 9 has ended or hung every worker that computed it \(\d+, \d+, \d+\)"):
        run(tmp_path, faults, hung_after=0.2)


@pytest.mark.long
def test_an_extremely_slow_worker_is_replaced_if_the_job_is_faster_without_it(tmp_path: Path) -> None:
    result = run(tmp_path, {"1": ["slows", "forward", 5]}, stages=3, steps=120, rebalance=True)
    assert result.value == calm(120)
    assert lost(result) == {1}
    assert eviction(result)["cause"] == "crawling"
    assert re.search(r"it takes \d.* times as long as others; steps take", eviction(result)["why"])


@pytest.mark.long
def test_a_worker_whose_quota_is_longer_than_its_layers_is_replaced(tmp_path: Path) -> None:
    """It computes layers in normal time, until its control group has used up the quota of 0.2 s."""
    seen = list[int]()

    def limits(folder: Path) -> None:
        wait_until(lambda: progress(tmp_path) >= 60)
        pid = next(each["pid"] for each in json.loads((tmp_path / "run" / "members.json").read_text())["members"] if each["worker"] == 1)
        (folder / "cgroup.procs").write_text(str(pid))
        seen.append(pid)

    with group_with_quota(10_000, 200_000) as folder, ThreadPoolExecutor() as pool:
        limited = pool.submit(limits, folder)
        result = run(tmp_path, {}, steps=300, stages=3, rebalance=True)
        limited.result()
    assert seen
    assert result.value == calm(300)
    assert lost(result) == {1}
    assert re.search(
        r"the processor quota of its control group keeps it from running for \d+% of the time; steps take", eviction(result)["why"]
    )


def signal_all(folder: Path, name: signal.Signals) -> None:
    for member in json.loads((folder / "run" / "members.json").read_text())["members"]:
        os.kill(member["pid"], name)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [3.0, pytest.param(10.0, marks=pytest.mark.long)])
def test_a_pause_of_all_workers_excludes_nobody(tmp_path: Path, seconds: float) -> None:
    def pause() -> None:
        wait_until(lambda: progress(tmp_path) >= 4)
        signal_all(tmp_path, signal.SIGSTOP)
        time.sleep(seconds)
        signal_all(tmp_path, signal.SIGCONT)

    with ThreadPoolExecutor(1) as pool:
        paused = pool.submit(pause)
        result = run(tmp_path, {}, steps=60)
        paused.result()
    assert result.value == calm(60)
    assert result.incidents == ()


def progress(folder: Path) -> int:
    """How many steps the least of the workers was given."""
    logs = [*folder.glob("steps-*.jsonl")]
    return min((path.read_text().count('"step"') for path in logs), default=0) if len(logs) == 3 else 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [5.0, 60.0])
@pytest.mark.parametrize(
    "body",
    [
        {"0 8": ["sleeps", 1.0]},
        {"0 8": ["computes", 1.0]},
        {"1 8": ["sleeps", 1.0], "2 8": ["sleeps", 0.5], "0 8": ["computes", 1.0]},
    ],
    ids=["the leader writes a checkpoint", "the leader evaluates", "all do"],
)
def test_a_long_loop_body_excludes_nobody(tmp_path: Path, body: dict[str, Any], seconds: float) -> None:
    result = run(tmp_path, {}, body={place: [kind, share * seconds] for place, (kind, share) in body.items()})
    assert result.value == calm()
    assert result.incidents == ()


@pytest.mark.long
def test_a_first_step_that_takes_long_excludes_nobody(tmp_path: Path) -> None:
    """As one does in which layers are compiled."""
    result = run(tmp_path, {"1": ["computes", "forward", 0]}, hung_after=1.0)
    assert result.value == calm()
    assert result.incidents == ()


@pytest.mark.long
@pytest.mark.parametrize("steps", [100, 800])
def test_a_crowded_machine_excludes_nobody(tmp_path: Path, steps: int) -> None:
    """Eight processes that never rest run next to the job."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        result = run(tmp_path, {}, stages=None, steps=steps, rebalance=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert result.value == calm(steps)
    assert lost(result) == set()

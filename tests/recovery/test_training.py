"""Tests real jobs whose workers die: the results equal those of an undisturbed job, bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer
from elastic.errors import CoverageLost, JobFailed, SettingsError
from elastic.observe import activity, phase_delay
from elastic.settings import best_isa, worker_environment
from tests.recovery import trainings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

ROOT = Path(__file__).parents[2]
GROUPS, MOMENTUM, INITIAL, WHOLE = trainings.CASES
STEPS = {GROUPS: 50, MOMENTUM: 10, INITIAL: 8, WHOLE: 8}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns, for each case, the lines of its one worker's log, and the digest."""
    command = [sys.executable, "-m", "tests.recovery.undisturbed", str(tmp_path_factory.mktemp("calm")), json.dumps(STEPS)]
    environment = {**os.environ, **worker_environment(1, best_isa()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Run:
    """One job, and the files in its directory."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        dies: dict[str, Any] | None = None,
        pause_s: float = 0.0,
        saves: dict[str, Any] | None = None,
        still: bool = False,
        **options: Any,
    ) -> None:
        self.folder = folder / "run"
        arguments = [str(folder), name, STEPS[name], dies, pause_s, saves, still]
        self._logs = folder
        # These tests do not control which workers are slow: a slow one would cause another incident.
        self.result = elastic.run(trainings.train, args=arguments, directory=self.folder, rebalance=False, **options)
        self.incidents = self.result.incidents

    def check(self, calm: dict[str, Any], founders: int, *, steps: int | None = None) -> None:
        """Every worker was given what the undisturbed one was, from some step on, once and in order; a founder from the first."""
        lines = [line for line in calm["lines"] if steps is None or line[1] < steps]
        logs = {int(path.stem.partition("-")[2]): _read(path) for path in self._logs.glob("steps-*.jsonl")}
        for worker, log in logs.items():
            first = 0 if worker < founders or not log else lines.index(log[0])
            assert log == lines[first : first + len(log)], f"worker {worker}"
        assert max(map(len, logs.values())) == len(lines)
        if steps is None:
            assert self.result.value["digest"] == calm["digest"]
        for found in self.incidents:
            if found["epoch"] is not None:  # the job may end before a new worker has joined
                assert found["samples_lost"] == 0
                assert found["bytes_moved"] == found["bytes_minimum"]

    @property
    def lost(self) -> list[tuple[int, ...]]:
        """The workers that each incident lost."""
        return [(found["worker"], *found["also"]) for found in self.incidents if found["kind"] == "death"]


def _read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_a_worker_dies_and_a_new_one_joins(tmp_path: Path, calm: dict[str, Any]) -> None:
    with Killer(tmp_path / "run", [parse("1@7")], seed=3) as killer:
        run = Run(tmp_path, GROUPS, pause_s=0.04, workers=4, stages=2)
        assert killer.close() == ()
    run.check(calm[GROUPS], 4)
    death, join = run.incidents
    assert (death["kind"], death["worker"], death["step"], death["epoch"]) == ("death", 1, 7, 2)
    assert (join["kind"], join["joined"], join["epoch"], join["steps_redone"]) == ("join", [4], 3, 0)
    assert run.result.epoch == 3
    assert run.result.value["workers"] == [0, 2, 3, 4]
    joined = _read(tmp_path / "steps-4.jsonl")
    assert 7 < joined[0][1] < joined[-1][1] == STEPS[GROUPS] - 1


def test_a_bit_that_changes_on_its_way_is_no_wrong_bit(tmp_path: Path, calm: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """It is a link failure: one of the two ends goes, and what both computed of the step is computed again."""
    run = Run(tmp_path, MOMENTUM, dies={"0": ["damages", 4]}, workers=2, stages=2)
    run.check(calm[MOMENTUM], 2)
    [evicted] = [found for found in run.incidents if found["kind"] == "eviction"]
    assert (evicted["step"], evicted["epoch"]) == (4, 2)
    said = "elastic: worker 1 did not get what worker 0 sent, the activation message of epoch 1, attempt 0, step 4: checksums differ"
    assert said in capfd.readouterr().err


@pytest.mark.long
def test_what_survivors_have_finished_of_a_step_is_kept_twice(tmp_path: Path, calm: dict[str, Any]) -> None:
    """Of the three grains that two workers each have computed when another dies, all count, or all but the last.

    That is so where everybody keeps its layers, which nothing here may speak against.
    """
    dies = {"1": ["ready", 6, 1], "3": ["ready", 6, 2]}
    run = Run(tmp_path, GROUPS, dies=dies, still=True, pause_s=0.02, workers=4, stages=2)
    run.check(calm[GROUPS], 4)
    assert run.lost == [(1, 3)]  # the second dies while the step is computed again, in epoch 2
    death = run.incidents[0]
    assert (death["step"], death["epoch"]) == (6, 3)
    assert death["layout_before"].count("x2") == 2
    assert death["layout_after"] == death["layout_before"].replace("x2", "x1")
    assert death["micro_batches_kept"] in (2, 3)


@pytest.mark.long
def test_who_dies_before_the_job_is_founded_is_replaced(tmp_path: Path, calm: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, MOMENTUM, dies={"0": ["start"], "1": ["start"]}, workers=3, stages=2)
    run.check(calm[MOMENTUM], 5)
    assert (run.result.value["workers"], run.incidents) == ([2, 3, 4], ())
    err = capfd.readouterr().err
    for worker in (0, 1):
        said = rf"worker {worker} \(process \d+\) was killed by SIGKILL before training began: worker [34] is started"
        assert re.search(said, err)
    assert "memory" not in err
    with pytest.raises(JobFailed, match=r"was killed by SIGKILL before training began, as 2 others did: no more are started$"):
        Run(tmp_path, MOMENTUM, dies={str(number): ["start"] for number in range(9)}, workers=1)


@pytest.mark.long
def test_the_coordinator_dies_and_then_the_next(tmp_path: Path, calm: dict[str, Any]) -> None:
    with Killer(tmp_path / "run", [parse("0@3:reduce"), parse("0@6")]) as killer:
        run = Run(tmp_path, MOMENTUM, pause_s=0.01, workers=3, stages=2, respawn=False)
        assert killer.close() == ()
    run.check(calm[MOMENTUM], 3)
    assert run.lost == [(0,), (1,)]
    assert [found["layout_after"] for found in run.incidents][1] == "[0-4]x1"
    assert run.result.value["workers"] == [2]


@pytest.mark.long
def test_deaths_in_the_first_step_by_lack_of_memory_and_behind_the_last_step(tmp_path: Path, calm: dict[str, Any]) -> None:
    last = STEPS[INITIAL] - 1
    dies = {"1": ["forward", 0, 2], "3": ["memory", 4], "2": ["ready", last, 2]}
    run = Run(tmp_path, INITIAL, dies=dies, workers=4, stages=2, respawn=False)
    run.check(calm[INITIAL], 4)
    assert run.lost == [(1,), (3,), (2,)]
    assert [found["step"] for found in run.incidents] == [0, 4, last]
    assert run.incidents[0]["bytes_moved"] == run.incidents[0]["bytes_minimum"]
    assert run.result.value["workers"] == [0]


def test_deaths_in_an_evaluation_and_in_the_digest_behind_the_loop(tmp_path: Path, calm: dict[str, Any]) -> None:
    run = Run(tmp_path, WHOLE, dies={"1": ["evaluate", 4], "2": ["digest"]}, workers=3, stages=2, respawn=False)
    run.check(calm[WHOLE], 3)
    assert run.lost == [(1,), (2,)]
    assert run.result.value["workers"] == [0]


@pytest.mark.long
@pytest.mark.parametrize("phase", ["quiesce", "propose"])
def test_a_survivor_dies_during_the_recovery(phase: str, tmp_path: Path, calm: dict[str, Any]) -> None:
    """The others still wait in the first attempt when the second one begins; what they keep is asked for in the second only."""
    (tmp_path / "run").mkdir()
    phase_delay.write(tmp_path / "run", ["quiesce"], 0.1)
    run = Run(tmp_path, GROUPS, dies={"1": ["backward", 6, 2], "3": [phase, -1, 1]}, workers=4, stages=2, respawn=False)
    run.check(calm[GROUPS], 4)
    assert run.lost == [(1, 3)]
    assert (run.incidents[0]["attempts"], run.result.epoch) == (2, 2)


def test_below_the_minimum_the_job_waits_for_a_new_worker(tmp_path: Path, calm: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, MOMENTUM, dies={"1": ["apply", 4, 1]}, workers=2, min_workers=2)
    run.check(calm[MOMENTUM], 2)
    assert "paused until new workers are ready: 1 worker left, and the job may not shrink below min_workers=2" in capfd.readouterr().err
    assert run.result.value["workers"] == [0, 2]
    assert run.result.epoch == 2
    with pytest.raises(SettingsError, match="min_workers=3 is more than workers=2"):
        elastic.run(trainings.trains_on_poison, args=["poisoned"], workers=2, min_workers=3)


@pytest.mark.parametrize("data", ["poisoned", pytest.param("unloadable", marks=pytest.mark.long)])
def test_an_input_that_ends_whoever_computes_it_ends_the_job(data: str, tmp_path: Path) -> None:
    with pytest.raises(
        JobFailed, match=r"micro-batch 4 of step 3 has ended or hung every worker that computed it \(.*\), .* probably the input"
    ):
        elastic.run(trainings.trains_on_poison, workers=4, stages=1, args=[data], directory=tmp_path)


@pytest.mark.long
def test_whoever_is_killed_at_the_same_micro_batch_again_and_again_is_no_victim_of_the_input(tmp_path: Path, calm: dict[str, Any]) -> None:
    """Nobody declares these kills."""
    dies = {"1": ["backward", 6, 1], "2": ["backward", 6, 2], "3": ["backward", 6, 3]}
    run = Run(tmp_path, GROUPS, dies=dies, workers=4, stages=1, respawn=False)
    run.check(calm[GROUPS], 4)
    assert sorted(worker for lost in run.lost for worker in lost) == [1, 2, 3]


@pytest.mark.long
def test_neither_stderr_nor_the_run_directory_is_needed(tmp_path: Path, calm: dict[str, Any]) -> None:
    """The reader of stderr is gone, and the run directory is deleted, before a worker dies and is replaced."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tests.recovery.blind", str(tmp_path), str(STEPS[GROUPS])]
    done = subprocess.run(command, cwd=ROOT, stderr=writer, stdout=subprocess.DEVNULL, check=False, timeout=120)
    os.close(writer)
    assert done.returncode == 0
    value, kinds = json.loads((tmp_path / "result.json").read_text())
    assert (kinds, value["digest"], value["workers"]) == (["death", "join"], calm[GROUPS]["digest"], [0, 2, 3])


@pytest.mark.long
def test_the_only_worker_dies(tmp_path: Path) -> None:
    with pytest.raises(CoverageLost, match=r"SIGKILL.* it was the only worker: no copy of the state is left"):
        Run(tmp_path, WHOLE, dies={"0": ["backward", 2, 1]}, workers=1)


def test_ctrl_c_during_a_recovery_stops_behind_it(tmp_path: Path, calm: dict[str, Any]) -> None:
    directory, over = tmp_path / "run", threading.Event()
    directory.mkdir()
    phase_delay.write(directory, ["migrate"], 0.3)

    def press() -> None:
        while not over.wait(0.005):
            doing = activity.read(directory, 0)
            if doing is not None and doing.phase == "migrate":
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    try:
        run = Run(tmp_path, GROUPS, dies={"1": ["gather", 6, 1]}, workers=3, stages=2, respawn=False)
    finally:
        over.set()
        thread.join()
    assert run.result.stopped
    steps = max(line[1] for line in _read(tmp_path / "steps-0.jsonl")) + 1
    assert 6 <= steps < STEPS[GROUPS]
    run.check(calm[GROUPS], 3, steps=steps)
    assert run.lost == [(1,)]


# The fallback below replicas: state that no worker has comes from the newest checkpoint


def saves(folder: Path) -> dict[str, Any]:
    return {"checkpoint": str(folder / "saved"), "every": 4}


@pytest.mark.usefixtures("without_segments")
@pytest.mark.parametrize("where", ["loop", pytest.param("evaluate", marks=pytest.mark.long)])
def test_owner_and_holder_die_together(where: str, tmp_path: Path, calm: dict[str, Any]) -> None:
    """The survivor takes the steps again that the checkpoint lacks; its loop is given each of them once."""
    run = Run(
        tmp_path, GROUPS, dies={"0": ["kills", where, 16, [1, 2]]}, saves=saves(tmp_path), pause_s=0.03, workers=3, stages=1, respawn=False
    )
    run.check(calm[GROUPS], 3)
    (death,) = run.incidents
    assert sorted((death["worker"], *death["also"])) == [1, 2]
    assert death["restored"] in ("step-00000012", "step-00000016")
    assert death["steps_redone"] >= 17 - int(death["restored"][-2:])
    assert run.result.value["workers"] == [0]


@pytest.mark.usefixtures("without_segments")
@pytest.mark.long
def test_another_dies_while_steps_are_taken_again(tmp_path: Path, calm: dict[str, Any]) -> None:
    """That loss costs a step, and not another way back to the checkpoint; new workers join where the steps are taken again, or later."""
    dies = {"0": ["kills", "loop", 17, [1, 2]], "3": ["reduce", 17, 2]}
    run = Run(tmp_path, GROUPS, dies=dies, saves={**saves(tmp_path), "every": 8}, pause_s=0.03, workers=4, stages=1)
    run.check(calm[GROUPS], 4)
    first, *others = [found for found in run.incidents if found["kind"] == "death"]
    assert first["restored"] in ("step-00000008", "step-00000016")
    assert [(found["worker"], found["restored"]) for found in others] in ([(3, None)], [])
    assert 3 not in run.result.value["workers"]


@pytest.mark.usefixtures("without_segments")
def test_all_workers_die_and_new_ones_go_on(tmp_path: Path, calm: dict[str, Any]) -> None:
    run = Run(tmp_path, GROUPS, dies={"0": ["kills", "loop", 17, [0, 1, 2]]}, saves=saves(tmp_path), pause_s=0.03, workers=3, stages=2)
    (death,) = run.incidents
    assert sorted(death["joined"]) == sorted(run.result.value["workers"]) == [3, 4, 5]
    assert run.result.value["digest"] == calm[GROUPS]["digest"]
    taken = int(death["restored"][-2:])
    lines = [line for line in calm[GROUPS]["lines"] if line[1] >= taken]
    for worker in (3, 4, 5):
        assert _read(tmp_path / f"steps-{worker}.jsonl") == lines


@pytest.mark.long
def test_before_the_first_checkpoint_the_training_begins_again_at_step_0(
    tmp_path: Path, calm: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, GROUPS, dies={"0": ["kills", "loop", 2, [1, 2]]}, saves={**saves(tmp_path), "every": 40}, workers=3, stages=1)
    (death,) = run.incidents
    assert (death["restored"], death["epoch"], death["joined"]) == ("initial state", 2, [3, 4, 5])
    assert run.result.value == {"digest": calm[GROUPS]["digest"], "workers": [3, 4, 5]}
    for worker in (3, 4, 5):
        assert _read(tmp_path / f"steps-{worker}.jsonl") == calm[GROUPS]["lines"]
    err = capfd.readouterr().err
    assert "no good checkpoint has been saved yet" in err
    assert "The training begins again at step 0, from the seed" in err


@pytest.mark.long
def test_before_the_first_checkpoint_the_job_ends_if_no_worker_is_started(tmp_path: Path) -> None:
    with pytest.raises(CoverageLost, match="no good checkpoint has been saved yet"):
        Run(tmp_path, GROUPS, dies={"0": ["kills", "loop", 2, [1, 2]]}, saves=saves(tmp_path), workers=3, stages=1, respawn=False)

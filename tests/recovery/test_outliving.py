"""Tests real jobs of one host that lose any set of workers, and no state: they end as an undisturbed job, without a checkpoint."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.errors import CoverageLost
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES
from tests.recovery import outliving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 9
ALL = [0, 1, 2, 3]


@functools.cache
def calm(case: str) -> dict[str, Any]:
    """Returns the value and the log of one worker that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        result = elastic.run(outliving.train, args=[folder, case, STEPS, {}], workers=1, directory=Path(folder, "run"))
        return {"value": result.value, "lines": lines_of(Path(folder, "steps-0.jsonl"))}


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def run(tmp_path: Path, fates: dict[int, list[Any]], case: str = "adamw", **options: Any) -> elastic.JobResult:
    """Runs a job and checks its value, and that loops are given every step as in the undisturbed job, in order."""
    expected = calm(case)
    options = {"workers": 4, "stages": 2, **options}
    saves, restored = options.pop("saves", None), options.pop("restored", None)
    arguments = [str(tmp_path), case, STEPS, {str(worker): fate for worker, fate in fates.items()}, saves]
    result = elastic.run(outliving.train, args=arguments, directory=tmp_path / "run", rebalance=False, **options)
    assert result.value == expected["value"]
    given = defaultdict(set)
    for path in tmp_path.glob("steps-*.jsonl"):
        log = lines_of(path)
        first = expected["lines"].index(log[0]) if log else 0
        assert log == expected["lines"][first : first + len(log)], path.stem
        for place, line in enumerate(log, first):
            given[place].add(json.dumps(line))
    assert sorted(given) == list(range(len(expected["lines"])))
    for incident in result.incidents:
        assert incident["restored"] == restored
        if incident["epoch"] is not None:
            assert incident["samples_lost"] == 0
            assert incident["bytes_moved"] == incident["bytes_minimum"]
    return result


def died(result: elastic.JobResult) -> list[int]:
    return sorted(worker for found in result.incidents if found["kind"] == "death" for worker in (found["worker"], *found["also"]))


# Several at once


SETS = [[0, 1], [1, 2, 3], ALL]
OFTEN = [("apply", 4)]
"""Phases, and how many workers die in them, of the quick suite."""


def several(phases: tuple[str, ...], often: list[tuple[str, int]]) -> pytest.MarkDecorator:
    rows = [
        pytest.param(phase, victims, marks=[] if (phase, len(victims)) in often else [pytest.mark.long], id=f"{phase}-{len(victims)}")
        for phase in phases
        for victims in SETS
    ]
    return pytest.mark.parametrize(("phase", "victims"), rows)


@several(STEP_PHASES, OFTEN)
def test_workers_that_die_at_once_in_a_step(tmp_path: Path, phase: str, victims: list[int]) -> None:
    result = run(tmp_path, {victims[-1]: ["enter", 4, 2 if phase == "backward" else 1, phase, victims]})
    assert died(result) == victims


@several(RECOVERY_PHASES, [("commit", 4)])
def test_workers_that_die_at_once_in_a_recovery(tmp_path: Path, phase: str, victims: list[int]) -> None:
    """From the death of another worker; of four, all that are left."""
    first = 3 if victims == ALL else victims[-1] ^ 2
    left = [worker for worker in victims if worker != first]
    result = run(tmp_path, {first: ["enter", 4, 2, "backward", [first]], left[-1]: ["enter", None, 1, phase, left]})
    assert died(result) == sorted([first, *left])


@pytest.mark.long
@pytest.mark.parametrize("phase", RECOVERY_PHASES)
def test_the_new_workers_die_while_they_take_over(tmp_path: Path, phase: str) -> None:
    """Everything is still in the segments of those that died first."""
    fates = {0: ["body", 4, 1, ALL], **{worker: ["enter", None, 1, phase, None] for worker in (4, 6)}}
    result = run(tmp_path, fates)
    assert set(ALL) <= set(died(result))


@pytest.mark.long
def test_all_die_again_before_the_new_workers_have_taken_a_step(tmp_path: Path) -> None:
    fates = {0: ["body", 4, 1, ALL], 4: ["enter", 5, 1, "backward", [4, 5, 6, 7]], 8: ["enter", 5, 1, "apply", [8, 9, 10, 11]]}
    result = run(tmp_path, fates, "batchnorm")
    assert set(range(12)) <= set(died(result))


@pytest.mark.parametrize("victims", [[1], pytest.param([1, 2], marks=[pytest.mark.long]), pytest.param(ALL, marks=[pytest.mark.long])])
@pytest.mark.parametrize("case", ["adamw", *(pytest.param(case, marks=[pytest.mark.long]) for case in ("batchnorm", "skips"))])
def test_a_worker_dies_with_a_decision_that_others_have_applied(tmp_path: Path, case: str, victims: list[int]) -> None:
    """All go back by a step, and none of it is computed again, even if workers that have applied it die as well."""
    result = run(tmp_path, {1: ["late", 4, 1, [0, 2, 3], victims]}, case, stages=1)
    assert died(result) == victims
    kept = [found["micro_batches_kept"] for found in result.incidents if found["kind"] == "death"]
    assert case != "adamw" or kept == [6]


@pytest.mark.long
@pytest.mark.parametrize("fate", [["late", 4, 1, [0, 2, 3, 4, 5], [1]], ["enter", 4, 1, "ready", [1]], ["enter", 4, 1, "ready", [1, 4]]])
def test_a_stage_without_gradients_has_finished_its_grains_too(tmp_path: Path, fate: list[Any]) -> None:
    assert died(run(tmp_path, {1: fate}, "half frozen", workers=6)) == fate[-1]


@pytest.mark.long
@pytest.mark.parametrize("fate", [["late", 5, 1, [1], [0]], ["enter", 5, 1, "ready", [0]]])
def test_a_step_that_changes_buffers_at_will_is_computed_again(tmp_path: Path, fate: list[Any]) -> None:
    """Three forwards a step for either worker; the one that is left runs six, in the step that is taken again at least its own three."""
    arguments = [str(tmp_path), "counter", STEPS, {"0": fate}, None]
    options: dict[str, Any] = {"workers": 2, "stages": 1, "rebalance": False, "respawn": False}
    result = elastic.run(outliving.train, args=arguments, directory=tmp_path / "run", **options)
    assert died(result) == [0]
    (steps,) = [values for name, values in result.value["buffers"].items() if name.endswith("steps")]
    assert steps[0] in (5 * 3 + 3 + 3 * 6, 5 * 3 + 6 + 3 * 6)


# In every place, with every kind of state


@pytest.mark.long
@pytest.mark.parametrize(
    "fate",
    [["body", 4, 1, ALL], ["evaluate", 4, 1, ALL], ["enter", 5, 1, "forward", ALL], ["enter", 0, 1, "forward", ALL]],
    ids=["body 4", "evaluate 4", "enter 5", "enter 0"],
)
@pytest.mark.parametrize("case", ["batchnorm", "average, momentum", "scheduler, objects, tied", "whole tensors", "skips"])
def test_all_die(tmp_path: Path, case: str, fate: list[Any]) -> None:
    assert died(run(tmp_path, {1: fate}, case)) == ALL


@pytest.mark.long
def test_all_die_between_two_saves_and_no_step_is_lost(tmp_path: Path) -> None:
    saves = {"checkpoint": str(tmp_path / "saved"), "every": 3}
    assert died(run(tmp_path, {0: ["body", 5, 1, ALL]}, saves=saves)) == ALL


@pytest.mark.long
@pytest.mark.parametrize("case", ["batchnorm", "scheduler, objects, tied"])
def test_all_die_before_the_first_step_after_a_checkpoint_of_another_job(tmp_path: Path, case: str) -> None:
    saves = {"checkpoint": str(tmp_path / "saved"), "every": 3}
    arguments = [str(tmp_path), case, 4, {}, saves]
    elastic.run(outliving.train, args=arguments, workers=2, directory=tmp_path / "before")
    assert died(run(tmp_path, {0: ["enter", 4, 1, "forward", ALL]}, case, saves=saves)) == ALL


# Between contents and marks


METHODS = ("overwrites_previous", "has_previous", "updates", "updated", "digested", "has_buffers", "loop")


@pytest.mark.long
@pytest.mark.parametrize("victims", [None, ALL], ids=["alone", "all"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_a_worker_dies_at_a_call(tmp_path: Path, method: str, when: str, victims: list[int] | None) -> None:
    result = run(tmp_path, {1: ["call", 4, 1, method, when, victims]}, "batchnorm")
    assert died(result) == (victims or [1])


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["begin", "loop"])
def test_a_worker_dies_at_a_call_in_a_new_view(tmp_path: Path, method: str, when: str) -> None:
    times = 2 if method == "begin" else 1
    fates = {3: ["enter", 4, 2, "backward", [3]], 1: ["call", 5 if method == "loop" else None, times, method, when, [0, 1, 2]]}
    assert died(run(tmp_path, fates, "batchnorm")) == ALL


@pytest.mark.parametrize("victims", [None, pytest.param(ALL, marks=[pytest.mark.long])])
def test_founders_die_before_they_have_described_their_part_of_the_initial_state(tmp_path: Path, victims: list[int] | None) -> None:
    """Those that are left have only their own parts, so new workers begin again at step 0."""
    fates = {1: ["call", None, 1, "begin", "before", victims]}
    assert set(died(run(tmp_path, fates, restored="initial state"))) >= set(victims or [1])


@pytest.mark.parametrize("store", [pytest.param(store, marks=[] if store == 4 else [pytest.mark.long]) for store in range(1, 25)])
def test_all_die_behind_a_store_into_a_header(tmp_path: Path, store: int) -> None:
    """All stores of an update, and the next step's."""
    assert died(run(tmp_path, {1: ["store", 4, store, ALL]}, "batchnorm")) == ALL


# While others copy


@pytest.mark.long
@pytest.mark.parametrize("times", [3, 8])
def test_a_survivor_dies_while_it_copies(tmp_path: Path, times: int) -> None:
    assert died(run(tmp_path, {3: ["enter", 4, 2, "backward", [3]], 2: ["copy", None, times, None]})) == [2, 3]


@pytest.mark.long
@pytest.mark.parametrize("times", [3, 8, 14])
def test_a_new_worker_dies_while_it_copies(tmp_path: Path, times: int) -> None:
    assert set(died(run(tmp_path, {0: ["body", 4, 1, ALL], 5: ["copy", None, times, None]}))) >= set(ALL)


# A process that ended by its own fault


@pytest.mark.parametrize("what", ["live", *(pytest.param(what, marks=[pytest.mark.long]) for what in ("nothing", "previous"))])
def test_what_a_faulty_worker_has_scribbled_over_is_not_taken(tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, {1: ["scribble", 4, 1, what]})
    assert died(result) == [1]
    assert re.search(r"worker 1 \(process \d+\) was killed by SIGSEGV", capfd.readouterr().err)


@pytest.mark.long
def test_without_a_header_its_state_is_lost(tmp_path: Path) -> None:
    with pytest.raises(CoverageLost, match=r"without workers \[1\], which are lost, .* no surviving worker has a full copy"):
        run(tmp_path, {1: ["scribble", 4, 1, "header"]})

"""Tests real jobs that lose a host and, at once, workers of others: what these kept for the lost host is still there."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES
from tests.recovery import losing, outliving, simulated_hosts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 9
ROOT = Path(__file__).parents[2]


@functools.cache
def calm(case: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return elastic.run(outliving.train, args=[folder, case, STEPS, {}], workers=1, directory=Path(folder, "run")).value


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers are on two hosts, of which each worker's agent knows."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import tests.recovery.simulated_hosts\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")
    monkeypatch.setenv(simulated_hosts.COUNT, "2")
    monkeypatch.setenv(simulated_hosts.LOST, str(tmp_path / "lost"))
    return tmp_path


def run(folder: Path, fates: dict[int, list[Any]], case: str = "adamw", *, lost: Sequence[int] = (1,), **options: Any) -> elastic.JobResult:
    """Runs a job of four workers; those that die on hosts `lost` take their memory with them. No state is lost, and no checkpoint read."""
    expected = calm(case)
    options = {"workers": 4, "stages": 2, **options}
    arguments = [str(folder), case, STEPS, {str(worker): fate for worker, fate in fates.items()}, list(lost)]
    result = elastic.run(losing.train, args=arguments, directory=folder / "run", rebalance=False, **options)
    assert result.value == expected
    assert (folder / "lost").exists(), "the host was not lost"
    assert {incident["restored"] for incident in result.incidents} <= {None}
    return result


def died(result: elastic.JobResult) -> list[int]:
    return sorted(worker for found in result.incidents if found["kind"] == "death" for worker in (found["worker"], *found["also"]))


OTHERS = [[], [0], [2], [0, 2]]
"""Workers of the other host that are killed at the same time."""

OFTEN = [("forward", 2), ("apply", 1)]


@pytest.mark.parametrize(
    ("phase", "others"),
    [
        pytest.param(phase, others, marks=[] if (phase, len(others)) in OFTEN[:1] else [pytest.mark.long], id=f"{phase}-{others}")
        for phase in STEP_PHASES
        for others in OTHERS
    ],
)
def test_a_host_is_lost_with_workers_of_the_other_one(hosts: Path, phase: str, others: list[int]) -> None:
    victims = sorted([1, 3, *others])
    result = run(hosts, {3: ["enter", 4, 1, phase, victims]})
    assert died(result) == victims


@pytest.mark.long
@pytest.mark.parametrize("others", [[], [0]])
@pytest.mark.parametrize("phase", RECOVERY_PHASES)
def test_a_host_is_lost_in_the_recovery_from_a_death_on_the_other_one(hosts: Path, phase: str, others: list[int]) -> None:
    """With all workers that are left, or those of one host. Who had voted has the new view's state in its segment too."""
    victims = sorted([1, 3, *others])
    result = run(hosts, {2: ["enter", 4, 2, "backward", None], 3: ["enter", None, 1, phase, victims]}, "batchnorm")
    assert died(result) == sorted([2, *victims])


@pytest.mark.long
@pytest.mark.parametrize("store", range(1, 40, 2))
def test_a_host_is_lost_and_all_workers_die_behind_a_store_into_a_header(hosts: Path, store: int) -> None:
    """All stores of two steps, of a worker of the host that is not lost."""
    result = run(hosts, {2: ["store", 4, store, [0, 1, 2, 3]]}, "batchnorm")
    assert died(result) == [0, 1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_random_losses_of_a_host_and_of_workers_of_the_other_one(hosts: Path, seed: int) -> None:
    """A host and some workers of the other one at a random moment; often another worker of that one before, or while they recover."""
    choice = random.Random(seed)
    lost = choice.randrange(2)
    gone, left = [lost, lost + 2], [1 - lost, 3 - lost]
    phase, step = choice.choice(STEP_PHASES), choice.randrange(1, STEPS - 1)
    victims = sorted([*gone, *choice.sample(left, choice.randrange(3))])
    fates = {choice.choice(gone): ["enter", step, choice.randrange(1, 3) if phase in ("forward", "backward") else 1, phase, victims]}
    if choice.random() < 0.5:
        when = ["enter", step, 1, "forward", None] if choice.random() < 0.5 else ["enter", None, 1, choice.choice(RECOVERY_PHASES), None]
        fates[choice.choice(left)] = when
    run(hosts, fates, choice.choice(["adamw", "batchnorm", "average, momentum", "scheduler, objects, tied"]), lost=[lost])


@pytest.fixture
def four(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers are on four hosts."""
    monkeypatch.setenv(simulated_hosts.COUNT, "4")
    return hosts


@pytest.mark.parametrize("others", [[], pytest.param([0, 4], marks=pytest.mark.long)])
@pytest.mark.parametrize("phase", [each if each == "apply" else pytest.param(each, marks=pytest.mark.long) for each in STEP_PHASES])
def test_two_of_four_hosts_are_lost_at_once(four: Path, phase: str, others: list[int]) -> None:
    """With three copies, also with all workers of a third host, whose memory stays."""
    victims = sorted([1, 3, 5, 7, *others]) if others else [1, 3]
    workers = 8 if others else 4
    result = run(four, {3: ["enter", 4, 1, phase, victims]}, lost=[1, 3], copies=3, workers=workers)
    assert died(result) == victims


def test_two_hosts_are_one_too_many_for_two_copies(four: Path) -> None:
    """Each host has the copy of its neighbour's state."""
    with pytest.raises(elastic.errors.CoverageLost, match="more workers were lost at once than there are copies"):
        run(four, {2: ["enter", 4, 1, "forward", [1, 2]]}, lost=[1, 2], stages=1)


@pytest.mark.long
def test_with_one_copy_no_host_may_be_lost(hosts: Path) -> None:
    with pytest.raises(elastic.errors.CoverageLost, match="more workers were lost at once than there are copies"):
        run(hosts, {2: ["enter", 5, 1, "forward", [1, 3]]}, copies=1)
    assert (hosts / "lost").exists()


@pytest.mark.long
@pytest.mark.parametrize("phase", STEP_PHASES)
def test_with_one_copy_all_workers_of_a_host_may_die(hosts: Path, phase: str) -> None:
    """Their state outlives them. The host that is lost is none of this job's."""
    result = run(hosts, {2: ["enter", 4, 1, phase, [0, 2]]}, lost=[7], copies=1)
    assert died(result) == [0, 2]


@pytest.mark.long
@pytest.mark.parametrize("phase", RECOVERY_PHASES)
def test_a_second_host_is_lost_in_the_recovery_from_the_loss_of_the_first(four: Path, phase: str) -> None:
    """Three copies: what the second one kept for the first is with a third one too. Workers that recover are all lost together."""
    result = run(four, {2: ["enter", 4, 2, "backward", None], 3: ["enter", None, 1, phase, [1, 3]]}, "batchnorm", lost=[1, 2, 3], copies=4)
    assert died(result) == [1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_random_losses_of_any_two_of_four_hosts(four: Path, seed: int) -> None:
    """With three copies: two hosts and some workers of the others at a random moment, often while another worker's death is recovered.

    With one worker a host, only two hosts: a host whose workers all die goes on with new ones, which here may belong to other hosts.
    """
    choice = random.Random(seed)
    per_host, lost = choice.choice([1, 2]), sorted(choice.sample(range(4), 2))
    workers = range(4 * per_host)
    gone = [worker for worker in workers if worker % 4 in lost]
    left = [worker for worker in workers if worker % 4 not in lost]
    phase, step = choice.choice(STEP_PHASES), choice.randrange(1, STEPS - 1)
    victims = sorted([*gone, *choice.sample(left, choice.randrange(len(left)) if per_host > 1 else 0)])
    fates = {choice.choice(gone): ["enter", step, choice.randrange(1, 3) if phase in ("forward", "backward") else 1, phase, victims]}
    if per_host > 1 and choice.random() < 0.5:
        when = ["enter", step, 1, "forward", None] if choice.random() < 0.5 else ["enter", None, 1, choice.choice(RECOVERY_PHASES), None]
        fates[choice.choice(left)] = when
    case = choice.choice(["adamw", "batchnorm", "average, momentum", "scheduler, objects, tied"])
    run(four, fates, case, lost=lost, copies=3, workers=len(workers))

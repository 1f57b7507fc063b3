"""A plug-in of pytest: the fixture `chaos`, for suites that test their own training scripts under faults.

    def test_training_survives(chaos):
        faults = chaos("train.py:train", workers=3, steps=40)
        faults.kill(worker=2, at_step=12).stop(worker=1, at_step=20, seconds=2)
        outcome = faults.run()
        assert outcome.fired == {"kill": 1, "stop": 1}
        assert outcome.losses[-1] < outcome.losses[0]

`run` fails the test unless every fault took effect and every oracle passes (docs/chaos.md).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from elastic.chaos.trial import Record


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that is over. `record` has all evidence and findings."""

    record: Record

    @property
    def verdict(self) -> str:
        """`pass`, `fail` or `unknown`."""
        return self.record.verdict

    @property
    def reasons(self) -> list[str]:
        """Why it is not a pass."""
        return self.record.reasons

    @property
    def fired(self) -> Counter[str]:
        """How many faults of each kind have taken effect, as was observed."""
        return Counter(effect.injection.kind for effect in self.record.evidence.effects if effect.proof is not None)

    @property
    def losses(self) -> list[float]:
        """The loss of each step, as loops were given them."""
        return [given.loss for given in self.record.evidence.steps.values()]

    @property
    def incidents(self) -> tuple[dict[str, Any], ...]:
        """The job's incidents, as in `incidents.jsonl`."""
        return self.record.evidence.incidents


class Faults:
    """A job, and the faults that it gets. There is a method for each kind of `elastic chaos list`, with `_` for `-`:

    `kill(worker=2, at_step=12, phase="backward")`, `stop(worker=1, at=3.5, seconds=4)`, `host_loss(host=1, at_step=20)`. `worker` is a
    place in the view, `at` seconds after the first step. Each returns this object. They raise SettingsError for a fault that cannot be.
    """

    def __init__(self, job: Any) -> None:
        self.job = job
        self.injections: list[Any] = []
        self._drawn = 0
        self.ran = False

    def __getattr__(self, name: str) -> Callable[..., Faults]:
        from elastic.chaos.kinds import KINDS

        kind = name.replace("_", "-")
        if kind not in KINDS:
            raise AttributeError(f"there is no fault {name!r}: use {', '.join(each.replace('-', '_') for each in KINDS)}")
        return lambda **options: self._add(kind, **options)

    def _add(self, kind: str, *, at_step: int | None = None, at: float | None = None, worker: int = 0, **options: Any) -> Faults:
        from elastic.chaos.injection import Injection

        self.injections.append(Injection(kind=kind, step=at_step, time=at, place=worker, **options))
        return self

    def random(self, seed: int, mtbf: float, *, kinds: list[str] | None = None, count: int | None = None) -> Faults:
        """Adds random faults as `elastic chaos run` draws them from its seed: `count` of them, or until the job ends."""
        from elastic.chaos.random_schedule import drawn

        found = drawn(self.job, seed, mtbf, kinds, count).injections
        self.injections += found
        self._drawn += len(found)
        return self

    def run(self, *, check: bool = True) -> Outcome:
        """Runs the job under these faults. With `check`, the test fails unless the verdict is a pass."""
        from elastic.chaos import trial
        from elastic.chaos.schedule import Schedule

        self.ran = True
        only_drawn = 0 < len(self.injections) == self._drawn
        outcome = Outcome(trial.run(Schedule(job=self.job, injections=tuple(self.injections), drawn=only_drawn), print))
        if check and outcome.verdict != "pass":
            pytest.fail("\n".join([f"chaos: {outcome.verdict}", *outcome.reasons]), pytrace=False)
        return outcome


class Chaos:
    """Makes jobs for faults."""

    def __init__(self) -> None:
        self.made: list[Faults] = []

    def __call__(self, script: Callable[..., Any] | str, *args: Any, **job: Any) -> Faults:
        """A job of the train function `script` with these JSON arguments; `job` are the fields of `elastic.chaos.schedule.JobSpec`, such as
        `workers`, `stages`, `hosts`, `steps`, `minutes` and `checkpoint_every`."""
        from elastic.chaos.schedule import JobSpec
        from elastic.script.target import name_of

        name = name_of(_named(script))
        self.made.append(Faults(JobSpec.from_json({"script": name, "args": args, **job})))
        return self.made[-1]


def _named(script: Callable[..., Any] | str) -> str:
    """The name of a train function by its file: modules of a test suite cannot be imported by their names elsewhere."""
    if isinstance(script, str):
        return script
    return f"{Path(inspect.getfile(script)).resolve()}:{script.__qualname__}"


@pytest.fixture
def chaos() -> Iterator[Chaos]:
    """Runs train functions under real faults, and checks that the training was not hurt. See `elastic.chaos.pytest_plugin`."""
    made = Chaos()
    yield made
    forgotten = [faults for faults in made.made if not faults.ran]
    if forgotten:
        pytest.fail(f"{len(forgotten)} job(s) of the chaos fixture were never run: call run()", pytrace=False)

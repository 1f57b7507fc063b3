"""Tests of the watch that looks at workers regularly."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from elastic.control.watch import Subjects, Watch
from elastic.health.evidence import Observed
from elastic.health.judge import LOOK_S
from tests.health.observing import LIMITS, Condition, waiting


class Scene:
    """A clock, its timers, and workers in given conditions."""

    def __init__(self, workers: dict[int, Condition]) -> None:
        self.workers, self.now = workers, 0.0
        self.due: Callable[[], None] = lambda: None

    def look(self, workers: Iterable[int]) -> list[Observed]:
        return [self.workers[worker].observed(worker, self.now) for worker in workers]

    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None:
        assert seconds == LOOK_S
        self.due = act

    def clear_timer(self, name: str = "") -> None:
        self.due = lambda: None


def test_a_worker_that_is_only_reported_is_named_with_its_host() -> None:
    scene, said = Scene({0: waiting(1), 1: Condition(state="R", ran=0.001, delayed=0.999)}), list[str]()
    subjects = Subjects(awaited=(0, 1))
    hosts = {0: "here", 1: "there"}
    watch = Watch(scene, scene, LIMITS, lambda: subjects, lambda _: None, said.append, lambda: scene.now, host=hosts.__getitem__)
    watch.look()
    while scene.now < 12.0:
        scene.now += LOOK_S
        scene.due()
    watch.close()
    (sentence,) = said
    assert sentence.startswith("worker 1 (process 71 on there) is out of processor time: ")

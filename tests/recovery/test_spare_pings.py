"""Tests which spares cannot join: stopped ones, and those that do not answer; a pause of the agent is nobody's silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from elastic.control.spare_pings import EVERY_S, GIVEN_UP, SparePings
from elastic.health.evidence import Observed


@dataclass
class Scene:
    """Two spares, 3 and 4. `deaf` ones do not answer, `stopped` ones do not run."""

    deaf: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    spares: set[int] = field(default_factory=lambda: {3, 4})
    now: float = 100.0
    heard: dict[int, float] = field(default_factory=lambda: {3: 100.0, 4: 100.0})
    changes: int = 0
    excluded: dict[int, str] = field(default_factory=dict)
    timer: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.pings = SparePings(self, self, lambda: self.spares, self.changed, self.excluded.__setitem__, lambda: self.now)  # type: ignore[arg-type]

    def changed(self) -> None:
        self.changes += 1

    def look(self, workers: Iterable[int]) -> list[Observed]:
        return [
            Observed(worker=worker, pid=worker, state="T" if worker in self.stopped else "S", mute_s=self.now - self.heard[worker])
            for worker in workers
        ]

    def tell(self, workers: Iterable[int], message: Any, segments: Iterable[int] = ()) -> None:
        assert message == {"type": "ping"}
        self.heard |= {worker: self.now for worker in workers if worker not in self.deaf | self.stopped}

    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None:
        assert (seconds, name) == (EVERY_S, "pings")
        self.timer = act

    def clear_timer(self, name: str = "") -> None:
        self.timer = None

    def pass_by(self, pings: int, seconds: float = EVERY_S) -> frozenset[int]:
        for _ in range(pings):
            self.now += seconds
            assert self.timer is not None
            self.timer()
        return self.pings.unable()


def test_all_answer() -> None:
    scene = Scene()
    assert scene.pass_by(20) == set()
    assert scene.excluded == {}


def test_a_stopped_one_is_known_at_once() -> None:
    scene = Scene()
    scene.stopped = {4}
    assert scene.pings.unable() == {4}
    scene.stopped.clear()
    assert scene.pings.unable() == set()


def test_a_silent_one_is_known_behind_the_next_ping_and_given_up_later() -> None:
    scene = Scene(deaf={3})
    assert scene.pass_by(2) == {3}
    assert scene.changes > 0
    scene.pass_by(GIVEN_UP - 2)
    assert scene.excluded == {}
    scene.pass_by(1)
    assert scene.excluded == {3: "a spare, which has not answered for 20 s"}


def test_one_that_answers_again() -> None:
    scene = Scene(deaf={3})
    scene.pass_by(3)
    scene.deaf.clear()
    assert scene.pass_by(2) == set()
    scene.pass_by(2 * GIVEN_UP)
    assert scene.excluded == {}


def test_a_pause_of_the_agent_is_nobodys_silence() -> None:
    scene = Scene()
    scene.pass_by(2)
    assert scene.pass_by(1, seconds=3600.0) == set()


def test_spares_come_and_go() -> None:
    scene = Scene(deaf={3})
    scene.pass_by(3)
    scene.spares = {5}
    scene.heard[5] = scene.now
    assert scene.pass_by(3) == set()
    scene.pings.close()
    assert scene.timer is None

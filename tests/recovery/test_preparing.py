"""Tests preparing plans: in slices, while the agent is idle, and again after links change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from elastic.control.preparing import PAUSE_S, RENEWED_S, SETTLED_S, SLICE_S, Preparing
from elastic.plan.fleet import Fleet
from elastic.plan.search import asking
from elastic.plan.site import LinkSpeed, Pair
from elastic.recovery.proposal import propose
from elastic.view import Member, View
from tests.recovery.recovering import inventories_of, view_of

SLOW, FAST = LinkSpeed(latency_s=1e-4, bytes_per_s=1e9), LinkSpeed(latency_s=1e-4, bytes_per_s=2e9)


@dataclass
class Scene:
    """A slice passes with every look at the clock, so each is for one candidate."""

    view: View
    links: dict[Pair, LinkSpeed] = field(default_factory=dict)
    idle: bool = True
    now: float = 0.0
    timer: tuple[float, Callable[[], None]] | None = None
    spare: Member | None = None

    def __post_init__(self) -> None:
        self.preparing = Preparing(self, self.clock, None, lambda: dict(self.links), lambda: self.idle, lambda: self.spare)
        self.preparing.begin(self.view)

    def clock(self) -> float:
        self.now += SLICE_S
        return self.now

    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None:
        assert name == "prepare"
        self.timer = seconds, act

    def clear_timer(self, name: str = "") -> None:
        self.timer = None

    def wait(self) -> float:
        """Until the timer; how long that was."""
        assert self.timer is not None
        seconds, act = self.timer
        act()
        return seconds

    def finish(self) -> int:
        """Runs all slices; returns their number."""
        slices = 0
        while self.timer is not None and self.timer[0] == PAUSE_S:
            self.wait()
            slices += 1
        return slices

    def ready(self, lost: int) -> bool:
        assert self.preparing.prepared is not None
        site = self.view.site.knowing(self.preparing.links)
        left = Fleet.of([member for member in self.view.members if member.worker != lost], site)
        return self.preparing.prepared.answer(asking(left, self.view.workload, None)) is not None


def test_a_view_is_prepared_for_in_slices_and_proposals_are_the_same():
    scene = Scene(view_of([0, 1, 2, 3], stages=2), {("host", "host"): SLOW})
    assert scene.wait() == SETTLED_S
    assert not scene.ready(0)
    assert scene.finish() > 0
    assert all(scene.ready(lost) for lost in scene.view.workers)
    assert scene.timer is not None
    assert scene.timer[0] == RENEWED_S
    for lost in scene.view.workers:
        left = inventories_of(scene.view, [worker for worker in scene.view.workers if worker != lost])
        fresh, found = (
            propose(last=scene.view, attempt=1, inventories=left, joiners={}, stages=None, links=scene.preparing.links, prepared=each)
            for each in (None, scene.preparing.prepared)
        )
        assert found == fresh


def test_the_loss_of_a_host_is_prepared_for_and_alike_hosts_are_one_question():
    scene = Scene(view_of([0, 3, 1, 4, 2, 5], stages=2, hosts=("a", "b", "c")))  # two workers each, side by side
    scene.wait()
    scene.finish()
    prepared = scene.preparing.prepared
    assert prepared is not None
    hosts, questions = {member.worker: member.host for member in scene.view.members}, []
    for host in "abc":
        left = [worker for worker in scene.view.workers if hosts[worker] != host]
        fleet = Fleet.of([member for member in scene.view.members if member.worker in left], scene.view.site)
        questions.append(asking(fleet, scene.view.workload, None))
        assert prepared.answer(questions[-1]) is not None
        fresh, found = (
            propose(last=scene.view, attempt=1, inventories=inventories_of(scene.view, left), joiners={}, stages=None, prepared=each)
            for each in (None, prepared)
        )
        assert found == fresh
    assert questions[0] == questions[1] == questions[2]


def test_with_a_spare_the_plan_with_it_in_the_place_of_the_lost_worker_is_prepared():
    scene = Scene(view_of([0, 1, 2, 3], stages=2))
    scene.wait()
    scene.finish()
    without = scene.preparing.prepared
    assert without is not None
    scene.spare = replace(scene.view.members[0], worker=9, base=7, memory=1 << 40)
    scene.preparing.renew()
    assert scene.wait() == SETTLED_S
    scene.finish()
    for lost in scene.view.workers:
        left = inventories_of(scene.view, [worker for worker in scene.view.workers if worker != lost])
        joined = Fleet.of([*(member for member in scene.view.members if member.worker != lost), scene.spare], scene.view.site)
        question = asking(joined, scene.view.workload, None)
        assert scene.preparing.prepared is not None
        assert scene.preparing.prepared.answer(question) is not None
        assert without.answer(question) is None
        given = {"last": scene.view, "attempt": 1, "inventories": left, "joiners": {9: scene.spare}, "stages": None}
        assert propose(**given, prepared=scene.preparing.prepared) == propose(**given)
    scene.wait()
    assert scene.timer is not None
    assert scene.timer[0] == RENEWED_S, "the same spare"


def test_alone_with_a_spare():
    scene = Scene(view_of([0], stages=1))
    scene.spare = replace(scene.view.members[0], worker=9)
    scene.wait()
    assert scene.finish() > 0


def test_it_waits_while_there_is_something_to_do():
    scene = Scene(view_of([0, 1, 2], stages=2), idle=False)
    assert scene.wait() == SETTLED_S
    assert scene.preparing.prepared is None
    scene.idle = True
    assert scene.wait() == RENEWED_S
    scene.idle = False
    for _ in range(5):
        assert scene.wait() == PAUSE_S
    assert not scene.ready(0)
    scene.idle = True
    scene.finish()
    assert scene.ready(0)


def test_it_is_done_again_only_where_links_have_changed_much():
    scene = Scene(view_of([0, 1, 2], stages=2), {("host", "host"): SLOW})
    scene.wait()
    scene.finish()
    first = scene.preparing.prepared
    scene.links["host", "host"] = LinkSpeed(latency_s=1e-4, bytes_per_s=1.1e9)
    assert scene.wait() == RENEWED_S
    assert scene.preparing.prepared is first
    scene.links["host", "host"] = FAST
    scene.wait()
    assert scene.preparing.prepared is not first
    assert scene.preparing.links["host", "host"] == FAST


def test_another_view_forgets_it_and_the_end_stops_it():
    scene = Scene(view_of([0, 1, 2], stages=2))
    scene.wait()
    scene.preparing.begin(view_of([0, 1], stages=2))
    assert scene.preparing.prepared is None
    scene.preparing.close()
    assert scene.timer is None


def test_alone_there_is_nobody_to_lose():
    scene = Scene(view_of([0], stages=1))
    scene.wait()
    assert scene.timer is not None
    assert scene.timer[0] == RENEWED_S

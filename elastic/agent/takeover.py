"""Goes on with a job whose coordinating agent is lost: collects what the other hosts know, and resumes from the committed view."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from elastic.agent.admissions import Admissions
from elastic.agent.coordinator import Coordinator
from elastic.agent.follower import Follower
from elastic.agent.loop import Loop
from elastic.control.outcome import failed
from elastic.control.state import Resumed
from elastic.errors import HostLost
from elastic.host.channel import Message
from elastic.membership.etcd_thread import EtcdTask, EtcdThread

if TYPE_CHECKING:
    from elastic.comm.message import AttemptId
    from elastic.membership.session import Session
    from elastic.view import View

_GATHER_S = 10.0  # how long hosts are awaited whose agents live, as far as etcd knows: they look for a coordinator all the time
_ANSWER_S = 3.0  # a longer time without an answer of etcd does not count: hosts need etcd to look for the coordinator
_AGAIN_S = 0.3
_WAITS = "the takeover of the job"
_TIMER = "takeover"


class Takeover:
    """Makes `coordinator` go on with the job, with the workers of this host, which were `follower`'s, and of those that arrive.

    It calls `resumed` then; until then nothing else may be asked of the coordinator.
    """

    def __init__(
        self,
        loop: Loop,
        session: Session,
        etcd_thread: EtcdThread,
        coordinator: Coordinator,
        admissions: Admissions,
        follower: Follower,
        end: Callable[[Message], None],
        resumed: Callable[[], None],
    ) -> None:
        self._loop, self._session, self._coordinator, self._admissions = loop, session, coordinator, admissions
        self._etcd_thread, self._follower, self._end = etcd_thread, follower, end
        self._resumed = resumed
        self._asking = False
        self._gathered_s, self._asked_at = 0.0, time.monotonic()
        admissions.arrived = self.begin

    def begin(self) -> None:
        """Resumes the job if all hosts that may have survived are there, or have been awaited long enough; else waits on."""
        if not self._asking:
            self._asking = True
            self._etcd_thread.run(EtcdTask(call=self._session.survivors, done=self._surveyed, waits=_WAITS))

    def _surveyed(self, found: tuple[str | None, set[str] | None]) -> None:
        """Gets the mark of the committed view and the agents that live, if they are known."""
        self._asking = False
        now, before = time.monotonic(), self._asked_at
        self._gathered_s, self._asked_at = self._gathered_s + min(now - before, _ANSWER_S), now
        (text, agents), facts = found, self._admissions.facts
        view = None if facts is None or text is None else facts.view(text)
        if self._gathered_s < _GATHER_S and (view is None or agents is None or not self._complete(view, agents)):
            self._loop.set_timer(_AGAIN_S, self.begin, _TIMER)
            return
        self._admissions.arrived = lambda: None
        self._loop.clear_timer(_TIMER)
        if view is None:
            why = f"no host that is left knows the committed view {text}: its state is lost. Start the job again"
            self._end(failed(HostLost, why))
            return
        take_over, resume = partial(self._session.take_over, view), partial(self._resume, view)
        self._etcd_thread.run(EtcdTask(call=take_over, done=resume, waits=_WAITS))

    def _resume(self, view: View, burned: AttemptId) -> None:
        facts = self._admissions.facts
        assert facts is not None  # it has named the view
        started = max(facts.last_worker, *view.workers, *self._coordinator.hosts.workers)
        carrier = self._follower.carrier
        resumed = Resumed(attempt_id=burned, next_worker=started + 1, incidents=() if carrier is None else carrier.logged)
        steady = self._follower.steady and self._admissions.steady
        why = {self._follower.before: self._follower.lost_because} if self._follower.before is not None else {}
        self._coordinator.take_over(facts, view, resumed, self._follower.alone_since, why=why, steady=steady)
        self._admissions.resumes()
        for message in self._follower.unsent:
            if message["type"] == "heard":
                self._coordinator.heard(self._coordinator.hosts.worker(message["worker"]), message["message"])
        self._resumed()

    def _complete(self, view: View, agents: set[str]) -> bool:
        """Whether all hosts of the view are there whose agents live."""
        hosts = {member.host for member in view.members}.intersection(agents)
        return hosts <= self._coordinator.hosts.present.keys()

"""Goes on with a job whose coordinating agent is lost: collects what the other hosts know, and resumes from the committed view."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic.agent.admissions import Admissions
from elastic.agent.coordinator import Coordinator
from elastic.agent.follower import Follower
from elastic.agent.loop import Loop
from elastic.control.outcome import failed
from elastic.control.state import Resumed
from elastic.errors import EtcdUnavailable, HostLost
from elastic.host.channel import Message
from elastic.observe.console import say

if TYPE_CHECKING:
    from elastic.membership.session import Session
    from elastic.view import View

_GATHER_S = 10.0  # how long hosts are awaited whose agents live, as far as etcd knows: they look for a coordinator all the time
_AGAIN_S = 0.3
_TIMER = "takeover"


class Takeover:
    """Makes `coordinator` go on with the job, with the workers of this host, which were `follower`'s, and of those that arrive."""

    def __init__(
        self,
        loop: Loop,
        session: Session,
        coordinator: Coordinator,
        admissions: Admissions,
        follower: Follower,
        name: str,
        end: Callable[[Message], None],
    ) -> None:
        self._loop, self._session, self._coordinator, self._admissions = loop, session, coordinator, admissions
        self._follower, self._name, self._end = follower, name, end
        self._until = time.monotonic() + _GATHER_S
        admissions.arrived = self.begin

    def begin(self) -> None:
        """Resumes the job if all hosts that may have survived are there, or have been awaited long enough; else waits on."""
        facts = self._admissions.facts
        try:
            text = self._session.mark()
            view = None if facts is None or text is None else facts.view(text)
            if time.monotonic() < self._until and (view is None or not self._complete(view)):
                self._loop.set_timer(_AGAIN_S, self.begin, _TIMER)
                return
            self._admissions.arrived = lambda: None
            self._loop.clear_timer(_TIMER)
            if facts is None or view is None:
                why = f"no host that is left knows the committed view {text}: its state is lost. Start the job again"
                self._end(failed(HostLost, why))
                return
            burned = self._session.take_over(view)
        except EtcdUnavailable as error:
            self._until = time.monotonic() + _GATHER_S
            say(f"{error}; the job waits for it")
            self._loop.set_timer(_AGAIN_S, self.begin, _TIMER)
            return
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

    def _complete(self, view: View) -> bool:
        """Whether all hosts of the view are there whose agents live."""
        hosts = {member.host for member in view.members}.intersection(self._session.agents())
        return hosts <= self._coordinator.hosts.present.keys()

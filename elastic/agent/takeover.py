"""Goes on with a job whose coordinating agent is lost: collects what the other hosts know, and resumes from the committed view.

The mark at etcd says which view that is. If etcd has lost the mark, with other data, it is the last one of which any host has heard that it
was committed, or whose mark this agent has seen. It is written again, and the job goes on, if no other host can be training in a newer one
(`witnesses.doubtful`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from elastic.agent.admissions import Admissions
from elastic.agent.coordinator import Coordinator
from elastic.agent.follower import Follower
from elastic.agent.loop import Loop
from elastic.agent.witnesses import LifeSigns, doubtful
from elastic.control.outcome import failed
from elastic.control.state import Resumed
from elastic.errors import Conflict, HostLost
from elastic.host.channel import Message
from elastic.membership.etcd_thread import EtcdTask, EtcdThread
from elastic.observe.console import say

if TYPE_CHECKING:
    from elastic.comm.message import AttemptId
    from elastic.membership.session import Session, Survey
    from elastic.view import View

_GATHER_S = 10.0  # how long hosts are awaited whose agents live, as far as etcd knows: they look for a coordinator all the time
_ANSWER_S = 3.0  # a longer time without an answer of etcd does not count: hosts need etcd to look for the coordinator
_DOUBT_S = 60.0  # how long hosts are awaited that might train in a newer view than the one that is known
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
        signs: LifeSigns,
        end: Callable[[Message], None],
        resumed: Callable[[], None],
    ) -> None:
        self._loop, self._session, self._coordinator, self._admissions = loop, session, coordinator, admissions
        self._etcd_thread, self._follower, self._end = etcd_thread, follower, end
        self._resumed, self._signs = resumed, signs
        self._asking = self._told = False
        self._gathered_s, self._asked_at = 0.0, time.monotonic()
        admissions.arrived = self.begin

    def begin(self) -> None:
        """Resumes the job if all hosts that may have survived are there, or have been awaited long enough; else waits on."""
        if not self._asking:
            self._asking = True
            self._etcd_thread.run(EtcdTask(call=self._session.survey, done=self._surveyed, waits=_WAITS))

    def _surveyed(self, survey: Survey) -> None:
        """Gets what etcd knows now: waits on, resumes the job, or gives it up."""
        self._asking = False
        now, before = time.monotonic(), self._asked_at
        self._gathered_s, self._asked_at = self._gathered_s + min(now - before, _ANSWER_S), now
        facts, present = self._admissions.facts, self._coordinator.hosts.present.keys()
        view = None if facts is None else facts.last(survey.newest)
        doubts = set[str]() if view is None else self._doubts(view, survey)
        complete = view is not None and survey.agents is not None and self._expected(view, survey) <= present
        if self._gathered_s < (_DOUBT_S if doubts else _GATHER_S) and (doubts or not complete):
            self._loop.set_timer(_AGAIN_S, self.begin, _TIMER)
        elif view is None or facts is None:
            self._give_up(f"no host that is left knows the committed view {survey.newest}: its state is lost. Start the job again")
        elif doubts:
            self._give_up(self._unproven(view, doubts))
        else:
            self._arrived()
            take_over, resume = partial(self._session.take_over, view, facts.heard), partial(self._resume, view)
            self._etcd_thread.run(EtcdTask(call=take_over, done=resume, refused=self._refused, waits=_WAITS))

    def _arrived(self) -> None:
        """Waits for no more hosts."""
        self._admissions.arrived = lambda: None
        self._loop.clear_timer(_TIMER)
        self._signs.close()

    def _give_up(self, why: str) -> None:
        self._arrived()
        self._end(failed(HostLost, why))

    def _refused(self, error: Conflict) -> None:
        self._end({"type": "rejoin", "why": str(error)})

    def _doubts(self, view: View, survey: Survey) -> set[str]:
        """Returns the hosts that might train in a newer view than this one; none if etcd has its mark."""
        from elastic.membership.views import mark  # imports the etcd client, which takes long

        if survey.mark == mark(view):
            return set()
        hosts, present = {member.host for member in view.members}, self._coordinator.hosts.present.keys()
        self._signs.ask(hosts - present)
        doubts = doubtful(hosts, present, self._signs.gone)
        if doubts and not self._told and self._gathered_s > _GATHER_S:
            self._told = True
            say(f"etcd has lost the data of this job, and host{_names(doubts)} may train without this one: they are awaited")
        return doubts

    def _unproven(self, view: View, doubts: set[str]) -> str:
        return (
            f"etcd has lost the data of this job, and with it the record of its members. Host{_names(doubts)} of epoch {view.epoch} "
            f"cannot be reached for {_DOUBT_S:g} s, and may have gone on without this host, which therefore ends. If the job runs there, "
            "start this host again to join it; else start all hosts again: the job goes on from its newest checkpoint"
        )

    def _expected(self, view: View, survey: Survey) -> set[str]:
        """Returns the hosts whose agents live and that may know the last view: if etcd has lost it, these may be any."""
        alive = survey.agents or set()
        return alive if survey.mark is None else alive.intersection(member.host for member in view.members)

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


def _names(hosts: set[str]) -> str:
    return f"{'s' * (len(hosts) > 1)} {', '.join(sorted(hosts))}"

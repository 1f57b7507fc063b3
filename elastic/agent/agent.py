"""The supervisor process of one host: starts its workers, watches them, and represents them in etcd.

It does not import torch. Its loop waits for the launcher, the fork server, each worker's socket and pidfd, other agents, and for events
from the threads of the etcd client. It never waits for an etcd that is not its own: such calls are tasks of an `EtcdThread`. One agent of a
job coordinates it (`Coordinator`), the others follow (`Follower`). The first event that decides how the job ends sets the outcome; then
each agent ends all processes that it started.

    launcher -> agent   start {...} | stop {} | kill {}; the end of the connection is the launcher's death
    agent -> launcher   done {value, epoch, stopped, incidents, saves, skipped} | failed {kind, message} | killed {}
                        trains {incarnation}: the job has a view; a new agent of this host must not found another job
                        rejoin {why}: the job goes on without this agent, and a new one is to take part in it
                        drained {}: the job goes on without this host
                        noticed {}: this machine is about to be taken away, and the host is drained
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.agent import requests
from elastic.agent.admissions import ENDS, Admissions
from elastic.agent.agent_link import AgentListener, secret_of
from elastic.agent.carrier import LocalCarrier
from elastic.agent.coordinator import Coordinator
from elastic.agent.crew import Crew
from elastic.agent.follower import Follower
from elastic.agent.hosts import Hosts
from elastic.agent.link_probes import LinkProbes
from elastic.agent.loop import Loop
from elastic.agent.record import JobRecord
from elastic.agent.segments import Segments
from elastic.agent.start import Sharing, Start
from elastic.agent.takeover import Takeover
from elastic.agent.witnesses import LifeSigns
from elastic.comm.tls import Tls
from elastic.control.outcome import failed
from elastic.errors import ElasticError, EtcdUnavailable, HostLost, JobFailed, NameLost
from elastic.host import signals
from elastic.host.channel import Channel, Message
from elastic.host.facts import HostFacts
from elastic.host.rundir import RunDirectory
from elastic.membership.etcd_thread import DEADLINE_S, EtcdTask, EtcdThread
from elastic.observe import console
from elastic.observe.console import drain, say
from elastic.settings import JobSettings
from elastic.worker.job import WorkerSpec

if TYPE_CHECKING:
    from elastic.agent.notice_watch import NoticeWatch
    from elastic.host.notices import Notice
    from elastic.membership.session import Session
    from elastic.view import View

_LEAVES_EARLIER_S = 2.0  # than the machine is taken away


class Agent:
    """Takes part in one job until it has an outcome. An agent of a shared job has a name that no other has, also on the same machine."""

    def __init__(self, launcher: Channel, start: Start) -> None:
        self.outcome: Message | None = None
        self.launcher_gone = False
        self._launcher = launcher
        self._start = start
        launcher.sock.setblocking(False)  # a launcher that stands still must not stop the job
        self._record = JobRecord(start, RunDirectory(Path(start.directory)), launcher)
        console.own.heard = self._record.said
        console.own.lead = console.CLEARS_LINE if start.bar else ""
        host = socket.gethostname()
        self._name = host if start.sharing is None else f"{host}-{secrets.token_hex(3)}"
        self._secret = secrets.token_hex(32) if start.sharing is None else start.sharing.secret
        self._credentials = None if start.sharing is None else start.sharing.credentials_for_tls()
        self._tls = Tls.of(self._credentials)
        self._session: Session | None = None
        self._crew: Crew | None = None
        self._role: Coordinator | Follower | None = None
        self._admissions: Admissions | None = None
        self._listener: AgentListener | None = None
        self._probes: LinkProbes | None = None
        self._computed: dict[str, Any] | None = None  # how this host computes, once it was measured
        self._stopping = self._trains = self._forks = self._outage = self._closed = self._taking_over = False
        self._loop = Loop()
        self._notices: NoticeWatch | None = None
        self._etcd_thread = EtcdThread(self._loop.post, self._etcd_away, self._etcd_back, self._etcd_failed, unanswered=self._unanswered)
        signals.obey(lambda: self._loop.post(self.stop))
        if start.sharing is None:  # it coordinates in any case: the fork server starts while etcd is joined
            self._make_crew(start.settings)

    def run(self) -> None:
        """Returns as soon as there is an outcome, or the launcher is gone."""
        try:
            self._watch_notices()
            self._join()
            while self.outcome is None and not self.launcher_gone:
                self._loop.turn()
                self._tell_incarnation()
        except ElasticError as error:
            self._end(self._left_outcome(error) or failed(type(error), str(error)))

    def _left_outcome(self, error: ElasticError) -> Message | None:
        """Returns how the job has ended, if this host was cut off from it then, and finds that another job has its name."""
        with suppress(EtcdUnavailable):
            return self._session.outcome() if isinstance(error, NameLost) and self._session is not None else None

    def _tell_incarnation(self) -> None:
        role, session = self._role, self._session
        trains = role is not None and (role.driver is not None if isinstance(role, Coordinator) else role.trains)
        if trains and session is not None and not self._trains:
            self._trains = True
            self._launcher.send({"type": "trains", "incarnation": session.incarnation})

    def close(self) -> None:
        """Ends every process of the job on this host."""
        if self._notices is not None:
            self._notices.close()
        if self._role is not None:
            self._role.close(self.outcome)
        if self._admissions is not None:
            self._admissions.close(self.outcome or {"type": "killed"})
        if self._probes is not None:
            self._probes.close()
        if self._listener is not None:
            self._listener.close()
        if self._crew is not None:
            self._crew.close()
        if self._role is not None:
            self._role.close_files()
        self._record.close(self.outcome)
        drain()
        self._closed = True
        self._etcd_thread.stop()
        if self._session is not None:
            outcome = self.outcome if self.outcome is not None and self.outcome["type"] in ENDS else None
            self._session.close(goes_on=self._start.sharing is not None and outcome is None, outcome=outcome)

    def stop(self) -> None:
        """Stops the job at the next step boundary; in a job of several hosts, lets the others go on without this one."""
        self._stopping = True
        if isinstance(self._role, Follower):
            self._role.drain()
        elif self._taking_over:
            return  # it is done when the job goes on
        elif self._role is not None and self._start.sharing is not None:
            self._role.drain(self._name)
        elif self._role is not None:
            self._role.stop()
        elif self._outage:
            self._end({"type": "drained"})  # it has no part in the job yet

    def _watch_notices(self) -> None:
        if self._start.drain_on is not None:
            from elastic.agent.notice_watch import NoticeWatch  # few jobs need it
            from elastic.host.notices import notice_source

            found = lambda notice: self._loop.post(lambda: self._noticed(notice))  # noqa: E731
            self._notices = NoticeWatch(notice_source(self._start.drain_on), found, lambda sentence: self._loop.post(lambda: say(sentence)))

    def _noticed(self, notice: Notice) -> None:
        """Drains this host, which is about to be taken away. In a job of several hosts it leaves in time even if that takes too long."""
        left = "" if notice.left_s is None else f", in {notice.left_s:.0f} s"
        say(f"this machine is about to be taken away{left} ({notice.why})")
        self._launcher.send({"type": "noticed"})
        self.stop()
        if notice.left_s is not None and self._start.sharing is not None:
            self._loop.set_timer(max(0.0, notice.left_s - _LEAVES_EARLIER_S), self._leave_now, "notice")

    def _leave_now(self) -> None:
        """Leaves at once, unless that ends the job: others then need not wait until this host has been silent for long enough."""
        alone = isinstance(self._role, Coordinator) and len(self._role.hosts.present) < 2
        if self.outcome is None and not alone:
            say("the time that this machine has left is over: the other hosts go on without it, from their copies")
            self._end({"type": "drained"})

    def _join(self) -> None:
        self._loop.watch(self._launcher, self._hear_launcher)
        if self._start.settings.etcd is None:  # etcd is tied to the thread that starts it
            self._joined(self._connect(secrets.token_hex(8)))
        else:
            connect = partial(self._connect, secrets.token_hex(8))
            waits = "the start of the job" if self._start.sharing is None else "this host's part in the job"
            self._etcd_thread.run(EtcdTask(call=connect, done=self._joined, refused=self._etcd_failed, waits=waits))

    def _connect(self, own: str) -> Session:
        # Imported here, while the fork server starts: both take long.
        from elastic.membership.session import Notices, Session

        sharing = self._start.sharing
        notices = Notices(
            view=lambda view: self._loop.post(lambda: self._seen(view)),
            lost=lambda error: self._loop.post(lambda: self._etcd_failed(error)),
            say=lambda sentence: self._loop.post(lambda: say(sentence)),
            deposed=lambda why: self._loop.post(lambda: self._deposed(why)),
        )
        session = self._session = Session(
            self._start.settings,
            Path(self._start.directory),
            notices,
            agent=self._name,
            shared=sharing is not None,
            incarnation=self._start.incarnation,
            own=own,
        )
        if self._closed:  # the agent has not waited for it
            session.close(goes_on=sharing is not None)
        return session

    def _joined(self, session: Session) -> None:
        sharing = self._start.sharing
        session.tend(self._loop)
        if sharing is None:
            self._take_role(session, coordinates=True)
            return
        key = bytes.fromhex(sharing.secret)
        self._listener = AgentListener(self._loop, secret_of(key, self._name), sharing.interface, self._tls)
        self._probes = LinkProbes(self._loop, key, self._name, self._listener.address, self._tls)
        self._listener.connected = self._probes.accept  # until it coordinates
        self._probes.asked = partial(requests.answer_here, self._record.directory, self._name)
        if session.coordinates:
            campaign = partial(session.campaign, self._listener.address)
            take = lambda won: self._take_role(session, coordinates=won)  # noqa: E731
            self._etcd_thread.run(EtcdTask(call=campaign, done=take, waits="the founding of the job"))
        else:
            self._take_role(session, coordinates=False)

    def _take_role(self, session: Session, *, coordinates: bool) -> None:
        session.coordinates = coordinates
        if coordinates or self._probes is None:
            self._coordinate(session, self._start.sharing)
        else:
            parts = (session, self._etcd_thread, self._make_crew, self._elected, self._end, self._tls)
            self._role = Follower(self._loop, self._start, self._name, self._probes, *parts)
            self._role.begin()
        if self._stopping:
            self.stop()

    def _coordinate(self, session: Session, sharing: Sharing | None) -> None:
        settings = self._start.settings
        crew = self._crew or self._make_crew(settings)
        directory = RunDirectory(Path(self._start.directory))
        facts = HostFacts.here(None if sharing is None else sharing.rack)
        local = LocalCarrier(crew, directory, self._name, room=settings.workers, spares=settings.spares, facts=facts)
        self._role = Coordinator(self._loop, self._start, Hosts(local), session, self._etcd_thread, self._end, self._record)
        if sharing is not None and self._listener is not None and self._probes is not None:
            self._admissions = Admissions(self._loop, self._start, sharing, self._role, self._listener, self._probes, tls=self._tls)
            self._tell_computed()
        crew.listen()
        if self._forks and self._admissions is None:
            self._role.found()

    def _elected(self, follower: Follower, mark: str | None) -> None:
        """Coordinates the job from now on: founds it, or goes on with it, if `mark` names a committed view."""
        session, listener, probes, carrier, facts = self._session, self._listener, self._probes, follower.carrier, follower.job
        if session is None or listener is None or probes is None:
            return
        if carrier is None:
            self._coordinate(session, follower.sharing)
        elif facts is None or (mark is None and facts.committed == (0, 0)):  # workers may wait for a first view that nobody makes
            self._end({"type": "rejoin", "why": "the agent that was founding the job is lost"})
        else:
            gone = "has left" if follower.left == follower.before else "is lost"
            say(f"host {follower.before} {gone}: this host, {self._name}, coordinates the job now")
            self._taking_over = True
            self._role = Coordinator(self._loop, self._start, Hosts(carrier), session, self._etcd_thread, self._end, self._record)
            self._admissions = Admissions(
                self._loop, self._start, follower.sharing, self._role, listener, probes, tls=self._tls, taking_over=True
            )
            self._tell_computed()
            self._admissions.facts = facts
            signs = LifeSigns(self._loop, bytes.fromhex(self._secret), follower.agents, self._tls)
            parts = (self._role, self._admissions, follower, signs, self._end, self._taken_over)
            Takeover(self._loop, session, self._etcd_thread, *parts).begin()

    def _taken_over(self) -> None:
        """Notes that the job goes on, and leaves it if this agent was asked to meanwhile."""
        self._taking_over = False
        if self._stopping:
            self.stop()

    def _make_crew(self, settings: JobSettings) -> Crew:
        """Starts the fork server, for workers with these settings, which are the founder's."""
        self._start = replace(self._start, settings=settings)
        self._crew = Crew(
            self._loop,
            self._start.worker_environment,
            self._spec,
            segments=Segments(wanted=self._start.segments),
            ready=self._forks_ready,
            heard=lambda worker, message: self._role and self._role.heard(worker, message),
            ended=lambda worker: self._role and self._role.ended(worker),
            broken=self._broken,
        )
        return self._crew

    def _forks_ready(self) -> None:
        self._forks = True
        if self._start.sharing is not None and self._crew is not None:
            self._crew.measure(self._start.settings.threads, self._measured)
        if isinstance(self._role, Follower):
            self._role.forks_ready()
        elif self._admissions is not None:
            self._admissions.local_ready()
        elif self._role is not None:
            self._role.found()

    def _measured(self, computed: dict[str, Any]) -> None:
        """Takes how this host computes, with which others are compared, or this one is."""
        self._computed = computed
        self._tell_computed()

    def _tell_computed(self) -> None:
        if self._computed is not None and isinstance(self._role, Follower):
            self._role.measured(self._computed)
        elif self._computed is not None and self._admissions is not None:
            self._admissions.measured(self._computed)

    def _broken(self, why: str, died: bool) -> None:
        """Ends the job on this host, where no more workers can be started. Other hosts go on with a job that trains already.

        If the fork server has `died` before, that is no fault of the job.
        """
        shared = self._start.sharing is not None
        self._end({"type": "rejoin", "why": why} if self._trains and shared else failed(HostLost if died and shared else JobFailed, why))

    def _end(self, outcome: Message) -> None:
        if self.outcome is None:
            self.outcome = outcome

    def _hear_launcher(self) -> None:
        for message in self._launcher.receive():
            if message["type"] == "stop":
                self.stop()
            elif message["type"] == "kill":
                self._end({"type": "killed"})
        if self._launcher.closed:
            self._loop.forget(self._launcher)
            self.launcher_gone = True

    def _spec(self, number: int, *, slot: int, first: bool, joins: bool, workers: int | None) -> dict[str, Any]:
        sharing, settings = self._start.sharing, self._start.settings
        return WorkerSpec(
            worker=number,
            slot=slot,
            first=first,
            joins=joins,
            host=self._name,
            interface=None if sharing is None else sharing.interface,
            directory=self._start.directory,
            secret=self._links_secret(),
            tls=self._credentials,
            # etcd= may hold a password, and workers need no plan
            settings=replace(settings, workers=workers or settings.workers, etcd=None, etcd_files={}, plan=None),
            import_path=self._start.import_path,
            argv=self._start.argv,
            modules=self._start.modules,
            bar=self._start.bar,
            trace=self._start.traces,
        ).to_json()

    def _links_secret(self) -> str:
        """The secret of links between workers: of this incarnation alone, since users may have one secret for several jobs."""
        assert self._session is not None
        purpose = f"links between workers of {self._session.incarnation}"
        return hmac.new(bytes.fromhex(self._secret), purpose.encode(), hashlib.sha256).hexdigest()

    def _seen(self, view: View) -> None:
        if self.outcome is None and isinstance(self._role, Coordinator):
            self._role.seen(view)

    def _etcd_failed(self, error: ElasticError) -> None:
        trained = self._trains or self._start.incarnation is not None or self._start.sharing is None
        if isinstance(error, NameLost) and not trained:  # it has founded while etcd knew nothing of a job that trains
            self._end({"type": "rejoin", "why": "a job of this name trains already, of which etcd did not know for a while"})
        else:
            self._end(self._left_outcome(error) or failed(type(error), str(error)))

    def _deposed(self, why: str) -> None:
        if isinstance(self._role, Coordinator):
            self._end({"type": "rejoin", "why": why})

    def _etcd_away(self, error: EtcdUnavailable, seconds: float, waits: str) -> None:
        self._outage = True
        if waits:
            since = f", {seconds:.0f} s by now; it gives up after {DEADLINE_S:.0f} s" if seconds >= 1.0 else ""
            say(f"{error}; {waits} waits for it{since}")
        elif isinstance(self._role, Coordinator):
            self._role.away(error, seconds)
        if self._stopping and self._role is None:
            self.stop()

    def _etcd_back(self) -> None:
        self._outage = False
        say("etcd answers again: the work that waited for it continues")

    def _unanswered(self, error: EtcdUnavailable, seconds: float) -> None:
        if self._session is not None:
            self._session.unanswered(error, seconds)

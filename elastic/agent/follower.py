"""Lends the workers of this host to the agent that coordinates the job, on another host; becomes the coordinator if that one is lost.

A host that has lost the coordinator keeps its workers, which wait for their peers. A new coordinator goes on with them. The same one has
excluded the host meanwhile: then they are ended, and new ones join.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.agent.admissions import hello
from elastic.agent.agent_link import DIAL_S, Address, AgentLink, dial, secret_of
from elastic.agent.carrier import LocalCarrier
from elastic.agent.crew import Crew
from elastic.agent.fitness import TRY_AGAIN_S
from elastic.agent.job_facts import JobFacts
from elastic.agent.link_probes import LinkProbes
from elastic.agent.loop import Loop
from elastic.agent.node_check import NodeCheck
from elastic.agent.remote_carrier import Ended, observations
from elastic.agent.start import Sharing, Start
from elastic.agent.succession import NOBODY_S, Succession, succession
from elastic.agent.supervision import WorkerProcess
from elastic.comm.handshake import Unfit, WrongSecret
from elastic.comm.streams import Stream, TlsRefused
from elastic.comm.tls import Tls
from elastic.control.outcome import failed
from elastic.errors import HostLost, HostRefused, HostUnfit, JobFailed, LinkError, SettingsError
from elastic.health.judge import LOOK_S
from elastic.host.channel import Message
from elastic.host.facts import HostFacts
from elastic.host.rundir import RunDirectory
from elastic.membership.etcd_thread import EtcdTask, EtcdThread
from elastic.observe.console import say
from elastic.observe.incident import Incident
from elastic.settings import JobSettings

if TYPE_CHECKING:
    from elastic.membership.election import Leader
    from elastic.membership.session import Session, Standing


def ended_meanwhile(name: str) -> str:
    """Returns the error of a host that had a part in a job."""
    return f"the job {name} has ended while this host was cut off from it; the other hosts know how"


_SEARCH = "the search for the agent that coordinates the job"
_AGAIN_S = 0.3  # between two looks for the coordinator
_OUT_OF_REACH_S = 20.0  # after which a new host gives up a coordinator that lives, as far as etcd knows, and does not answer
_NAMED_S = 5.0  # longer than etcd names an agent that is lost
_BRIEF_S = 0.3  # how long the coordinator that fell silent may take to answer in that time: somebody else may be elected at any moment
_TURNED_AWAY_S = 3.0  # longer than etcd names an agent that is lost
_TOLD_S = 5.0  # after which the user is informed that there is none


class Follower:
    """One follower, whose links `probes` checks. `make_crew` starts the fork server once the job's settings are known; `elected` is
    called when this agent has become the coordinator, with the mark of the committed view, and takes everything over; `end` gets the job's
    outcome. `tls` encrypts its links."""

    def __init__(
        self,
        loop: Loop,
        start: Start,
        name: str,
        probes: LinkProbes,
        session: Session,
        etcd_thread: EtcdThread,
        make_crew: Callable[[JobSettings], Crew],
        elected: Callable[[Follower, str | None], None],
        end: Callable[[Message], None],
        tls: Tls | None,
    ) -> None:
        assert start.sharing is not None  # only agents of shared jobs follow
        self.sharing: Sharing = start.sharing
        self.job: JobFacts | None = None
        self.carrier: LocalCarrier | None = None
        self.settings: JobSettings = start.settings
        self.forks = False  # whether workers can be started
        self.before: str | None = None  # the agent that was the coordinator last
        self.agents: dict[str, Address] = {}  # where agents of the job could be dialled, also of hosts that are lost
        self.lost_because = "its agent is gone"  # how it was noticed that that one is lost
        self.left: str | None = None  # the coordinator that has left as it was asked to
        self.alone_since = time.monotonic()  # since when there is no coordinator
        self._probes, self._elected, self._etcd_thread = probes, elected, etcd_thread
        self._check: NodeCheck | None = None
        self._computed: dict[str, Any] | None = None
        self._known_since = time.monotonic()  # since when etcd has answered, and this agent has looked for the coordinator
        self._loop, self._start, self._name, self._session, self._make_crew, self._end = loop, start, name, session, make_crew, end
        self._link: AgentLink | None = None
        self._crew: Crew | None = None
        self._keeps = self._awaited = False
        self._draining = False
        self.trains = False  # whether the job has a view
        self.steady = False  # whether its workers train in the committed view, and wait for no order
        self._silent: str | None = None  # the coordinator that was lost last since it was silent
        self._vain: tuple[Leader, float] | None = None  # the coordinator that cannot be reached, and since when
        self._unsent: list[Message] = []  # what workers have told since the coordinator was lost
        self._told = False
        self._tls = tls
        self._turned_away: tuple[str | None, float] | None = None  # by which agent, since when

    def begin(self) -> None:
        """Looks for the coordinator until it is found, or this agent is."""
        self._etcd_thread.run(EtcdTask(call=self._session.standing, done=self._looked, waits=_SEARCH))

    def _looked(self, standing: Standing) -> None:
        leader = standing.leader
        if not standing.settled:
            self._known_since = time.monotonic()
        won = leader is not None and leader.agent == self._name  # by a request whose answer was lost
        if won or (leader is None and self._may_lead(standing)):
            self._etcd_thread.run(EtcdTask(call=self._campaign, done=self._campaigned, waits=_SEARCH))
        elif leader is None or leader.address is None:
            self._vain = None
            self._unreached(LinkError("no agent coordinates the job"))
        else:
            self.before, self._known_since = leader.agent, time.monotonic()
            if self._vain is None or self._vain[0] != leader or not standing.settled:
                self._vain = leader, time.monotonic()
            (ip, port), secret = leader.address, secret_of(bytes.fromhex(self.sharing.secret), leader.agent)
            self.agents[leader.agent] = ip, port
            lost = self._silent == leader.agent and time.monotonic() - self.alone_since < _NAMED_S
            limit_s = _BRIEF_S if lost else DIAL_S
            dial(self._loop, secret, (ip, port), self._connected, self._unreached, tls=self._tls, limit_s=limit_s)

    def _campaign(self) -> tuple[bool, str | None]:
        return self._session.campaign(self._probes.address), self._session.newest_mark()

    def _campaigned(self, result: tuple[bool, str | None]) -> None:
        won, mark = result
        if won:
            self._elected(self, mark)
        else:
            self.begin()

    def close(self, outcome: Message | None) -> None:
        """Leaves the job."""
        self._loop.clear_timer("coordinator")
        self._loop.clear_timer("look")
        self._loop.clear_timer("measure again")
        if self._link is not None:
            self._link.close()

    def close_files(self) -> None:
        """Has no files."""

    def drain(self) -> None:
        """Asks the coordinator to go on without this host."""
        self._draining = True
        if self._link is not None and not self._awaited and self._crew is not None:
            self._link.send({"type": "drain"})
        elif self._crew is None or not any(not worker.ended for worker in self._crew.workers.values()):
            self._end({"type": "drained"})  # it has no part in the job yet

    @property
    def unsent(self) -> list[Message]:
        """What workers of this host have told since the coordinator was lost."""
        return self._unsent

    def forks_ready(self) -> None:
        """Notes that workers of this host can be started."""
        self.forks = True
        self._offer()

    def heard(self, worker: WorkerProcess, message: Message) -> None:
        """Passes a worker's message on."""
        if message["type"] == "result":
            worker.result = message
        elif message["type"] == "announce":
            worker.announced = message["ready"]  # kept for another coordinator, until it is a member
        self._send({"type": "heard", "worker": worker.number, "pid": worker.pid, "message": message, "now": time.monotonic()})

    def ended(self, worker: WorkerProcess) -> None:
        """Passes the end of a worker on, with what its segment holds."""
        if self.carrier is None:
            return
        doing, offers = self.carrier.last(worker), self.carrier.offers([worker.number])
        report = Ended(
            worker=worker.number,
            status=worker.status,
            unreaped=worker.unreaped,
            condemned=worker.condemned,
            failure=worker.failure,
            doing=None if doing is None else asdict(doing),
            offer=offers[0].to_json() if offers else None,
        )
        self._send({"type": "ended", "report": asdict(report), "now": time.monotonic()})

    # The coordinator

    def _unreached(self, error: LinkError) -> None:
        if self._unfit(error):
            wrong = isinstance(error, WrongSecret)
            why = "the agent that coordinates it has another secret: give the same secret on every host" if wrong else str(error)
            self._end(failed(SettingsError, f"this host cannot take part in the job {self._start.settings.name}: {why}"))
            return
        if self._vain is not None and self._crew is None and time.monotonic() - self._vain[1] > _OUT_OF_REACH_S:
            self._end(failed(HostUnfit, self._out_of_reach(self._vain[0], error)))
            return
        alone = time.monotonic() - self.alone_since
        if alone > _TOLD_S and not self._told:
            self._told = True
            say(f"the agent that coordinates the job has not been reached for {alone:.0f} s: {error}; this host tries again and again")
        self._loop.set_timer(_AGAIN_S, self.begin, "coordinator")

    def _unfit(self, error: LinkError) -> bool:
        """Whether this host cannot take part: it never has, and the same agent, which etcd names, has turned it away for a while. Somebody
        else may have the address of an agent that is lost, until etcd knows."""
        if not isinstance(error, Unfit | TlsRefused):
            self._turned_away = None
            return False
        if self._turned_away is None or self._turned_away[0] != self.before:
            self._turned_away = self.before, time.monotonic()
        return self._crew is None and time.monotonic() - self._turned_away[1] >= _TURNED_AWAY_S

    def _out_of_reach(self, leader: Leader, error: LinkError) -> str:
        where = "" if leader.address is None else f" at {leader.address[0]}:{leader.address[1]}"
        return (
            f"this host cannot take part in the job {self._start.settings.name}: host {self._name} ({self._probes.address[0]}) has not "
            f"reached host {leader.agent}, which coordinates the job,{where} for {_OUT_OF_REACH_S:g} s: {error}. Let every host reach "
            "every port of the others, in both directions, or choose another network with --interface"
        )

    def _may_lead(self, standing: Standing) -> bool:
        """Whether this agent can coordinate the job; if it never will, it ends."""
        took_part, searched_s = self._start.incarnation is not None, time.monotonic() - self._known_since
        found = succession(standing, knows=self.job is not None, took_part=took_part, searched_s=searched_s)
        if found is Succession.REJOIN:
            self._end({"type": "rejoin", "why": "the agent that was founding the job is lost"})
        elif found is Succession.ENDED:
            self._end(standing.outcome or failed(JobFailed, ended_meanwhile(self._start.settings.name)))
        elif found is Succession.LOST:
            why = f"no host that had a part in the job has been reached for {NOBODY_S:g} s: its state is lost. Start the job again"
            self._end(failed(HostLost, why))
        return found is Succession.LEAD

    def _connected(self, stream: Stream) -> None:
        self._vain = None
        self._link = AgentLink(self._loop, stream, heard=self._hear, lost=self._lost)
        self._link.send(hello(self._start, self._name, self._probes.address, knows=self.job is not None))

    def _lost(self, why: str) -> None:
        self._loop.clear_timer("measure again")
        self.alone_since = time.monotonic() if self._link is None else self._link.heard_at
        self._silent = self.before if self._link is not None and self._link.silent else None
        self._link, self._awaited, self._told, self.lost_because = None, False, False, why
        if self.left != self.before:
            say(f"host {self.before}, whose agent coordinates the job, is lost: {why}")
        self.begin()

    def _send(self, message: Message) -> None:
        if self._link is None or self._awaited:
            self._unsent.append(message)
        else:
            self._link.send(message)

    def _hear(self, message: Message) -> None:
        kind, carrier = message["type"], self.carrier
        if kind == "welcome":
            self._welcomed(JobSettings.from_json(message["settings"]), message["least"], message["others"], keeps=message["keeps"])
        elif kind == "refused":
            kind = HostUnfit if message["kind"] == HostUnfit.__name__ else HostRefused
            self._end(failed(kind, f"this host cannot take part in the job {self._start.settings.name}: {message['reason']}"))
        elif kind == "again":
            self._loop.set_timer(TRY_AGAIN_S, self._measure_again, "measure again")
        elif kind == "leaves":
            self.left = self.before
        elif kind in ("outcome", "drained"):
            self._end(message["outcome"] if kind == "outcome" else {"type": "drained"})
        elif kind == "agent":
            ip, port = message["address"]
            self.agents[message["name"]] = ip, port
        elif kind == "job":
            self.job = JobFacts.from_json(message["facts"])
        elif kind == "scaled":
            self.job = None if self.job is None else replace(self.job, limit=message["workers"])
        elif kind == "started":
            self.job = None if self.job is None else self.job.started(message["worker"])
        elif carrier is None:
            return
        elif kind == "fork":
            carrier.fork(message["worker"], **message["role"])
        elif kind == "tell":
            self._note(message["message"], message["workers"])
            carrier.tell(message["workers"], message["message"], message["segments"])
        elif kind == "tell_all":
            self._note(message["message"], ())
            carrier.tell_all(message["message"])
        elif kind == "end":
            carrier.end(message["worker"], message["why"])
        elif kind == "release":
            carrier.release(message["workers"])
        elif kind == "freeze":
            carrier.freeze(message["modules"])
        elif kind == "record":
            carrier.write(message["members"])
        elif kind == "incidents":
            self.trains = True
            carrier.replace_log(message["incidents"])
        elif kind == "incident":
            carrier.log(Incident.from_json(message["incident"]))

    def _note(self, order: Message, workers: Iterable[int]) -> None:
        """Notes what an order to these workers of this host says about the job; a view goes to its members."""
        if order["type"] == "view" and self.carrier is not None:
            for worker in workers:
                self.carrier.workers[worker].announced = None
        self.job = None if self.job is None else self.job.knowing(order)
        self.trains = self.trains or order["type"] == "view"
        if order["type"] in ("view", "boundary", "quiesce", "propose"):
            self.steady = order["type"] == "view"

    def _welcomed(self, founder: JobSettings, least: int, others: dict[str, list[Any]], *, keeps: bool) -> None:
        """Takes the founder's settings; those of the place are this host's own. With `keeps`, the coordinator goes on with its workers;
        else this host is checked first, with its links to the agents of the hosts `others`."""
        own = self._start.settings
        self.settings = replace(
            founder,
            etcd=own.etcd,
            etcd_files=own.etcd_files,
            directory=own.directory,
            train_fn=own.train_fn,
            workers=own.workers,
            spares=own.spares,
        )
        self.sharing = replace(self.sharing, least=least)
        addresses = {name: (ip, port) for name, (ip, port) in others.items()}
        self.agents |= addresses
        self._told, self._awaited, self._keeps = False, True, keeps
        if self._crew is None:
            self._crew = self._make_crew(self.settings)
            directory = RunDirectory(Path(self._start.directory))
            facts = HostFacts.here(self.sharing.rack)
            self.carrier = LocalCarrier(self._crew, directory, self._name, room=own.workers, spares=own.spares, facts=facts)
            self._crew.listen()
        elif not keeps:
            for worker in self._crew.workers.values():
                worker.kill("the job goes on without it, since its host was lost for a while")
        self._check = None
        if not keeps:
            self._check = NodeCheck(self._probes, Path(self._start.directory), addresses, self._offer)
            if self._computed is not None:
                self._check.measured(self._computed)
        self._offer()

    def _measure_again(self) -> None:
        """Checks this host once more, if the coordinator that has asked for it is still there."""
        if self._link is None or self._check is None or self._crew is None:
            return
        self._awaited, self._computed = True, None
        self._check = self._check.again()
        self._crew.measure(self.settings.threads, self.measured)

    def measured(self, computed: dict[str, Any]) -> None:
        """Takes how this host computes."""
        self._computed = computed
        if self._check is not None:
            self._check.measured(computed)

    def _offer(self) -> None:
        """Offers this host's room, once it is checked, and no worker is left that the coordinator does not go on with."""
        carrier, link = self.carrier, self._link
        report = None if self._check is None else self._check.report
        if not (self.forks and self._awaited) or carrier is None or link is None or (report is None and not self._keeps):
            return
        living = [worker for worker in carrier.workers.values() if not worker.ended]
        if living and not self._keeps:
            self._loop.set_timer(_AGAIN_S, self._offer, "offer")
            return
        names = [field.name for field in fields(WorkerProcess)]
        held = [{name: getattr(worker, name) for name in names} for worker in carrier.workers.values()] if self._keeps else []
        job = self.job.to_json() if self.job is not None and self._keeps else None
        has = {"room": carrier.room, "spares": carrier.spares, "facts": asdict(carrier.facts)}
        dead = [number for number, worker in carrier.workers.items() if worker.ended and not worker.finished]
        has["left"] = [offer.to_json() for offer in carrier.offers(dead)]
        has["check"] = None if report is None else report.to_json()
        link.send({"type": "ready", **has, "workers": held, "job": job, "steady": self.steady})
        self._awaited = False
        if self._draining:
            self.drain()
        unsent, self._unsent = self._unsent, []
        for message in unsent if self._keeps else ():
            link.send(message)
        self._loop.set_timer(LOOK_S, self._keep_looking, "look")

    def _keep_looking(self) -> None:
        """Tells the coordinator what the workers are doing, and which processes they have."""
        if self._link is None or self._awaited or self.carrier is None:
            return
        living = [number for number, worker in self.carrier.workers.items() if not worker.ended]
        self._link.send({"type": "seen", "workers": observations(self.carrier.look(living)), "now": time.monotonic()})
        self._loop.set_timer(LOOK_S, self._keep_looking, "look")

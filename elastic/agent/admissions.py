"""Admits agents of other hosts to the job that this agent coordinates, and connects their reports to the coordinator.

agent -> coordinator   hello {name, address, version, isa, target, script, given}
                       | ready {room, spares, facts, workers, left, job, steady, check}, then what `remote_carrier` lists;
                       or what `link_probes` lists
coordinator -> agent   welcome {settings, least, keeps, others} | refused {reason, kind} | again: measure, and be `ready` again;
                       then what `remote_carrier` lists
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from elastic.agent.absent import AbsentAgents
from elastic.agent.agent_link import Address, AgentLink, AgentListener
from elastic.agent.coordinator import Coordinator
from elastic.agent.fitness import TRIES, Demand, HostReport, Unfit, unfit, warnings
from elastic.agent.job_facts import JobFacts
from elastic.agent.link_probes import LinkProbes
from elastic.agent.loop import Loop
from elastic.agent.remote_carrier import RemoteCarrier, aged
from elastic.agent.start import Sharing, Start
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.errors import HostRefused
from elastic.host.channel import Message
from elastic.host.facts import HostFacts
from elastic.membership.founding import another_file
from elastic.observe.console import say
from elastic.script.sources import file_digest
from elastic.script.target import MAIN_MODULE
from elastic.settings import VERSION, JobSettings, best_isa, isa_includes

ENDS = ("done", "failed")
"""The outcomes that end a shared job. Otherwise only this agent leaves, and another one coordinates."""


class Admissions:
    """Admits agents that `listener` accepts, from the beginning to the end of the job, which is founded when enough hosts are there.

    With `taking_over`, another agent has coordinated the job, and hosts keep the workers that it has started until `resumes` is called.
    """

    def __init__(
        self,
        loop: Loop,
        start: Start,
        sharing: Sharing,
        coordinator: Coordinator,
        listener: AgentListener,
        probes: LinkProbes,
        *,
        tls: Tls | None = None,
        taking_over: bool = False,
    ) -> None:
        self._probes = probes
        self._agents: dict[AgentLink, tuple[str, Address]] = {}  # of the hosts that are welcome, and where they can be dialled
        self._early: list[tuple[AgentLink, Message]] = []  # greetings of hosts that know nothing of the job, before it goes on
        self._unchecked: list[tuple[AgentLink, str, Message]] = []  # what hosts offer before it is known how this host computes
        self._computed: dict[str, Any] | None = None
        self._tries: dict[AgentLink, int] = {}  # how often a host has been measured
        self._loop, self._start, self._sharing, self._coordinator = loop, start, sharing, coordinator
        self._links: set[AgentLink] = set()
        self._names: dict[AgentLink, str] = {}  # of the hosts that are there
        self._local_ready = False
        self._told_room: int | None = None
        self._taking_over = taking_over
        self._held: list[tuple[RemoteCarrier, Message]] = []  # what hosts have told before the job goes on
        self.facts: JobFacts | None = None  # what hosts know that keep workers of another coordinator
        self.steady = True  # whether no worker of such hosts waits for orders of the coordinator
        self.arrived: Callable[[], None] = lambda: None  # called for each such host
        self._absent = AbsentAgents(loop, bytes.fromhex(sharing.secret), tls, coordinator.hosts.present, coordinator.agent_gone)
        self._address = listener.address
        listener.connected = self._connected
        coordinator.unfounded = self._unfounded
        if not taking_over:
            self._tell_missing()

    def local_ready(self) -> None:
        """Notes that workers of this host can be started."""
        self._local_ready = True
        self._check()

    def resumes(self) -> None:
        """Notes that the job goes on: hosts that come from now on begin with new workers."""
        self._taking_over = False
        held, self._held = self._held, []
        for host, message in held:
            self._report(host, message)
        early, self._early = self._early, []
        for link, message in early:
            if not link.closed:
                self._hello(link, message)

    def close(self, outcome: Message) -> None:
        """Tells the other agents how the job has ended, unless it goes on without this agent."""
        self._absent.close()
        for link in list(self._links):
            if outcome["type"] in ENDS:
                link.send({"type": "outcome", "outcome": outcome})
            elif outcome["type"] == "drained":
                link.send({"type": "leaves"})
            link.close()

    def _unfounded(self) -> None:
        self._tell_missing()
        self._check()

    def _tell_missing(self) -> None:
        missing, (ip, port) = self._sharing.least - len(self._coordinator.hosts.present), self._address
        if missing > 0:
            say(f"waiting for {missing} more host{'s' * (missing > 1)} at {ip}:{port}")

    def _check(self) -> None:
        hosts = self._coordinator.hosts
        enough = len(hosts.present) >= self._sharing.least and hosts.room >= self._start.settings.min_workers
        if not self._local_ready or self._coordinator.founded or self._taking_over:
            return
        if enough:
            self._coordinator.found()
        elif len(hosts.present) >= self._sharing.least and hosts.room != self._told_room:
            self._told_room, least = hosts.room, self._start.settings.min_workers
            more = f"{least - hosts.room} more worker{'s' * (least - hosts.room > 1)}"
            say(f"waiting for hosts with room for {more}, since the job needs {least} (min_workers)")

    def _connected(self, stream: Stream) -> None:
        link = AgentLink(self._loop, stream, heard=lambda message: self._hello(link, message), lost=lambda _: self._forget(link))
        self._links.add(link)

    def _hello(self, link: AgentLink, message: Message) -> None:
        """Answers a request of a user, or compares what an agent brings with the job; `link` then goes on to its next message."""
        self._probes.answer(link, message)
        if message["type"] == "ask" and message.get("what") == "check":
            link.send(self._check_of(message["workers"]))
        elif message["type"] == "ask" and message.get("what") == "agents":
            link.send({"type": "answer", "told": {"agents": self.agents}})
        elif message["type"] == "ask":
            link.send(self._coordinator.answer(message))
        if message["type"] != "hello":
            return
        settings = self._start.settings
        reason = refusal(settings, message, self._script)
        if reason is None and self._taking_over and not message["knows"]:
            self._early.append((link, message))  # it brings nothing, and there are no facts of the job yet that it could be told
        elif reason is None:
            link.heard = lambda following: self._ready(link, message["name"], following)
            others = {name: address for name, address in self.agents.items() if name != message["name"]}
            self._agents[link] = message["name"], message["address"]
            least, keeps = self._sharing.least, self._taking_over
            link.send({"type": "welcome", "settings": settings.for_others(), "least": least, "keeps": keeps, "others": others})
        else:
            self._refuse(link, message["name"], Unfit(reason=reason, kind=HostRefused))

    @property
    def _script(self) -> str | None:
        """The digest of the script that the job began with; before its first view, of this host's file."""
        train_fn, facts = self._start.settings.train_fn, self._coordinator.facts or self.facts
        if facts is None:
            return script_digest(train_fn)
        _, digest, _ = facts.founder["code"].get(MAIN_MODULE, (None, None, None))
        return digest

    def _check_of(self, workers: int) -> Message:
        """Returns what `elastic doctor` compares a host with that is to have so many workers."""
        settings = self._start.settings
        told = {"demand": self._demand(workers).to_json(), "threads": settings.threads, "isa": settings.isa, "agents": self.agents}
        return {"type": "answer", "told": told | {"tls": self._sharing.tls}}

    def _demand(self, room: int) -> Demand:
        computed = {name: value for name, value in (self._computed or {}).items() if name != "broken"}
        return Demand(**computed, worker_bytes=self._coordinator.least_bytes(room))

    @property
    def agents(self) -> dict[str, Address]:
        """Where agents can be dialled: of this host, and of all that are here or being checked."""
        return {self._coordinator.hosts.local.name: self._probes.address, **dict(self._agents.values())}

    def _refuse(self, link: AgentLink, name: str, why: Unfit) -> None:
        say(f"host {name} is refused: {why.reason}")
        link.send({"type": "refused", "reason": why.reason, "kind": why.kind.__name__})
        self._agents.pop(link, None)

    def _forget(self, link: AgentLink) -> None:
        self._links.discard(link)
        self._agents.pop(link, None)
        self._tries.pop(link, None)

    def measured(self, computed: dict[str, Any]) -> None:
        """Takes how this host computes, with which others are compared."""
        self._computed = computed
        waiting, self._unchecked = self._unchecked, []
        for link, name, message in waiting:
            if not link.closed:
                self._ready(link, name, message)

    def _fits(self, link: AgentLink, name: str, message: Message) -> bool:
        """Whether a host fits the job by what was measured on it; else it is refused."""
        if message["check"] is None:
            return True
        report, room = HostReport.from_json(message["check"]), message["room"]
        found = unfit(report, self._demand(room), name, room, self.agents)
        if found is None:
            why = self._coordinator.no_room_for(name, HostFacts(**message["facts"]), room)
            found = None if why is None else Unfit(reason=why)
        if found is not None and found.passing and (tries := self._tries.get(link, 1)) < TRIES:
            self._tries[link] = tries + 1
            say(f"host {name} is measured again: {found.reason}")
            link.send({"type": "again"})
            return False
        self._tries.pop(link, None)
        if found is not None:
            self._refuse(link, name, found)
            return False
        for sentence in warnings(report):
            say(f"host {name}: {sentence}")
        return True

    def _ready(self, link: AgentLink, name: str, message: Message) -> None:
        if message["type"] != "ready":
            return
        if message["check"] is not None and self._computed is None:
            self._unchecked.append((link, name, message))
            return
        if not self._fits(link, name, message):
            return
        for old in [each for each in self._links if each is not link and self._names.get(each) == name]:
            old.close()  # this host has noticed first that it is broken
            old.lost("it has connected again")
        self._names[link] = name
        host = RemoteCarrier(link, name, message["room"], message["spares"], HostFacts(**message["facts"]))
        host.note_held(message["workers"])
        host.note_left(message["left"])
        link.heard = lambda following: self._report(host, following)
        link.lost = lambda why: self._lost(link, host, why)
        if not self._coordinator.founded:
            say(f"host {name} is there with room for {host.room} worker{'s' * (host.room != 1)}")
        self._coordinator.host_joins(host)
        self._coordinator.hosts.tell_agents({"type": "agent", "name": name, "address": self._agents[link][1]})
        self.steady = self.steady and message["steady"]
        if message["job"] is not None:
            known = JobFacts.from_json(message["job"])
            self.facts = known if self.facts is None else self.facts.joined(known)
        self.arrived()
        self._check()

    def _lost(self, link: AgentLink, host: RemoteCarrier, why: str) -> None:
        _, address = self._agents.get(link, (host.name, None))
        self._forget(link)
        self._names.pop(link, None)
        lost = host.lose(f"{host.name}: {why}", may_return=address is not None)
        if address is not None and lost:
            ip, port = address
            self._absent.ask(host, (ip, port))
        self._coordinator.host_lost(host, lost, link.heard_at)

    def _report(self, host: RemoteCarrier, message: Message) -> None:
        kind = message["type"]
        if self._taking_over:
            self._held.append((host, message))
        elif kind == "heard":
            body = aged(message["message"], time.monotonic() - message["now"])
            worker = host.workers[message["worker"]]
            worker.pid = message["pid"]
            self._coordinator.heard(worker, body)
        elif kind == "seen":
            host.note_seen(message)
        elif kind == "ended":
            self._coordinator.ended(host.note_end(message))
        elif kind == "drain":
            self._coordinator.drain(host.name)


def refusal(settings: JobSettings, hello: Mapping[str, Any], script: str | None = None) -> str | None:
    """Returns why an agent cannot take part in the job of these settings, and what to do; None if it can.

    `script` is the digest of the job's script, None if its train function is in a module, whose file is compared later.
    """
    if hello["version"] != VERSION:
        return f"it runs version {hello['version']} of this package, and the job version {VERSION}: install the same"
    if not isa_includes(hello["isa"], settings.isa):
        have, need = hello["isa"], settings.isa
        return f"its processor has the instruction set {have}, and the job runs with {need}: found the job with isa={have!r}"
    ours = json.loads(json.dumps(settings.to_json()))
    if hello["target"] != name_in(settings.train_fn):
        return f"it was started for {hello['target']}, and the job runs {name_in(settings.train_fn)}"
    if script is not None and hello["script"] not in (script, None):
        file = hello["target"].partition(":")[0]
        return another_file(file)
    for name, value in hello["given"].items():
        if ours[name] != value:
            return f"it was started with {name}={value!r}, and the job has {name}={ours[name]!r}: give the same, or leave it out"
    return None


def name_in(train_fn: str) -> str:
    """Returns the part of a train function's name that is equal on all hosts: the path of its file is not."""
    place, _, qualified = train_fn.rpartition(":")
    return f"{place.rpartition('/')[2]}:{qualified}"


def script_digest(train_fn: str) -> str | None:
    """Returns the digest of the script that holds a train function, None if a module does, or the file cannot be read."""
    place = train_fn.rpartition(":")[0]
    return file_digest(place) if place.endswith(".py") or "/" in place else None


def hello(start: Start, name: str, address: Address, *, knows: bool) -> Message:
    """Returns an agent's first message to the coordinator; others can dial it at `address`. `knows`: it knows the job from before."""
    sharing = start.sharing
    return {
        "type": "hello",
        "name": name,
        "address": address,
        "knows": knows,
        "version": VERSION,
        "isa": best_isa(),
        "target": name_in(start.settings.train_fn),
        "script": script_digest(start.settings.train_fn),
        "given": {} if sharing is None else sharing.given,
    }

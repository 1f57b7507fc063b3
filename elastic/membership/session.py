"""One agent's connection to the membership: its etcd, its leases, the claim on the job's name, and the view."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.comm.message import AttemptId
from elastic.errors import Conflict, Deposed, ElasticError, EtcdRefused, EtcdUnavailable
from elastic.membership import keeper, outcomes, versions
from elastic.membership.attempts import Attempts
from elastic.membership.claim import Claim
from elastic.membership.election import Election, Leader
from elastic.membership.endpoint import EtcdEndpoint
from elastic.membership.etcd import EtcdClient
from elastic.membership.founding import Ready
from elastic.membership.keeper import Keeper, LoopLike
from elastic.membership.leases import Lease, patient
from elastic.membership.server import START_S, PrivateEtcd
from elastic.membership.views import ViewStore, digest
from elastic.settings import JobSettings
from elastic.view import View

_AGENT_TTL_S = 2  # an agent's death is visible to others after this time
_LOOKS_S = 0.7  # how often the lease is renewed, which also detects an etcd that lost its data
_JOB_TTL_S = 3600  # the keys of a killed agent expire after this time
_CLOSING_S = 1.0  # the timeout of a call when the job is over
_SETTLING_S = 3.0  # after this time every agent that lives has written its keys again, if they have expired in an outage
_TRIES = 3  # to start a private etcd and claim the name there
_STARTED_S = 10.0  # how long each try but the last may take to start


@dataclass(frozen=True, slots=True, kw_only=True)
class Notices:
    """A session's callbacks, called from any thread: a committed view, the error that ends the job, a sentence for the user, and why this
    agent no longer coordinates the job."""

    view: Callable[[View], None]
    lost: Callable[[ElasticError], None]
    say: Callable[[str], None]
    deposed: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What etcd knows of a job: the agent that coordinates it, if any; else whether the job is `named`, its committed view's `mark`, and
    its `outcome`, if it has ended.

    Not `settled`: keys of living agents may have expired in an outage, or be lost with etcd's data, and not be written again yet.
    `forgotten`: etcd has lost data of the job since it had the name last.
    """

    leader: Leader | None
    named: bool = True
    mark: str | None = None
    settled: bool = True
    outcome: dict[str, Any] | None = None
    forgotten: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What etcd knows, for an agent that takes the job over: the committed view's `mark`, the `newest` mark that this agent has ever seen
    there, and the `agents` that are alive, None while keys of living ones may be missing."""

    mark: str | None
    newest: str | None
    agents: set[str] | None


class Session:
    """Connects and claims the job's name. Every call may take as long as etcd does: only the construction of a private one, `tend` and
    `unanswered` belong into the agent's loop.

    `attempts` is this agent's part in finding the next view. Without `settings.etcd` it runs a private etcd under `directory`.
    With `shared`, agents of other hosts may join the job; if a job has the name, this agent joins that one, and does not coordinate. With
    `incarnation` it joins only that one. `own` is that of the job which it founds otherwise: it must be the same whenever an agent tries
    again, since etcd may have done what it has not answered.
    Raises EtcdUnavailable, or NameTaken.
    """

    def __init__(
        self,
        settings: JobSettings,
        directory: Path,
        notices: Notices,
        *,
        agent: str | None = None,
        shared: bool = False,
        incarnation: str | None = None,
        own: str | None = None,
    ) -> None:
        self._shared, self._joins, self._own, self._name = shared, incarnation, own or secrets.token_hex(8), settings.name
        self.coordinates = True
        self._stands = False  # whether it has been elected
        self._notices = notices
        self._server = PrivateEtcd(directory) if settings.etcd is None else None
        self._keeper: Keeper | None = None
        self._loop: LoopLike | None = None
        self._client: EtcdClient | None = None
        self._leases: list[Lease] = []
        try:
            client, claim = self._connect(settings)
            agent = agent or secrets.token_hex(8)
            self._views = ViewStore(client, claim.prefix, lambda: self._job_lease.id)
            self.election = election = Election(client, f"{claim.prefix}coordinator", agent, lambda: self._lease.id)
            self.attempts = Attempts(
                client,
                claim,
                agent,
                election,
                self._views,
                lease=lambda: self._job_lease.id,
                reclaim=self._reclaim,
            )
            if shared:
                self._lease.put(f"{claim.prefix}agents/{agent}", "{}")
            for lease in self._leases:
                lease.start()
            self._views.watch(notices.view, self._strange, lambda error: notices.say(str(error)))
        except BaseException:
            self.close(goes_on=shared)
            raise

    def _connect(self, settings: JobSettings) -> tuple[EtcdClient, Claim]:
        """Claims the name. A private etcd that ends or does not answer is restarted, up to `_TRIES` tries in all."""
        for left in reversed(range(_TRIES)):
            try:
                return self._claimed(settings, _STARTED_S if left else START_S)
            except EtcdUnavailable:
                server = self._server
                if server is None or not left or not (server.running or server.serving):
                    raise
                if self._client is not None:
                    self._client.close()
                self._client, self._leases = None, []
                server.start(empty=True)
        raise AssertionError  # the last try returns or raises

    def _claimed(self, settings: JobSettings, started_s: float) -> tuple[EtcdClient, Claim]:
        notices, server = self._notices, self._server
        endpoint = EtcdEndpoint.parse(settings.etcd or "", settings.etcd_files) if server is None else server.endpoint(started_s)
        self._client = client = EtcdClient(endpoint) if server is None else EtcdClient(endpoint, timeout_s=keeper.SILENT_S)
        # Nothing depends on the expiry of a lease at a private etcd, and a short one would expire on an overloaded machine.
        ttl_s = _AGENT_TTL_S if server is None else _JOB_TTL_S
        lease = Lease(
            client,
            ttl_s,
            every_s=_LOOKS_S,
            slowest=lambda: client.slowest_s if server is None else 0.0,
            others=lambda: self._claim.leases if self._shared else (),
            renewed=self._renewed,
            kept=self._keep_name,
            lost=self._lost,
            away=self._away,
            say=notices.say,
        )
        self._lease, self._job_lease = lease, Lease(client, _JOB_TTL_S, lost=self._lost)
        self._leases = [self._lease, self._job_lease]
        if server is None:
            self._warn(client, endpoint)
        claim = self._claim = Claim(client, settings.name, self._joins or self._own, digest(settings.record()), shared=self._shared)
        if self._joins is not None:
            self.coordinates = False
            claim.join()
        elif self._shared:  # the name outlives this agent, if others live
            self.coordinates = claim.take_or_join(client.grant(patient(ttl_s, client.slowest_s)))
        else:
            claim.take(self._lease.id)
        return client, claim

    def _warn(self, client: EtcdClient, endpoint: EtcdEndpoint) -> None:
        """Warns of an etcd that others may write to, once."""
        with suppress(EtcdUnavailable):
            for sentence in (versions.warning(endpoint, client.version), versions.unprotected(endpoint)):
                if sentence is not None:
                    self._notices.say(sentence)

    def tend(self, loop: LoopLike) -> None:
        """Keeps a private etcd running from `loop`, which must be this thread's."""
        if self._server is not None:
            self._loop = loop
            self._keeper = Keeper(self._server, loop, self._notices.say)

    def unanswered(self, error: EtcdUnavailable, seconds: float) -> None:
        """Reports that etcd has not answered for `seconds`; call it in the loop."""
        if self._keeper is not None:
            self._keeper.unanswered(error, seconds)

    def standing(self) -> Standing:
        """Returns how the job stands, for an agent that looks for its coordinator. Raises NameLost, EtcdUnavailable."""
        settled, leader = self._settled(), self.election.leader()
        if leader is not None:
            return Standing(leader=leader, settled=settled)
        named, mark, outcome = self.named, self.mark(), self.outcome()
        settled, forgotten = settled and not self._set_back(), self._job_lease.vanished
        return Standing(leader=None, named=named, mark=mark, settled=settled, outcome=outcome, forgotten=forgotten)

    def survey(self) -> Survey:
        """Returns what this agent needs to take the job over. Raises EtcdUnavailable."""
        settled, mark = self._settled(), self.mark()
        agents = self.agents() if settled and not self._set_back() else None
        return Survey(mark=mark, newest=self._views.newest, agents=agents)

    def _settled(self) -> bool:
        """Whether keys that are missing at etcd are those of agents that are gone: each has had the time to write its own again."""
        return self._lease.keeps(_SETTLING_S)

    def _set_back(self) -> bool:
        """Whether etcd has just come back with older data."""
        return self._client is not None and self._client.revisions.went_back(_SETTLING_S)

    def campaign(self, address: Sequence[Any]) -> bool:
        """Makes this agent the coordinator, reachable for others at `address`, unless another one is. Returns whether it is.

        If etcd has lost the job's name, with other data, the name is taken again. Raises NameLost, EtcdUnavailable.
        """
        self.election.address = address
        if self._job_lease.vanished:
            self._reclaim()
        try:
            self.election.hold()
        except Conflict:
            return False
        self.coordinates = self._stands = True
        return True

    @property
    def incarnation(self) -> str:
        """The job's: another job of this name has another one."""
        return self._claim.incarnation

    def agents(self) -> set[str]:
        """Returns the names of the job's agents that are alive as far as etcd knows. Raises EtcdUnavailable."""
        prefix, client = f"{self._claim.prefix}agents/", self._client
        return set() if client is None else {entry.key.removeprefix(prefix) for entry in client.get_prefix(prefix)}

    @property
    def named(self) -> bool:
        """Whether the job still has its name, which is given up, with its view, when the job ends. A name that has only expired, since all
        agents stood still, is taken again. Raises NameLost if another job has taken it, EtcdUnavailable."""
        if not self._claim.keep():
            if self.mark() is None:
                return False
            self._reclaim()
        return True

    def mark(self) -> str | None:
        """Returns the mark of the committed view (`membership.views.mark`), None if there is no view yet. Raises EtcdUnavailable."""
        return self._views.current()

    def newest_mark(self) -> str | None:
        """Returns the newest mark that this agent has ever seen at etcd, None if there was none yet. Raises EtcdUnavailable."""
        self.mark()
        return self._views.newest

    def take_over(self, view: View, heard: AttemptId = (0, 0)) -> AttemptId:
        """Adopts the committed view, which another agent has proposed, and writes its mark again if etcd has lost it. Returns the last
        attempt: `heard` is the last one that any host has heard of, which etcd may have lost too.

        Raises Conflict if another agent coordinates, or etcd has a newer view; NameLost, EtcdUnavailable.
        """
        self._views.committed(self._views.propose(view))
        self.attempts.restore()
        return max((view.epoch, view.attempt), heard, self.attempts.burned() or (0, 0))

    def admit(self, workers: Mapping[int, Ready]) -> None:
        """Lists ready workers in etcd, for as long as this agent lives."""
        self._lease.put_all({self._listed(worker): _entry(ready) for worker, ready in workers.items()})

    def dismiss(self, workers: Iterable[int]) -> None:
        """Removes dead workers from the list."""
        self._lease.drop(*map(self._listed, workers))

    def _listed(self, worker: int) -> str:
        return f"{self._claim.prefix}workers/{worker}"

    def publish(self, view: View) -> None:
        """Commits the first view, as the coordinator. Raises Conflict, and EtcdUnavailable, after which it may be called again."""
        self.attempts.begin((view.epoch, view.attempt))
        self.attempts.publish_first(view)

    def outcome(self) -> dict[str, Any] | None:
        """Returns how this job has ended, as the coordinator has left it; None if it has not. Raises EtcdUnavailable."""
        return None if self._client is None else outcomes.left(self._client, self._name, self.incarnation)

    def close(self, *, goes_on: bool = False, outcome: dict[str, Any] | None = None) -> None:
        """Closes the connection. The coordinator deletes all keys of the job, unless it `goes_on` without this agent.

        The `outcome` of a job of several hosts is left for those that do not hear of it now.
        """
        if self._keeper is not None:
            self._keeper.close()
        if self._server is not None:
            self._server.stop()
        if self._client is not None:
            self._client.timeout_s = _CLOSING_S
            self._leave(self._client, goes_on=goes_on, outcome=outcome)
            self._client.close()

    def _leave(self, client: EtcdClient, *, goes_on: bool, outcome: dict[str, Any] | None) -> None:
        for lease in self._leases:
            lease.stop(revoke=False)
        if self._server is not None or not self._leases:
            return
        with suppress(EtcdUnavailable):  # the remaining keys then expire with their leases
            ends = self.coordinates and not goes_on and (not self._shared or self.election.held())
            if ends and self._shared and outcome is not None:
                with suppress(ElasticError):  # it is full, for one: then those who were cut off hear only that the job has ended
                    outcomes.leave(client, self._name, self.incarnation, outcome)
            if ends:
                self._claim.give_up()
                client.delete_prefix(self._claim.prefix)
            client.revoke(self._lease.id)
            if ends or not self.coordinates:  # else the view may have this lease, and other agents go on from it
                client.revoke(self._job_lease.id)

    def _renewed(self, lease: int) -> None:
        """Restores the job's keys after the agent's lease expired, when another job may have taken the name, or etcd lost its data."""
        self._job_lease.keep()
        if self.coordinates:
            self._reclaim()
            if self._stands:
                self._stand()
            self.attempts.restore()

    def _stand(self) -> None:
        """Keeps this agent the coordinator under its new lease, unless another one has been elected."""
        try:
            self.election.hold()
        except Deposed as error:
            self._notices.deposed(str(error))
            raise

    def _keep_name(self) -> None:
        """Keeps a shared job's name. Only the coordinator writes it again: when the job has ended, nobody must."""
        if not self._shared:
            return
        if self._claim.keep():
            self._job_lease.vanished = False
        elif self.coordinates:
            self._reclaim()

    def _reclaim(self) -> None:
        """Makes sure that this incarnation has the job's name."""
        client = self._client
        if not self._shared:
            self._claim.retake(self._lease.id, trains=self._views.known)
        elif client is not None and not self._claim.keep():
            trains = self._views.known or self.mark() is not None
            self._claim.retake(client.grant(patient(_AGENT_TTL_S, client.slowest_s)), trains=trains)

    def _strange(self, sentence: str) -> None:
        if not self._shared:  # else it is another agent that has become the coordinator, of which the next task hears
            self._notices.say(sentence)

    def _away(self, error: EtcdUnavailable, seconds: float) -> None:
        if self._loop is not None:
            self._loop.post(lambda: self.unanswered(error, seconds))

    def _lost(self, error: ElasticError) -> None:
        if isinstance(error, EtcdRefused):
            self._notices.say(f"{error}; training continues, but this job cannot recover from the loss of another worker")
        else:
            self._notices.lost(error)


def _entry(ready: Ready) -> str:
    return json.dumps({"host": ready.host, "address": ready.address, "fingerprint": digest(ready.fingerprint)})

"""Coordinates a job: founds it, hears its workers on all hosts, leaves changes of its members to a Driver, and decides its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.agent import live, requests
from elastic.agent.background import Background
from elastic.agent.copies import copies_said
from elastic.agent.fitting import misfit_with, misfit_without
from elastic.agent.founders import Founders, hindrance, watched
from elastic.agent.hosts import HostCarrier, Hosts
from elastic.agent.job_facts import JobFacts
from elastic.agent.job_reports import JobReports
from elastic.agent.last_returns import without_the_rest
from elastic.agent.loop import Loop
from elastic.agent.record import JobRecord
from elastic.agent.remote_carrier import RemoteCarrier
from elastic.agent.resources import site
from elastic.agent.start import Start
from elastic.agent.stopping import AGAIN_S, FIRST_S, StopProgress
from elastic.agent.supervision import (
    WorkerProcess,
    ended,
    how_ended,
    is_consequence,
    is_machine_failure,
    last_line,
    returned_early,
    worker_error,
)
from elastic.control.driver import Driver
from elastic.control.outcome import failed
from elastic.control.state import Resumed
from elastic.control.world import World
from elastic.errors import Conflict, ElasticError, EtcdUnavailable, HostRefused, MismatchError, PlanError, TrainerError
from elastic.host.channel import Message
from elastic.host.facts import HostFacts
from elastic.host.rundir import RunDirectory
from elastic.membership.etcd_thread import EtcdTask, EtcdThread
from elastic.membership.founding import Ready, another_file, found, strangers
from elastic.observe.console import say
from elastic.plan.described import described
from elastic.plan.memory import need, readable
from elastic.plan.saved import SavedPlan
from elastic.power.job_power import MODES, JobPower
from elastic.settings import JobSettings
from elastic.worker.onesided_waits import OneSided, Wait

if TYPE_CHECKING:
    from elastic.membership.session import Session
    from elastic.plan.site import Site
    from elastic.view import View

_CAUSE_S = 1.0  # how long a worker's error about a lost link waits for the error that caused it


class Coordinator:
    """Runs one job to its outcome, which `end` gets, once. `found` begins when the workers of all founding hosts can be started. What
    happens is noted in `record`."""

    def __init__(
        self,
        loop: Loop,
        start: Start,
        hosts: Hosts,
        session: Session,
        etcd_thread: EtcdThread,
        end: Callable[[Message], None],
        record: JobRecord,
    ) -> None:
        self._loop, self._start, self.hosts, self._session, self._end = loop, start, hosts, session, end
        self.unfounded: Callable[[], None] = lambda: None  # called when the founding is to begin again, with fewer hosts
        self._etcd_thread, self.record = etcd_thread, record
        self._settings = start.settings
        self._over = self._stopping = self._publishing = False
        self._driver: Driver | None = None
        self._founders = Founders.of(())
        self._announced, self._returned = set[int](), False  # which founders are ready, and whether one has returned
        self._one_sided = OneSided()
        self._stop_watch = StopProgress()
        self._asked_at = 0.0  # when the stop was requested
        self._reports = JobReports(start.settings.grace_s)
        self._background = Background(loop.post)
        self._spare_bytes = 0  # what a spare takes
        self._power: JobPower | None = None
        if start.sharing is None:
            self._power = JobPower(start.settings.name, MODES.get(start.settings.dvfs), Path(start.directory), say)
        self._copies: int | None = None  # so many copies of the state there are
        self.facts: JobFacts | None = None  # what another agent needs to take over

    @property
    def founded(self) -> bool:
        """Whether the founders have been started."""
        return bool(self._founders.numbers)

    def close(self, outcome: Message | None) -> None:
        """Ends the coordination, and completes the job's outcome."""
        self._over = True
        if self._driver is not None:
            self._show()
        self._loop.clear_timer("live")
        self._background.close()
        if self._power is not None:
            self._power.close()
        if self._driver is not None:
            self._driver.close()
        if outcome is not None and outcome["type"] == "done":
            self._reports.complete(outcome, [] if self._driver is None else self._driver.incidents)

    def close_files(self) -> None:
        """Ends what must outlast the workers."""
        self._reports.close()

    def _finish(self, outcome: Message) -> None:
        if not self._over:
            self._over = True
            self._end(outcome)

    # Founding

    def found(self) -> None:
        """Starts the founders, on each present host as many as it has room for."""
        hosts = list(self.hosts.present.values())
        first = max(self.hosts.workers, default=-1) + 1
        places = [*enumerate((host.name for host in hosts for _ in range(host.room)), first)]
        self._settings = replace(self._settings, workers=len(places), spares=self.hosts.spares)
        self.hosts.wanted = len(places)
        self._founders = replace(Founders.of([number for number, _ in places]), first=first)
        self.hosts.starting(first + len(places) - 1)
        for number, host in places:
            self._fork_founder(number, host)
        watched(self.hosts, self._loop, self._settings, self._founding, self.hosts.end).look()

    def _founding(self) -> list[WorkerProcess]:
        founds = not (self._over or self._publishing or self._driver is not None)
        return [self.hosts.worker(number) for number in self._founders.numbers] if founds else []

    def _fork_founder(self, number: int, host: str) -> None:
        self.hosts.fork(number, host, first=number == self._founders.first, joins=False)

    def host_joins(self, host: HostCarrier) -> None:
        """Handles a host whose workers can be started."""
        self.hosts.add(host)
        if self.facts is not None:
            host.tell_agent({"type": "job", "facts": self.facts.to_json()})
        if self._driver is not None:
            host.tell_agent({"type": "incidents", "incidents": self._driver.incidents})
        if self._driver is not None:
            say(f"host {host.name} joins with room for {host.room} worker{'s' * (host.room != 1)}")
            self._driver.came_back(host.left)
        self._tell_room()

    def host_lost(self, host: HostCarrier, lost: Sequence[WorkerProcess], since: float) -> None:
        """Handles a host that is lost, with its workers that had not ended; its agent was heard last at the time `since`."""
        self.hosts.remove(host)
        if self._driver is not None:
            for worker in lost:
                self._driver.missed(worker.number, since)
        self._tell_room()
        self.ended(*lost)

    def agent_gone(self, host: RemoteCarrier) -> None:
        """Notes that the agent of a host that is lost has ended, and with it what it had in memory: nobody need wait for that."""
        host.returns = False
        if self._driver is not None:
            self._driver.returns_not()

    def refuse(self, name: str, why: str) -> bool:
        """Goes on without a host, which is told why, and ends. Returns whether it can: not without this one."""
        host = self.hosts.present[name]
        if host is self.hosts.local:
            return False
        say(f"host {name} is refused: {why}")
        host.tell_agent({"type": "refused", "reason": why, "kind": HostRefused.__name__})
        self.hosts.remove(host)
        self._tell_room()
        return True

    def _tell_room(self) -> None:
        """Tells the driver of a job that trains how many workers and spares are wanted."""
        hosts = self.hosts
        if self._driver is not None:
            hosts.most = max(hosts.most, sum(hosts.rooms.values()))
            self._driver.has_room(hosts.room, hosts.spares, hosts.rooms)

    def least_bytes(self, room: int) -> int:
        """Returns the least bytes that a worker needs on a host that joins with so many; 0 before the job trains."""
        if self._driver is None:
            return 0
        view = self._driver.view
        workers, layers = len(view.members) + room, range(len(view.workload.layers))
        kept = {"replicas": 0, "on_device": view.fleet.on_device}
        needs = (need(view.workload, range(layer, layer + 1), workers, workers, 1, 1, **kept) for layer in layers)
        return round(min(each.host_bytes for each in needs)) + min(member.base for member in view.members)

    def no_room_for(self, name: str, facts: HostFacts, room: int) -> str | None:
        """Returns why the model does not fit once a host with so many workers has joined, None if it does, or nobody knows yet."""
        return None if self._driver is None else misfit_with(self._driver.view, self._settings, name, facts, room)

    def no_room_without(self, workers: Iterable[int]) -> str | None:
        """Returns why the model does not fit once these workers have left, None if it does."""
        return None if self._driver is None else misfit_without(self._driver, self._settings, workers)

    def answer(self, request: Message) -> Message:
        """Does what a user asks for from outside, and returns what to tell: `told`, or `refused` with the reason."""
        return requests.answer(self, request)

    def scale(self, workers: int) -> None:
        """Changes the wanted number of workers: new ones join, or those with the highest numbers leave."""
        self.hosts.limit = workers
        self.hosts.tell_agents({"type": "scaled", "workers": workers})
        if self.facts is not None:
            self.facts = replace(self.facts, limit=workers)
        self._tell_room()
        if self._driver is not None:
            surplus = sorted(self._driver.state.live)[workers:]
            if surplus:
                self._driver.drain(surplus, f"the job is scaled to {workers} worker{'s' * (workers != 1)}")

    @property
    def name(self) -> str:
        """The job's name."""
        return self._settings.name

    @property
    def driver(self) -> Driver | None:
        """The driver, once the job has a view."""
        return self._driver

    @property
    def least(self) -> int:
        """The number of workers below which the job does not train."""
        return max(1, self._settings.min_workers)

    def left_without(self, name: str) -> int:
        """Returns how many members, and spares that can take the places of others, are on other hosts that are not leaving already."""
        spares, leaving = () if self._driver is None else self._driver.state.spares, {name, *self.hosts.draining}
        return sum(number in self.hosts.workers and self.hosts.host_of(number) not in leaving for number in (*self._members, *spares))

    def drain(self, name: str) -> None:
        """Lets the others take over what the workers of this host own; then it leaves. A job that cannot go on without it is stopped, and
        then no host leaves before the end: the members at the last boundary must all return."""
        hosts = self.hosts
        if self._over or self._stopping or name in hosts.draining or name not in hosts.present:
            return
        few = self._driver is None or self.left_without(name) < self.least
        why = None if few else self.no_room_without(hosts.workers_of(name))
        if self._driver is None or few or why is not None:
            because = "" if why is None else f" ({why})"
            say(f"host {name} is to leave, and the job cannot go on without it{because}: it stops at the next step boundary")
            self.stop()
            return
        say(f"host {name} is drained: the others take over what its workers own")
        hosts.draining.add(name)
        self._tell_room()
        for number in hosts.workers_of(name):
            if self._driver.joining(number):  # it must not become a member of a view that the host leaves
                hosts.end(number, f"host {name} is drained")
        self._driver.drain(hosts.workers_of(name), f"host {name} is drained")
        self._check_drained()

    def _check_drained(self) -> None:
        """Lets hosts leave whose workers have all ended, unless the whole job is about to end."""
        if self._stopping:
            return
        for name in [name for name in self.hosts.draining if not self.hosts.workers_of(name)]:
            host = self.hosts.present[name]
            if host is self.hosts.local:
                self._finish({"type": "drained"})
                return
            host.tell_agent({"type": "drained"})
            self.hosts.remove(host)

    # The user

    def stop(self) -> None:
        """Stops the job at the next step boundary."""
        if self._stopping:
            return
        self._stopping, self._asked_at = True, time.monotonic()
        if self.facts is not None:
            self.facts = replace(self.facts, stopping=True)
        self._loop.set_timer(FIRST_S, self._still_running, "stopping")
        self.hosts.tell_all({"type": "stop"})
        if self._driver is not None:
            self._driver.stop()

    def _still_running(self) -> None:
        """Informs the user what a job that was asked to stop waits for."""
        if self._over:
            return
        workers = self.hosts.workers
        members = [number for number in self._members if number in workers]
        steps = {number: workers[number].step for number in members}
        returned = [number for number in members if workers[number].finished]
        say(self._stop_watch.sentence(time.monotonic() - self._asked_at, members, steps, returned))
        self._loop.set_timer(AGAIN_S, self._still_running, "stopping")

    # The workers

    @property
    def _members(self) -> tuple[int, ...]:
        return self._founders.numbers if self._driver is None else self._driver.view.workers

    def heard(self, worker: WorkerProcess, message: Message) -> None:
        """Handles a worker's message."""
        if self._over:
            return
        self.record.heard(worker.number, message)
        if message["type"] == "announce":
            worker.announced = message["ready"] if self._driver is None else {}  # it may be large, and is needed only for the first view
            self._announced.add(worker.number)
            self._check_announced()
        elif message["type"] == "progress":
            worker.epoch, worker.step = message["epoch"], message["step"]
            message = message if self._power is None else self._power.heard(worker.number, message)
        elif message["type"] == "gpu" and self._power is not None:
            self._power.use(worker.number, message["uuid"], lambda: worker.pid)
        elif message["type"] == "waits":
            self._waits(worker, message)
        elif message["type"] == "result":
            self._finished(worker, message)
        elif message["type"] == "error":
            self._raised(worker, message)
        else:
            self._reports.heard(worker, message)
        if self._driver is not None:
            self._driver.heard(worker.number, message)

    def _waits(self, worker: WorkerProcess, message: Message) -> None:
        """Ends a job in which some workers wait for a call that others never make."""
        wait = Wait(**message["wait"])
        self._one_sided.heard(worker.number, wait)
        self._stop_watch.heard(worker.number, wait)
        if self._driver is not None:
            view = self._driver.view
            returned = [number for number in view.workers if self.hosts.worker(number).result is not None]
            verdict = self._one_sided.verdict(view.epoch, view.workers, returned)
            if verdict is not None:
                self._finish(failed(TrainerError, verdict))
                return
            for sentence in self._one_sided.waited_for(view.epoch, view.workers, returned):
                say(sentence)

    def _finished(self, worker: WorkerProcess, message: Message) -> None:
        worker.result = message
        if self._driver is None:
            self._returned = True
            self._check_announced()
        else:
            self._driver.finished(worker.number)
        self._check_finished()

    def _raised(self, worker: WorkerProcess, message: Message) -> None:
        """Ends the job on an exception of `train_fn`; one of a joining worker, or of its machine, ends only that worker."""
        if self._driver is not None and self._driver.joining(worker.number):
            self._driver.failed_to_join(worker.number, last_line(message))
        elif self._driver is not None and is_machine_failure(message) and len(self._driver.view.workers) > 1:
            worker.failure = last_line(message)  # its process ends by itself
        else:
            worker.error = worker_error(worker, message)
            self._fail(worker.error, consequence=is_consequence(message["kind"]))

    def ended(self, *workers: WorkerProcess) -> None:
        """Handles the ends of processes of workers, all those of a host if it is lost."""
        if self._over:
            return
        if self._power is not None:
            for worker in workers:
                self._power.ended(worker.number)
        died = [worker for worker in workers if worker.result is None and worker.error is None]
        died = [] if self._publishing else died  # these are handled when there is a view
        if self._driver is not None:
            self._driver.died(*(self.hosts.death(worker) for worker in died))
        for worker in died if self._driver is None else ():
            self._founder_died(worker)
        self._check_drained()
        self._check_finished()

    def _founder_died(self, worker: WorkerProcess) -> None:
        """Replaces a worker that died before the first view, as often as joins may fail."""
        if worker.number not in self._founders.numbers:  # the founding has begun again since
            return
        others = [self.hosts.worker(number) for number in self._founders.numbers]
        why = hindrance(self._founders, worker, others, respawn=self._settings.respawn)
        if why is not None:
            worker.error = ended(worker, why)
            self._fail(worker.error, consequence=False)
            return
        self._founders = self._founders.without(worker.number)
        new, host = self._founders.numbers[-1], self.hosts.host_of(worker.number)
        reason = f" ({worker.condemned})" if worker.condemned else ""
        say(f"{how_ended(worker)}{reason} before training began: worker {new} is started in its place")
        self.hosts.starting(new)
        self._fork_founder(new, host if host in self.hosts.present else self.hosts.emptiest())

    def _fail(self, error: Message, *, consequence: bool) -> None:
        """Ends the job with the error. A mere consequence of another worker's error waits a moment for that error."""
        if not consequence:
            self._finish(error)
        elif not self._loop.timing("cause"):
            self._loop.set_timer(_CAUSE_S, lambda: self._finish(error), "cause")

    # The first view and the end

    def _check_announced(self) -> None:
        """Makes the first view when the last worker is ready."""
        if self._driver is not None or not (self._returned or self._announced.issuperset(self._founders.numbers)):
            return
        workers = [self.hosts.worker(number) for number in self._founders.numbers]
        waiting = [worker.number for worker in workers if worker.announced is not None]
        returned = [worker.number for worker in workers if worker.finished and worker.announced is None]
        if self._publishing or not waiting:
            return
        if returned:
            self._finish(returned_early(returned, waiting))
        elif len(waiting) == len(workers):
            try:
                self._plan_first_view()
            except ElasticError as error:
                self._finish(failed(type(error), str(error)))

    def _plan_first_view(self) -> None:
        """Computes the first view aside from the loop: with hundreds of workers that takes long."""
        settings = self._settings
        announced = {number: self.hosts.worker(number).announced or {} for number in self._founders.numbers}
        ready = {number: Ready.from_json(each, self.hosts.host_of(number), settings.memory) for number, each in announced.items()}
        if others := strangers(ready, self.hosts.local.name):
            self._found_again(others)
            return
        self._spare_bytes = max(each.whole for each in ready.values())
        saved = None if settings.plan is None else SavedPlan.from_json(settings.plan)
        self._publishing = True
        parts = (ready, settings.stages, self._site(), saved, settings.dvfs == "energy")
        self._background.run(lambda: _view_or_error(*parts), lambda view: self._make_view(view, ready))

    def _make_view(self, view: View | ElasticError, ready: Mapping[int, Ready]) -> None:
        settings = self._settings
        if self._over:
            return
        if isinstance(view, ElasticError):
            few = f". Each spare takes {readable(self._spare_bytes)} of its host: fewer spares leave more"
            spares = isinstance(view, PlanError) and self.hosts.spares and settings.memory is None
            self._finish(failed(type(view), f"{view}{few if spares else ''}"))
            return
        if settings.plans_only:
            self._finish({"type": "done", "value": described(view.plan, view.fleet, view.workload), "epoch": 0, "stopped": False})
            return
        first = ready[view.coordinator]
        self.facts = JobFacts(settings=settings.for_others(), founder=first.to_json(), views=[view.to_json()])
        self.hosts.tell_agents({"type": "job", "facts": self.facts.to_json()})  # before it is committed: then others can take over
        self._etcd_thread.run(
            EtcdTask(
                call=partial(self._session.publish, view),
                done=lambda _: self._founded(view, ready),
                refused=self._not_founded,
                wanted=lambda: not self._over,
                waits="the first step",
            )
        )

    def _found_again(self, others: Mapping[str, str]) -> None:
        """Founds the job without these hosts, on which a file differs: with those that are left, if they are enough, or when they are."""
        for name, file in others.items():
            self.refuse(name, another_file(file))
        numbers, self._founders = self._founders.numbers, Founders.of(())
        for number in numbers:
            self.hosts.end(number, "the founding of the job begins again, without a host that was refused")
        self.unfounded()

    def _founded(self, view: View, ready: Mapping[int, Ready]) -> None:
        """Begins to train in the first view. Workers and hosts may have been lost while it waited for etcd."""
        if self._over:
            return
        self._publishing = False
        self._drive(self._settings, view, ready[view.coordinator])
        self._etcd_thread.run(EtcdTask(call=partial(self._session.admit, ready)))  # in its thread: the loop must not wait for etcd
        for number in ready:
            self.hosts.worker(number).announced = {}  # it may be large, and is no longer needed
        for number in view.workers:
            if self.hosts.worker(number).ended:
                self.ended(self.hosts.worker(number))
        self._tell_room()  # a host may have come or gone since the founders were started

    def _not_founded(self, error: Conflict) -> None:
        """Leaves the founding of the job to another agent, which was faster."""
        shared = self._start.sharing is not None
        self._finish({"type": "rejoin", "why": str(error)} if shared else failed(type(error), str(error)))

    def take_over(self, facts: JobFacts, view: View, resumed: Resumed, since: float, *, why: Mapping[str, str], steady: bool) -> None:
        """Goes on with a job whose coordinator is lost `since` then; `view` is the committed one, and the present hosts have been added.

        `why`: how it was noticed that hosts are lost, by their names. `steady`: no worker waits for orders.
        """
        self.facts = facts
        self.record.take_over(since)
        self.hosts.limit = facts.limit
        self.hosts.most = len(view.workers)
        settings = replace(JobSettings.from_json(facts.settings), workers=self.hosts.room, spares=self.hosts.spares)
        self._founders, self.hosts.wanted = Founders.of(view.workers), facts.settings["workers"]
        members = set(view.workers)
        for member in view.members:
            self.hosts.miss(member.worker, member.host, why.get(member.host, "its agent is gone"))
        founder, self._spare_bytes = Ready(**facts.founder), facts.founder["whole"]
        if facts.stopping:
            self.stop()
        others = {number: each for number, each in self.hosts.workers.items() if number not in members and not each.ended}
        spares = {number: each.announced for number, each in others.items() if each.announced and not each.condemned}
        self._drive(settings, view, founder, replace(resumed, spares=frozenset(spares)))
        if self._driver is not None:
            self._driver.died_before(number for number, each in self.hosts.workers.items() if each.ended and number not in members)
        for number in others.keys() - spares.keys():
            self.hosts.end(number, "the agent that had started it is lost")
        self._tell_room()
        for number, ready in spares.items():
            self.heard(self.hosts.worker(number), {"type": "announce", "ready": ready})
        records = [self.hosts.worker(number) for number in view.workers]
        for worker in records:
            if worker.finished and self._driver is not None:
                self._driver.finished(worker.number)
        for worker in records:
            if worker.ended and not worker.finished and self._driver is not None:
                self._driver.missed(worker.number, since)
                self.ended(worker)
        if self._driver is not None and not steady:
            self._driver.reopen()
        self._check_finished()

    def _drive(self, settings: JobSettings, view: View, founder: Ready, resumed: Resumed | None = None) -> None:
        self.hosts.freeze(founder.code)
        self._copies = None if resumed is None else view.copies_kept
        self._driver = Driver(self._world(), settings, view, founder, resumed)
        if self._stopping:
            self._driver.stop()

    def _world(self) -> World:
        return World(
            carrier=self.hosts,
            timers=self._loop,
            etcd_thread=self._etcd_thread,
            attempts=self._session.attempts,
            directory=RunDirectory(Path(self._start.directory)),
            end=self._finish,
            admit=self._session.admit,
            dismiss=self._session.dismiss,
            say=say,
            hosts=self._site,
            without_the_rest=self._without_the_rest,
            several=self._start.sharing is not None,
            committed=self._committed,
            incident=self.record.incident,
            clocking=(lambda: None) if self._power is None else self._power.clocking,
            gpu=(lambda _: None) if self._power is None else self._power.health,
            deposed=lambda why: self._finish({"type": "rejoin", "why": why}),
            compute=self._background.run,
            refuse=self.refuse,
        )

    def _committed(self, view: View) -> None:
        self.record.view(view)
        if (sentence := copies_said(view, self._copies, shared=self._start.sharing is not None)) is not None:
            say(sentence)
        self._copies = view.copies_kept
        if self._power is not None:
            self._power.committed(view)
        if not self._loop.timing("live"):
            self._loop.set_timer(0.0, self._show, "live")  # the driver is there by then

    def _show(self) -> None:
        """Records how the job stands, and again every second."""
        self.record.live(live.standing(self))
        self._loop.set_timer(live.pause_s(self), self._show, "live")

    def _site(self) -> Site:
        """Returns the resources of the hosts for their workers."""
        state = None if self._driver is None else self._driver.state
        members = self._founders.numbers if state is None else (state.participants or state.live)
        at = [self.hosts.host_of(number) for number in members]
        return site(self.hosts.present.values(), at, self._settings.threads, self._spare_bytes, self._settings.copies)

    def seen(self, view: View) -> None:
        """Handles a view that is committed in etcd."""
        if self._driver is not None and not self._over:
            self._driver.seen(view)

    def away(self, error: EtcdUnavailable, seconds: float) -> None:
        """Handles an outage of etcd in which a change of the job's members waits for it."""
        if self._driver is not None and not self._over:
            self._driver.away(error, seconds)

    def _without_the_rest(self, failure: Message) -> Message:
        """Returns the outcome of a job in which only some workers have returned from train_fn, and `failure` keeps the others from it."""
        records = [self.hosts.worker(number) for number in self._members if number in self.hosts.workers]
        rest = [worker.number for worker in records if not worker.finished]
        seen = [each.doing.step for each in self.hosts.look(rest) if each.doing is not None]
        outcome, sentence = without_the_rest(failure, records, seen, self._reports.returned)
        if sentence:
            say(sentence)
        return outcome if self._driver is None or not sentence else {**outcome, "epoch": self._driver.view.epoch}

    def _check_finished(self) -> None:
        workers, members = self.hosts.workers, self._members
        known = all(number in workers for number in members)  # false until the fork server is ready
        complete = known and all(workers[number].finished for number in members) if self._driver is None else self._driver.complete
        if not complete or not members:
            return
        if (unlike := self._reports.unlike([workers[number] for number in members])) is not None:
            self._finish(failed(MismatchError, unlike))
            return
        result = workers[self._founders.first if self._driver is None else members[0]].result or {}
        epoch = 0 if self._driver is None else self._driver.view.epoch
        done = {"type": "done", "value": result["value"], "epoch": epoch, "stopped": result["stopped"], **self._reports.returned}
        if all(workers[number].gone for number in members):
            self._finish(done)
        elif not self._loop.timing("grace"):
            self.hosts.tell(members, {"type": "leave"})
            self._loop.set_timer(self._settings.grace_s, lambda: self._finish(done), "grace")


def _view_or_error(ready: Mapping[int, Ready], stages: int | None, site: Site, saved: SavedPlan | None, eager: bool) -> View | ElasticError:
    try:
        return found(ready, stages, site, saved, eager=eager)
    except ElasticError as error:
        return error

"""The supervisor process of one host: starts its workers, watches them, and represents them in etcd.

It does not import torch. Its loop waits for the launcher, the fork server, each worker's socket and pidfd, and for events from the threads
of the etcd client. The first event that decides how the job ends sets the outcome; then the agent ends all processes that it started.

    launcher -> agent   start {...} | stop {} | kill {}; the end of the connection is the launcher's death
    agent -> launcher   done {value, epoch, stopped, incidents, saves, skipped} | failed {kind, message} | killed {}
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.agent.carrier import LocalCarrier
from elastic.agent.crew import Crew
from elastic.agent.founders import Founders, hindrance
from elastic.agent.loop import Loop
from elastic.agent.save_summary import SaveSummary
from elastic.agent.segments import Segments
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
from elastic.control.world import World
from elastic.errors import ElasticError, JobFailed, TrainerError
from elastic.host import facts as host
from elastic.host import signals
from elastic.host.channel import Channel, Message
from elastic.host.rundir import RunDirectory
from elastic.membership.etcd_thread import EtcdTask, EtcdThread
from elastic.membership.founding import Ready, found
from elastic.observe.console import drain, say
from elastic.plan.described import described
from elastic.plan.saved import SavedPlan
from elastic.plan.site import Site
from elastic.worker.job import WorkerSpec
from elastic.worker.metrics import MetricFiles
from elastic.worker.onesided_waits import OneSided, Wait

if TYPE_CHECKING:
    from elastic.membership.session import Session
    from elastic.view import View

_CAUSE_S = 1.0  # how long a worker's error about a lost link waits for the error that caused it


class Agent:
    """Runs one job to its outcome: starts it, then leaves changes of its members to a Driver."""

    def __init__(self, launcher: Channel, start: Start) -> None:
        self.outcome: Message | None = None
        self.launcher_gone = False
        self._launcher = launcher
        self._start = start
        self._host = socket.gethostname()
        self._secret = secrets.token_hex(32)
        self._stopping = False
        self._session: Session | None = None
        self._etcd_thread: EtcdThread | None = None
        self._driver: Driver | None = None
        self._saves = SaveSummary()
        self._one_sided = OneSided()
        self._stop_watch = StopProgress()
        self._asked_at = 0.0  # when the stop was requested
        self._metrics = MetricFiles(say)
        self._returned: dict[str, Any] = {}  # the value of the leader's train_fn, sent before its worker has finished
        self._skipped: set[int] = set()
        self._lasting = False  # whether the user was informed of threads that have not ended
        self._founders = Founders.of(start.settings.workers)
        self._loop = Loop()
        signals.obey(lambda: self._loop.post(self.stop))
        self._crew = Crew(
            self._loop,
            start.worker_environment,
            self._spec,
            segments=Segments(wanted=start.segments),
            ready=self._fork_founders,
            heard=self._heard,
            ended=self._ended,
            broken=lambda why: self._end(failed(JobFailed, why)),
        )
        self._carrier = LocalCarrier(self._crew, RunDirectory(Path(start.directory)))

    def run(self) -> None:
        """Returns as soon as there is an outcome, or the launcher is gone."""
        try:
            self._join()
            while self.outcome is None and not self.launcher_gone:
                self._loop.turn()
        except ElasticError as error:
            self._end(failed(type(error), str(error)))

    def close(self) -> None:
        """Ends every process of the job."""
        if self._driver is not None:
            self._driver.close()
        if self.outcome is not None and self.outcome["type"] == "done":
            self.outcome["incidents"] = [] if self._driver is None else self._driver.incidents
            self.outcome["saves"] = self._saves.to_json()
            self.outcome["skipped"] = sorted(self._skipped)
            if self._saves.warning is not None:
                say(f"warning: {self._saves.warning}")
        self._crew.close()
        self._metrics.close()
        drain()
        if self._etcd_thread is not None:
            self._etcd_thread.stop()
        if self._session is not None:
            self._session.close()

    def _join(self) -> None:
        # Imported here, while the fork server starts: both take long.
        from elastic.membership.session import Notices, Session

        notices = Notices(
            view=lambda view: self._loop.post(lambda: self._seen(view)),
            lost=lambda error: self._loop.post(lambda: self._etcd_failed(error)),
            say=lambda sentence: self._loop.post(lambda: say(sentence)),
        )
        self._session = Session(self._start.settings, Path(self._start.directory), notices)
        self._session.tend(self._loop)
        self._loop.watch(self._launcher, self._hear_launcher)
        self._crew.listen()

    def _end(self, outcome: Message) -> None:
        if self.outcome is None:
            self.outcome = outcome

    @property
    def _over(self) -> bool:
        return self.outcome is not None or self.launcher_gone

    # The launcher

    def stop(self) -> None:
        """Stops the job at the next step boundary."""
        if self._stopping:
            return
        self._stopping, self._asked_at = True, time.monotonic()
        self._loop.set_timer(FIRST_S, self._still_running, "stopping")
        self._crew.tell_all({"type": "stop"})
        if self._driver is not None:
            self._driver.stop()

    def _still_running(self) -> None:
        """Informs the user what a job that was asked to stop waits for."""
        if self._over:
            return
        workers = self._crew.workers
        known = self._founders.numbers if self._driver is None else self._driver.view.workers
        members = [number for number in known if number in workers]
        steps = {number: workers[number].step for number in members}
        returned = [number for number in members if workers[number].finished]
        say(self._stop_watch.sentence(time.monotonic() - self._asked_at, members, steps, returned))
        self._loop.set_timer(AGAIN_S, self._still_running, "stopping")

    def _hear_launcher(self) -> None:
        for message in self._launcher.receive():
            if message["type"] == "stop":
                self.stop()
            elif message["type"] == "kill":
                self._end({"type": "killed"})
        if self._launcher.closed:
            self._loop.forget(self._launcher)
            self.launcher_gone = True

    # The workers

    def _fork_founders(self) -> None:
        for number in self._founders.numbers:
            self._crew.fork(number)

    def _spec(self, number: int) -> dict[str, Any]:
        return WorkerSpec(
            worker=number,
            first=number == self._founders.first,
            joins=self._driver is not None,
            host=self._host,
            directory=self._start.directory,
            secret=self._secret,
            settings=replace(self._start.settings, etcd=None, plan=None),  # etcd= may hold a password, and workers need no plan
            import_path=self._start.import_path,
            argv=self._start.argv,
            modules=self._start.modules,
        ).to_json()

    def _heard(self, worker: WorkerProcess, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "announce":
            worker.announced = message["ready"] if self._driver is None else {}  # it may be large, and is needed only for the first view
            self._check_announced()
        elif message["type"] == "progress":
            worker.epoch, worker.step = message["epoch"], message["step"]
        elif message["type"] == "waits":
            self._waits(worker, message)
        elif message["type"] == "save":
            self._saves = self._saves.heard(message["step"], message["reason"])
        elif message["type"] == "log":
            self._metrics.heard(message)
        elif message["type"] == "skipped":
            if message["step"] not in self._skipped:
                self._skipped.add(message["step"])
                say(f"step {message['step']} is skipped: {message['reason']}")
        elif message["type"] == "returned":
            self._returned = {"value": message["value"]}
        elif message["type"] == "lasts":
            self._lasts(worker, message["threads"])
        elif message["type"] == "result":
            self._finished(worker, message)
        elif message["type"] == "error":
            self._raised(worker, message)
        if self._driver is not None:
            self._driver.heard(worker.number, message)

    def _waits(self, worker: WorkerProcess, message: Message) -> None:
        """Ends a job in which some workers wait for a call that others never make."""
        wait = Wait(**message["wait"])
        self._one_sided.heard(worker.number, wait)
        self._stop_watch.heard(worker.number, wait)
        if self._driver is not None:
            view = self._driver.view
            returned = [number for number in view.workers if self._crew.workers[number].result is not None]
            verdict = self._one_sided.verdict(view.epoch, view.workers, returned)
            if verdict is not None:
                self._end(failed(TrainerError, verdict))
                return
            for sentence in self._one_sided.waited_for(view.epoch, view.workers, returned):
                say(sentence)

    def _lasts(self, worker: WorkerProcess, threads: list[str]) -> None:
        """Informs the user, once, that a worker has returned and cannot end, since threads of train_fn still run."""
        if not self._lasting:
            self._lasting = True
            say(
                f"worker {worker.number} has returned from train_fn and waits for threads that train_fn started and did not end: "
                f"{', '.join(threads)}. It is killed {self._start.settings.grace_s:.0f} s after the last worker has returned: let train_fn "
                "end and join its threads, or make them daemons"
            )

    def _finished(self, worker: WorkerProcess, message: Message) -> None:
        worker.result = message
        if self._driver is None:
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

    def _ended(self, worker: WorkerProcess) -> None:
        if self._over:
            return
        if worker.result is None and worker.error is None:
            if self._driver is None:
                self._founder_died(worker)
            else:
                self._driver.died(self._carrier.death(worker))
        self._check_finished()

    def _founder_died(self, worker: WorkerProcess) -> None:
        """Replaces a worker that died before the first view, as often as joins may fail."""
        others = [self._crew.workers[number] for number in self._founders.numbers]
        why = hindrance(self._founders, worker, others, respawn=self._start.settings.respawn)
        if why is not None:
            worker.error = ended(worker, why)
            self._fail(worker.error, consequence=False)
            return
        self._founders = self._founders.without(worker.number)
        new = self._founders.numbers[-1]
        say(f"{how_ended(worker)} before training began: worker {new} is started in its place")
        self._crew.fork(new)

    def _fail(self, error: Message, *, consequence: bool) -> None:
        """Ends the job with the error. A mere consequence of another worker's error waits a moment for that error."""
        if not consequence:
            self._end(error)
        elif not self._loop.timing("cause"):
            self._loop.set_timer(_CAUSE_S, lambda: self._end(error), "cause")

    # Start and end

    def _check_announced(self) -> None:
        """Makes the first view when the last worker is ready."""
        workers = [self._crew.workers[number] for number in self._founders.numbers]
        waiting = [worker.number for worker in workers if worker.announced is not None]
        returned = [worker.number for worker in workers if worker.finished and worker.announced is None]
        if self._driver is not None or not waiting:
            return
        if returned:
            self._end(returned_early(returned, waiting))
        elif len(waiting) == self._start.settings.workers:
            self._found()

    def _found(self) -> None:
        assert self._session is not None  # workers are started after it
        memory = self._start.settings.memory
        announced = {number: self._crew.workers[number].announced or {} for number in self._founders.numbers}
        ready = {number: Ready.from_json(each, self._host, memory) for number, each in announced.items()}
        settings = self._start.settings
        view = found(ready, settings.stages, self._site(), None if settings.plan is None else SavedPlan.from_json(settings.plan))
        if settings.plans_only:
            self._end({"type": "done", "value": described(view.plan, view.fleet, view.workload), "epoch": 0, "stopped": False})
            return
        self._session.publish(view)
        back, unanswered = self._with_driver(Driver.back), self._session.unanswered
        self._etcd_thread = EtcdThread(self._loop.post, self._with_driver(Driver.away), back, self._etcd_failed, unanswered=unanswered)
        for number, each in ready.items():  # in its thread: the loop must not wait for etcd
            self._etcd_thread.run(EtcdTask(call=partial(self._session.admit, number, each)))
            self._crew.workers[number].announced = {}  # it may be large, and is no longer needed
        world = World(
            carrier=self._carrier,
            timers=self._loop,
            etcd_thread=self._etcd_thread,
            attempts=self._session.attempts,
            directory=RunDirectory(Path(self._start.directory)),
            end=self._end,
            admit=self._session.admit,
            dismiss=self._session.dismiss,
            say=say,
        )
        self._crew.freeze(ready[view.coordinator].code)
        self._driver = Driver(world, self._start.settings, view, ready[view.coordinator])
        if self._stopping:
            self._driver.stop()

    def _site(self) -> Site:
        """Returns the resources of this host for its workers."""
        memory = host.memory_bytes()
        places = {self._host: host.processors() / self._start.settings.threads}
        return Site(places=places, memory={} if memory is None else {self._host: memory})

    def _with_driver(self, call: Callable[..., None]) -> Callable[..., None]:
        def act(*arguments: Any) -> None:
            if self._driver is not None and not self._over:
                call(self._driver, *arguments)

        return act

    def _seen(self, view: View) -> None:
        if self._driver is not None and not self._over:
            self._driver.seen(view)

    def _etcd_failed(self, error: ElasticError) -> None:
        if not self._over:
            self._end(failed(type(error), str(error)))

    def _check_finished(self) -> None:
        workers = self._crew.workers
        members = self._founders.numbers if self._driver is None else self._driver.view.workers
        known = all(number in workers for number in members)  # false until the fork server is ready
        complete = known and all(workers[number].finished for number in members) if self._driver is None else self._driver.complete
        if not complete:
            return
        result = workers[self._founders.first if self._driver is None else members[0]].result or {}
        epoch = 0 if self._driver is None else self._driver.view.epoch
        done = {"type": "done", "value": result["value"], "epoch": epoch, "stopped": result["stopped"], **self._returned}
        if all(workers[number].gone for number in members):
            self._end(done)
        elif not self._loop.timing("grace"):
            self._crew.tell(members, {"type": "leave"})
            self._loop.set_timer(self._start.settings.grace_s, lambda: self._end(done), "grace")

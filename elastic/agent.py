"""The supervisor process of one host: starts its workers, watches them, and speaks for them in etcd.

It imports no torch. Its loop waits for the launcher, the fork server, each worker's socket and pidfd, and for what the threads of the
etcd client saw. The first thing that decides how the job ends is its outcome; then all that it started is ended, in whatever state.

    launcher -> agent   start {...} | stop {} | kill {}; the end of the connection is the launcher's death
    agent -> launcher   done {value, epoch, stopped} | failed {kind, message} | killed {}
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from elastic import forkserver
from elastic.channel import Channel, Message
from elastic.errors import ElasticError, JobFailed
from elastic.job import WorkerSpec
from elastic.loop import Loop
from elastic.membership.founding import Ready, found
from elastic.process import name_process
from elastic.settings import JobSettings, scratch_environment, worker_environment
from elastic.supervision import Worker, ended, failed, is_consequence, returned_early, worker_error

if TYPE_CHECKING:
    from elastic.membership.session import Session
    from elastic.view import View

_CAUSE_S = 1.0  # how long a worker's lost link waits for the news of why
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What the launcher asks for. `environment`, `import_path` and `argv` are the launcher's own."""

    settings: JobSettings
    directory: str
    environment: dict[str, str]
    import_path: tuple[str, ...]
    argv: tuple[str, ...]

    @classmethod
    def from_json(cls, data: Message) -> Start:
        return cls(
            settings=JobSettings.from_json(data["settings"]),
            directory=data["directory"],
            environment=data["environment"],
            import_path=tuple(data["import_path"]),
            argv=tuple(data["argv"]),
        )


class Agent:
    """Runs one job to its outcome."""

    def __init__(self, launcher: Channel, start: Start) -> None:
        self.outcome: Message | None = None
        self.launcher_gone = False
        self._launcher = launcher
        self._start = start
        self._host = socket.gethostname()
        self._secret = secrets.token_hex(32)
        self._workers: dict[int, Worker] = {}
        self._leader = 0
        self._epoch = 0
        self._founded = False
        self._stopping = False
        self._session: Session | None = None
        self._loop = Loop()
        ours, theirs = socket.socketpair()
        with theirs:
            self._forks_process = forkserver.start(_worker_environment(start), theirs.fileno())
        self._forks = Channel(ours)

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
        for worker in self._workers.values():
            worker.kill()
        self._loop.set_timer(_CLOSE_S, lambda: None)
        # The fork server must live until it has reaped them all.
        while any(worker.status is None for worker in self._workers.values()) and not self._forks.closed and self._loop.timing:
            self._loop.turn()
        if self._session is not None:
            self._session.close()
        self._forks_process.kill()
        self._forks_process.wait()

    def _join(self) -> None:
        # Here, since the import takes long and the slow fork server is under way now.
        from elastic.membership.session import Session

        def committed(view: View, _revision: int) -> None:
            self._loop.post(lambda: self._committed(view))

        self._session = Session(self._start.settings, Path(self._start.directory), committed)
        self._loop.watch(self._launcher, self._hear_launcher)
        self._loop.watch(self._forks, self._hear_forkserver)

    def _end(self, outcome: Message) -> None:
        if self.outcome is None:
            self.outcome = outcome

    # The launcher

    def _hear_launcher(self) -> None:
        for message in self._launcher.receive():
            if message["type"] == "stop":
                self._stopping = True
                for worker in self._workers.values():
                    self._tell(worker, {"type": "stop"})
            elif message["type"] == "kill":
                self._end({"type": "killed"})
        if self._launcher.closed:
            self._loop.forget(self._launcher)
            self.launcher_gone = True

    # The fork server

    def _hear_forkserver(self) -> None:
        for message in self._forks.receive():
            if message["type"] == "ready":
                for worker in range(self._start.settings.workers):
                    self._fork(worker)
            elif message["type"] == "forked":
                self._forked(self._workers[message["worker"]], message["pid"], message["fds"][0])
            elif message["type"] == "exited":
                self._exited(self._workers[message["worker"]], message["status"])
            else:
                self._end(failed(JobFailed, f"the workers could not be started:\n{message['message']}"))
        if self._forks.closed:
            self._loop.forget(self._forks)
            self._end(failed(JobFailed, "the fork server, parent of the workers, died; the system may be out of memory"))

    def _fork(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        worker = Worker(number=number, channel=Channel(ours))
        self._workers[number] = worker
        self._set_interest(worker)
        spec = WorkerSpec(
            worker=number,
            host=self._host,
            directory=self._start.directory,
            secret=self._secret,
            settings=replace(self._start.settings, etcd=None),  # it may hold a password
            import_path=self._start.import_path,
            argv=self._start.argv,
        )
        with theirs:
            self._forks.send({"type": "fork", "worker": number, "spec": spec.to_json()}, [theirs.fileno()])
        if self._stopping:
            self._tell(worker, {"type": "stop"})

    def _forked(self, worker: Worker, pid: int, pidfd: int) -> None:
        worker.pid, worker.pidfd = pid, pidfd
        if self.outcome is not None or self.launcher_gone:
            worker.kill()
        self._loop.watch(pidfd, lambda: self._gone(worker))

    # The workers

    def _tell(self, worker: Worker, message: Message) -> None:
        if not worker.channel.closed:
            worker.channel.send(message)
            self._set_interest(worker)

    def _set_interest(self, worker: Worker) -> None:
        """Waits for room as well, where a worker (stopped, perhaps) has not read what was sent."""
        self._loop.watch(worker.channel, lambda: self._hear_worker(worker), writable=worker.channel.unsent)

    def _hear_worker(self, worker: Worker) -> None:
        worker.channel.flush()
        for message in worker.channel.receive():
            self._heard(worker, message)
        if worker.channel.closed:
            self._loop.forget(worker.channel)
        else:
            self._set_interest(worker)

    def _heard(self, worker: Worker, message: Message) -> None:
        if message["type"] == "announce":
            worker.announced = message["ready"]
            self._check_announced()
        elif message["type"] == "progress":
            worker.epoch, worker.step = message["epoch"], message["step"]
        elif message["type"] == "result":
            worker.result = message
            self._check_announced()
            self._check_finished()
        elif message["type"] == "error":
            worker.error = worker_error(worker, message)
            self._fail(worker, consequence=is_consequence(message["kind"]))

    def _gone(self, worker: Worker) -> None:
        self._loop.forget(worker.pidfd)
        for message in worker.channel.drain():
            self._heard(worker, message)
        worker.gone = True
        self._check_ended(worker)

    def _exited(self, worker: Worker, status: int) -> None:
        worker.status = status
        self._check_ended(worker)

    def _check_ended(self, worker: Worker) -> None:
        if not worker.gone or worker.status is None:
            return
        os.close(worker.pidfd)
        if worker.result is None and worker.error is None:
            worker.error = ended(worker)
            self._fail(worker, consequence=False)
        self._check_finished()

    def _fail(self, worker: Worker, *, consequence: bool) -> None:
        """Ends the job with the worker's error; one that only follows from another worker's waits for that one's."""
        assert worker.error is not None
        error = worker.error
        if not consequence:
            self._end(error)
        elif not self._loop.timing:
            self._loop.set_timer(_CAUSE_S, lambda: self._end(error))

    def _check_announced(self) -> None:
        """Founds the job when the last worker is ready."""
        waiting = [worker.number for worker in self._workers.values() if worker.announced is not None]
        returned = [worker.number for worker in self._workers.values() if worker.finished and worker.announced is None]
        if self._founded or not waiting or self.outcome is not None:
            return
        if returned:
            self._end(returned_early(returned, waiting))
        elif len(waiting) == self._start.settings.workers:
            self._found()

    def _found(self) -> None:
        assert self._session is not None  # workers are started after it
        self._founded = True
        ready = {worker.number: Ready.from_json(worker.announced or {}, self._host) for worker in self._workers.values()}
        view = found(ready, self._start.settings.stages)
        for number, announced in ready.items():
            self._session.admit(number, announced)
        self._session.publish(view)

    def _committed(self, view: View) -> None:
        self._epoch, self._leader = view.epoch, view.coordinator
        for worker in self._workers.values():
            self._tell(worker, {"type": "view", "view": view.to_json()})

    def _check_finished(self) -> None:
        workers = self._workers.values()
        if not workers or not all(worker.finished for worker in workers):
            return
        result = self._workers[self._leader].result or {}
        done = {"type": "done", "value": result["value"], "epoch": self._epoch, "stopped": result["stopped"]}
        if all(worker.gone for worker in workers):
            self._end(done)
        elif not self._loop.timing:
            for worker in workers:
                self._tell(worker, {"type": "leave"})
            self._loop.set_timer(self._start.settings.grace_s, lambda: self._end(done))


def _worker_environment(start: Start) -> dict[str, str]:
    fixed = worker_environment(start.settings.threads, start.settings.isa)
    return {**scratch_environment(start.directory), **start.environment, **fixed}


def main() -> None:
    """Entry of the process: argv is the descriptor of the launcher's socket."""
    name_process("elastic-agent")
    launcher = Channel.adopt(int(sys.argv[1]))
    messages: list[Message] = []
    while not messages and not launcher.closed:
        messages = launcher.receive()
    if not messages:
        return
    start = Start.from_json(messages[0])
    outcome, launcher_gone = _run(launcher, start)
    if outcome is not None:
        launcher.send(outcome)
    if launcher_gone:
        shutil.rmtree(start.directory, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)  # what train_fn itself started belongs to this process group too; otherwise the launcher does this


def _run(launcher: Channel, start: Start) -> tuple[Message | None, bool]:
    try:
        agent = Agent(launcher, start)
        try:
            agent.run()
        finally:
            agent.close()
    except Exception:  # the process boundary: a bug here must not look like a lost process
        return failed(JobFailed, f"the agent failed:\n{traceback.format_exc()}"), launcher.closed
    return agent.outcome, agent.launcher_gone

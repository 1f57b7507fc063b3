"""The workers of one host for `control_plane.py`: one process without torch that plays them all, each over a channel of its own.

It speaks the protocol of the fork server and of workers (`elastic/agent/forkserver.py`, `elastic/worker/main.py`), and keeps each worker's
activity record. It moves no state. It sends inventories as large as those of real workers, and reads every order; of proposals and views
only the head, unless the host *checks*: then its first worker decodes the proposal and checks it as a real worker does, before it votes.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from control_model import Shape, inventories

from elastic.host.channel import Channel, Message, close_all
from elastic.host.packed import Packed
from elastic.observe.activity import Activity
from elastic.recovery.gate import check_proposal
from elastic.recovery.inventory import Inventory
from elastic.recovery.proposal import Proposal
from elastic.view import View

_TICK_S = 0.25
_STATES = {"exp_avg": "same", "exp_avg_sq": "same"}


@dataclass(slots=True, kw_only=True)
class PlayedWorker:
    """One worker: what a real one keeps of its job, without state."""

    number: int
    channel: Channel
    activity: Activity
    epoch: int = 0
    step: int = 0
    inventory: Packed = field(default_factory=lambda: Packed({}))
    told: bool = True  # whether the epoch's first committed step was reported


@dataclass(slots=True, kw_only=True)
class HostWorkers:
    """All workers of the host `name`. `reports` takes datagrams for the benchmark, `inbox` brings its own."""

    name: str
    folder: Path
    shape: Shape
    reports: Path
    inbox: socket.socket
    checks: bool
    step_s: float
    workers: dict[int, PlayedWorker] = field(default_factory=dict)
    view: View | None = None
    _forks: Channel | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _arrived: dict[int, dict[int, float]] = field(default_factory=dict)
    _known: Packed | None = None
    _stop_at: float = 0.0

    def run(self, agent: socket.socket) -> None:
        """Waits for the agent to begin with workers, serves it, and returns when it is gone."""
        _, fds, _, _ = socket.recv_fds(agent, 1, 1)
        if not fds:
            return
        agent.close()
        self._forks = Channel.adopt(fds[0])
        self._forks.sock.setblocking(False)
        self._forks.send({"type": "ready"})
        self._selector.register(self._forks, selectors.EVENT_READ, self._hear_agent)
        self._selector.register(self.inbox, selectors.EVENT_READ, self._hear_benchmark)
        tick = time.monotonic() + _TICK_S
        while not self._forks.closed:
            for key, events in self._selector.select(max(0.0, tick - time.monotonic())):
                self._hear(key.data) if isinstance(key.data, PlayedWorker) else key.data()
                del events
            if time.monotonic() >= tick:
                tick = time.monotonic() + _TICK_S
                self._tick()

    # The fork server

    def _hear_agent(self) -> None:
        assert self._forks is not None
        for message in self._forks.receive():
            if message["type"] == "fork":
                self._fork(message)
            elif message["type"] == "check":  # of the processor: all hosts are this machine
                answer = Channel.adopt(message["fds"][0])
                answer.send({"product": "0" * 64, "seconds": 0.01, "fingerprint": self.shape.fingerprint})
                answer.close()
            else:
                close_all(message["fds"])

    def _fork(self, message: Message) -> None:
        assert self._forks is not None
        sock, *segment = message["fds"]
        close_all(segment)
        number = message["worker"]
        channel = Channel.adopt(sock)
        channel.sock.setblocking(False)
        worker = PlayedWorker(number=number, channel=channel, activity=Activity(message["spec"]["directory"], number))
        self.workers[number] = worker
        pidfd = os.pidfd_open(os.getpid())
        self._forks.send({"type": "forked", "worker": number, "pid": os.getpid()}, [pidfd])
        os.close(pidfd)
        self._selector.register(channel, selectors.EVENT_READ, worker)
        self._send(worker, {"type": "announce", "ready": self.shape.ready(number, first=message["spec"]["first"])})

    # The benchmark

    def _hear_benchmark(self) -> None:
        """Hears which workers are lost: those of the same stages, which would have links to them, report that the links are broken."""
        lost = json.loads(self.inbox.recv(1 << 16))["lost"]
        if self.view is None:
            return
        stages = {number for number, stage in enumerate(self.view.plan.stages) if set(lost) & set(stage.members)}
        for worker in self.workers.values():
            if worker.number in self.view.workers and self.view.plan.stage_of(worker.number) in stages:
                where = {"epoch": worker.epoch, "step": worker.step, "phase": "PeerLost", "at": time.monotonic(), "damaged": False}
                reason = f"worker {lost[0]} closed its link"
                self._send(worker, {"type": "lost", "peer": lost[0], "reason": reason, **where, "gone": True, "findings": []})

    def _report(self, what: dict[str, Any]) -> None:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(json.dumps({"host": self.name, **what}).encode(), str(self.reports))

    # The workers

    def _hear(self, worker: PlayedWorker) -> None:
        worker.channel.flush()
        for order in worker.channel.receive():
            close_all(order["fds"])
            handler = {"view": self._switch, "quiesce": self._quiesce, "propose": self._vote}.get(order["type"])
            if handler is not None:
                handler(worker, order)
        if worker.channel.closed:
            self._selector.unregister(worker.channel)
            worker.channel.close()
            del self.workers[worker.number]
        else:
            self._watch(worker)

    def _send(self, worker: PlayedWorker, message: Message) -> None:
        worker.channel.send(message)
        self._watch(worker)

    def _watch(self, worker: PlayedWorker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.unsent else 0)
        if self._selector.get_key(worker.channel).events != events:
            self._selector.modify(worker.channel, events, worker)

    def _quiesce(self, worker: PlayedWorker, order: Message) -> None:
        worker.activity.enter("quiesce", -1, worker.epoch)
        self._send(worker, {"type": "inventory", "epoch": order["epoch"], "attempt": order["attempt"], "inventory": worker.inventory})
        worker.activity.enter("propose", -1, worker.epoch)

    def _vote(self, worker: PlayedWorker, order: Message) -> None:
        worker.activity.enter("migrate", worker.step, worker.epoch)
        installed = time.monotonic()
        refusal = None
        if self.checks and worker.number == min(self.workers):
            check_proposal(Proposal.from_json(order["proposal"].value), self.view, Inventory.from_json(worker.inventory.value))
            self._report({"checked_s": time.monotonic() - installed})
        times = {"installed": installed, "moved": time.monotonic(), "checked": time.monotonic()}
        figures = {"received_bytes": 0, "copied_bytes": 0, "links": {"kept": 0, "dropped": 0, "made": 0}, "times": times}
        head = {"type": "vote", "epoch": order["epoch"], "attempt": order["attempt"], "refusal": refusal, "failed_peer": None}
        self._send(worker, {**head, **figures})
        worker.activity.enter("commit", worker.step, worker.epoch)

    def _switch(self, worker: PlayedWorker, order: Message) -> None:
        arrived = self._arrived.setdefault(order["epoch"], {})
        arrived[worker.number] = time.monotonic()
        worker.epoch, worker.step, worker.told = order["epoch"], worker.step + 1, order["epoch"] == 1
        self._known = order["view"]
        worker.activity.enter("forward", worker.step, worker.epoch, 0)
        if worker.epoch > 1:
            at = arrived[worker.number]
            self._send(worker, {"type": "resumed", "epoch": order["epoch"], "attempt": order["attempt"], "at": at})
        if len(arrived) == len(self.workers):
            self._report({"epoch": order["epoch"], "at": max(arrived.values()), "workers": len(arrived)})
            self._stop_at = time.monotonic() + 4 * _TICK_S

    # Steps

    def _tick(self) -> None:
        """Lets time pass for all workers: phases change, and steps are reported as often as real workers report them."""
        now = time.monotonic()
        if self._known is not None and now >= self._stop_at:
            self._learn(self._known.value)
            self._known = None
        if self.view is None:
            return
        for worker in self.workers.values():
            if worker.epoch != self.view.epoch:
                continue
            step = int(now / self.step_s)
            worker.activity.enter("backward" if worker.step == step else "forward", step, worker.epoch, 0)
            if worker.step != step:
                worker.step = step
                self._progress(worker, now)

    def _progress(self, worker: PlayedWorker, now: float) -> None:
        if not worker.told:
            worker.told = True
            self._send(worker, {"type": "committed", "epoch": worker.epoch, "step": worker.step - 1, "at": now, "taken_over_s": 0.0})
        computed = 0.5 * now
        effort, times = [computed, computed, computed, 0.001], {"step_s": self.step_s, "committed_at": now}
        self._send(worker, {"type": "progress", "epoch": worker.epoch, "step": worker.step, **times, "effort": effort, "links": []})

    def _learn(self, data: dict[str, Any]) -> None:
        """Makes the inventories that these workers would send in this view."""
        self.view = view = View.from_json(data)
        for number, found in inventories(view, [*self.workers], self.shape, _STATES).items():
            self.workers[number].inventory = Packed(found.to_json(), compressed=False)
        self._report({"learnt": view.epoch})

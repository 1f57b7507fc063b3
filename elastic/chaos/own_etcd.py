"""An etcd of the harness, outside the job: it can be killed, started again, and made to say that it has no space."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from elastic.chaos.spawning import spawned
from elastic.errors import EtcdUnavailable
from elastic.membership.server import find_etcd
from elastic.settings import etcd_environment

_SERVING_S, _CALL_S = 30.0, 3.0


class OwnEtcd:
    """One etcd that listens at `address`. It dies with this process. Raises EtcdUnavailable if it does not serve."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder, self.address = folder, address
        self.port, self._peer = _free_ports(address)
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        self.start()

    @property
    def endpoint(self) -> str:
        """Its address as `etcd=` takes it."""
        return f"{self.address}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Its process; None while it is down."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> None:
        """Starts it on its data, and waits until it serves."""
        client, peer = f"http://{self.endpoint}", f"http://{self.address}:{self._peer}"
        flags = {
            "data-dir": "data",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "heartbeat-interval": "20",
            "election-timeout": "200",
            "unsafe-no-fsync": "true",
            "log-level": "error",
        }
        command = [find_etcd(), *(f"--{name}={value}" for name, value in flags.items())]
        with (self.folder / "log").open("ab") as log:
            self._process = spawned(command, out=log, env=etcd_environment(), cwd=self.folder)
        deadline = time.monotonic() + _SERVING_S
        while not self.serves():
            if time.monotonic() > deadline or self._process.poll() is not None:
                log = (self.folder / "log").read_text(errors="replace")[-500:]
                raise EtcdUnavailable(f"the harness's etcd at {self.endpoint} does not serve; its log ends with: {log}")
            time.sleep(0.05)

    def serves(self) -> bool:
        """Whether it answers a read."""
        try:
            self.call("kv/range", key=_coded("health"))
        except OSError:
            return False
        return True

    def writes(self) -> bool:
        """Whether it takes a write."""
        try:
            self.call("kv/put", key=_coded("chaos"), value=_coded(""))
            self.call("kv/deleterange", key=_coded("chaos"))
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Ends it at once; its data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def alarm(self, *, full: bool) -> None:
        """Raises the alarm of an etcd without space, or disarms it. Raises OSError."""
        member = self.call("maintenance/status")["header"]["member_id"]
        self.call("maintenance/alarm", action="ACTIVATE" if full else "DEACTIVATE", memberID=member, alarm="NOSPACE")

    def keys(self, prefix: str) -> list[str]:
        """The keys under a prefix. Raises OSError."""
        found = self.call("kv/range", key=_coded(prefix), range_end=_end(prefix), keys_only=True)
        return [_decoded(each["key"]) for each in found.get("kvs", ())]

    def history(self, prefix: str) -> list[tuple[str, str | None]]:
        """All writes under a prefix since the beginning: key and value, None for a deletion. Raises OSError."""
        revision = int(self.call("kv/range", key=_coded("health"))["header"]["revision"])
        request = {"create_request": {"key": _coded(prefix), "range_end": _end(prefix), "start_revision": 1, "progress_notify": True}}
        return [*self._watched(json.dumps(request).encode(), revision)] if revision > 1 else []

    def _watched(self, request: bytes, revision: int) -> Iterator[tuple[str, str | None]]:
        """Reads a watch of the past: it stays open behind the last event, so reading ends when nothing comes for a while."""
        with closing(urllib.request.urlopen(f"http://{self.endpoint}/v3/watch", request, timeout=1.0)) as stream:
            while True:
                try:
                    line = stream.readline()
                except TimeoutError:
                    return
                result = json.loads(line or b"{}").get("result")
                if result is None:
                    return
                for event in result.get("events", ()):
                    pair = event["kv"]
                    deleted = event.get("type") == "DELETE"
                    yield _decoded(pair["key"]), None if deleted else _decoded(pair.get("value", ""))
                    if int(pair["mod_revision"]) >= revision:
                        return

    def call(self, path: str, **values: Any) -> dict[str, Any]:
        """Calls a function of etcd's HTTP gateway. Raises OSError."""
        request = urllib.request.Request(f"http://{self.endpoint}/v3/{path}", json.dumps(values).encode())
        with closing(urllib.request.urlopen(request, timeout=_CALL_S)) as answer:
            return json.loads(answer.read())


def _free_ports(address: str) -> tuple[int, int]:
    with socket.create_server((address, 0)) as one, socket.create_server((address, 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")


def _end(prefix: str) -> str:
    return _coded(prefix[:-1] + chr(ord(prefix[-1]) + 1))

"""A real etcd of one or several members on loopback ports, with TLS where that is wanted; members can be ended, stopped and started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elastic.errors import EtcdUnavailable
from elastic.host.process import tied_command
from elastic.membership.server import find_etcd
from elastic.settings import etcd_environment
from tests.etcd_access import EtcdClient, EtcdEndpoint

_SERVING_S = 30.0


@dataclass(frozen=True)
class Certificates:
    """An authority in `folder`, with certificates that it has signed: `<name>.pem` with the key `<name>.key`."""

    folder: Path

    @classmethod
    def made(cls, folder: Path, name: str = "ca") -> Certificates:
        """Makes an authority; skips the test without the openssl command."""
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command")
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder)
        made._openssl("req", "-x509", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2", *_NEW)
        return made

    def sign(self, name: str, *names: str) -> None:
        """Makes a certificate for these names of a server (`DNS:...`, `IP:...`), or for a client."""
        extensions = self.folder / f"{name}.ext"
        extensions.write_text("extendedKeyUsage=serverAuth,clientAuth\n" + (f"subjectAltName={','.join(names)}\n" if names else ""))
        self._openssl("req", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}", *_NEW)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", str(extensions))
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


_NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass
class Cluster:
    """The members; `ports` are those for clients, at `host`."""

    folder: Path
    ports: list[int]
    peers: list[int]
    flags: dict[str, str]
    scheme: str = "http"
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def addresses(self) -> str:
        """All addresses, as `etcd=` takes them."""
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def start(self, *members: int, empty: bool = False) -> None:
        """Starts these members, by default all, on their data."""
        for member in members or range(len(self.ports)):
            if empty:
                shutil.rmtree(self.folder / str(member), ignore_errors=True)
            (self.folder / str(member)).mkdir(parents=True, exist_ok=True)
            peer = f"http://127.0.0.1:{self.peers[member]}"
            client = f"{self.scheme}://127.0.0.1:{self.ports[member]}"
            flags = {
                "name": f"m{member}",
                "data-dir": "data",
                "listen-client-urls": client,
                "advertise-client-urls": client,
                "listen-peer-urls": peer,
                "initial-advertise-peer-urls": peer,
                "initial-cluster": ",".join(f"m{at}=http://127.0.0.1:{port}" for at, port in enumerate(self.peers)),
                "unsafe-no-fsync": "true",
                "enable-grpc-gateway": "false",
                "logger": "zap",
                **self.flags,
            }
            with (self.folder / f"{member}.log").open("ab") as log:
                self.processes[member] = subprocess.Popen(
                    tied_command([find_etcd(), *(f"--{name}={value}" for name, value in flags.items())]),
                    cwd=self.folder / str(member),
                    env=etcd_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def keep(self) -> None:
        """Stops all members for a moment, and keeps a copy of their data."""
        self.kill()
        for member in range(len(self.ports)):
            shutil.copytree(self.folder / str(member), self.folder / f"{member}-kept")
        self.start()
        self.wait()

    def start_from_kept(self) -> None:
        """Starts all members on the data that was kept."""
        for member in range(len(self.ports)):
            shutil.rmtree(self.folder / str(member))
            shutil.copytree(self.folder / f"{member}-kept", self.folder / str(member))
        self.start()

    def kill(self, *members: int) -> None:
        """Kills these members, by default all."""
        for member in members or list(self.processes):
            process = self.processes.pop(member)
            process.kill()
            process.wait()

    def signal(self, number: signal.Signals, *members: int) -> None:
        for member in members or list(self.processes):
            os.kill(self.processes[member].pid, number)

    def wait(self, endpoint: EtcdEndpoint | None = None) -> None:
        """Waits until it answers."""
        deadline = time.monotonic() + _SERVING_S
        while True:
            with suppress(EtcdUnavailable):
                EtcdClient(endpoint or EtcdEndpoint.parse(self.addresses), timeout_s=2.0).close()
                return
            assert time.monotonic() < deadline, (self.folder / "0.log").read_text()[-2000:]
            time.sleep(0.1)


@contextmanager
def cluster(folder: Path, members: int = 1, *, certificates: Certificates | None = None, **flags: str) -> Iterator[Cluster]:
    """A cluster that serves; with `certificates`, by TLS with `server.pem`. In `flags`, `_` stands for `-`."""
    tls = {}
    if certificates is not None:
        tls = {"cert-file": certificates.path("server.pem"), "key-file": certificates.path("server.key")}
    with _free_ports(2 * members) as ports:
        pass
    made = Cluster(
        folder,
        ports[:members],
        ports[members:],
        {**tls, **{name.replace("_", "-"): value for name, value in flags.items()}},
        "http" if certificates is None else "https",
    )
    try:
        made.start()
        if certificates is None:
            made.wait()
        yield made
    finally:
        made.kill()


@contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Ports that are free as long as nobody takes them."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    yield [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()

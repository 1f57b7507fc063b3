"""An etcd of three members that is reached by TLS with a client certificate, and by a user with a password."""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastic.host.process import tied_command
from elastic.membership.server import find_etcd

_MEMBERS, _SERVING_S = 3, 30.0
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Etcd:
    """Its members' client ports at `address`; certificates and the password lie in `folder`."""

    address: str
    ports: Sequence[int]
    folder: Path

    def options(self, ports: Sequence[int] | None = None) -> list[str]:
        """Returns the options of `elastic` for this etcd; with `ports`, those at which a host reaches it."""
        members = ",".join(f"{self.address}:{port}" for port in ports or self.ports)
        files = {"ca": "ca.pem", "cert": "client.pem", "key": "client.key", "password-file": "password"}
        flags = [text for name, file in files.items() for text in (f"--etcd-{name}", str(self.folder / file))]
        return ["--etcd", f"root@{members}", *flags]

    def call(self, path: str, **values: str) -> None:
        """Calls a function of etcd's HTTP gateway, before a login is needed. Raises OSError."""
        context = ssl.create_default_context(cafile=self.folder / "ca.pem")
        context.load_cert_chain(self.folder / "client.pem", self.folder / "client.key")
        url = f"https://{self.address}:{self.ports[0]}/v3/{path}"
        urllib.request.urlopen(url, json.dumps(values).encode(), timeout=5.0, context=context).close()


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _certificates(folder: Path, address: str) -> None:
    """Makes an authority, and certificates of a server at this address and of a client."""
    _openssl(folder, "req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=example", "-days", "2", *_NEW_KEY)
    (folder / "names").write_text(f"extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=IP:{address}\n")
    for name in ("server", "client"):
        _openssl(folder, "req", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}", *_NEW_KEY)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)


def _free_ports(address: str, count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server((address, 0))).getsockname()[1] for _ in range(count)]


def _start(etcd: Etcd, peers: Sequence[int], member: int) -> subprocess.Popen[bytes]:
    client, peer = f"https://{etcd.address}:{etcd.ports[member]}", f"https://{etcd.address}:{peers[member]}"
    files = {"cert-file": "server.pem", "key-file": "server.key", "trusted-ca-file": "ca.pem"}
    tls = {f"{prefix}{name}": str(etcd.folder / file) for prefix in ("", "peer-") for name, file in files.items()}
    flags = {
        "name": f"m{member}",
        "data-dir": str(etcd.folder / f"m{member}"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": ",".join(f"m{at}=https://{etcd.address}:{port}" for at, port in enumerate(peers)),
        "client-cert-auth": "true",
        "peer-client-cert-auth": "true",
        "unsafe-no-fsync": "true",
        "log-level": "error",
        **tls,
    }
    command = tied_command([find_etcd(), *(f"--{name}={value}" for name, value in flags.items())])
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _want_login(etcd: Etcd) -> None:
    """Waits until etcd serves, and makes it want the password."""
    deadline = time.monotonic() + _SERVING_S
    while True:
        try:
            etcd.call("auth/role/add", name="root")
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"etcd does not serve after {_SERVING_S:g} s: {error}") from error
            time.sleep(0.1)
    etcd.call("auth/user/add", name="root", password=(etcd.folder / "password").read_text())
    etcd.call("auth/user/grant", user="root", role="root")
    etcd.call("auth/enable")


@contextmanager
def etcd_of_three(address: str, folder: Path) -> Iterator[Etcd]:
    """Runs three members at an address, and yields the etcd when it wants a login."""
    folder.mkdir()
    _certificates(folder, address)
    (folder / "password").touch(0o600)
    (folder / "password").write_text(secrets.token_hex(16))
    ports = _free_ports(address, 2 * _MEMBERS)
    etcd, peers = Etcd(address, ports[:_MEMBERS], folder), ports[_MEMBERS:]
    members = [_start(etcd, peers, member) for member in range(_MEMBERS)]
    try:
        _want_login(etcd)
        yield etcd
    finally:
        for member in members:
            member.kill()
            member.wait()

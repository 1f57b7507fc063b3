"""Hosts in network namespaces: each has an address of its own, and its cable can be cut, so that nothing says it is gone. Needs root."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from elastic.membership.server import find_etcd

_CONNECT = """import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
except ConnectionRefusedError:
    pass
print(time.monotonic() - began)
"""


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@dataclass
class Network:
    """A bridge with one namespace per host; `gateway` is the address of this machine."""

    name: str
    hosts: int
    subnet: str

    @property
    def gateway(self) -> str:
        return f"{self.subnet}.254"

    def command(self, host: int) -> list[str]:
        """Returns the words before a command that runs on this host."""
        return ["ip", "netns", "exec", f"{self.name}{host}"]

    def environment(self, host: int) -> dict[str, str]:
        """Returns more variables for this host's processes: none."""
        return {}

    def options(self, host: int) -> list[str]:
        """Returns more options for this host's agent: none."""
        return []

    def etcd_ports(self, host: int, ports: Sequence[int]) -> Sequence[int]:
        """Returns the ports at which a host reaches these ports of the gateway."""
        return ports

    def cut(self, host: int) -> None:
        """Cuts a host's cable."""
        _ip("link", "set", f"{self.name}v{host}", "down")

    def heal(self, host: int) -> None:
        """Undoes `cut`."""
        _ip("link", "set", f"{self.name}v{host}", "up")

    def delay(self, host: int, milliseconds: float) -> None:
        """Makes all that a host sends arrive later, in order; 0 undoes it. Raises CalledProcessError where the kernel has no netem."""
        device = ["dev", "eth0", "root"]
        words = ["qdisc", "replace", *device, "netem", "delay", f"{milliseconds:g}ms"] if milliseconds else ["qdisc", "del", *device]
        subprocess.run([*self.command(host), "tc", *words], check=True, capture_output=True)

    def reached_s(self, host: int, port: int, limit_s: float = 1.0) -> float | None:
        """The seconds in which a host reaches a port of the gateway by TCP, None if it does not within `limit_s`."""
        command = [*self.command(host), sys.executable, "-S", "-E", "-c", _CONNECT, self.gateway, str(port), str(limit_s)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        return float(ended.stdout) if ended.returncode == 0 else None

    def mute(self, sender: int, receiver: int) -> None:
        """Makes all that one host sends to another one vanish, by sending it to a hardware address that nobody has."""
        to, nobody = f"{self.subnet}.{receiver + 1}", "02:00:00:00:00:fe"
        _ip("-n", f"{self.name}{sender}", "neigh", "replace", to, "lladdr", nobody, "dev", "eth0", "nud", "permanent")

    def make(self) -> None:
        """Makes bridge and namespaces. Raises OSError or CalledProcessError where that is not permitted."""
        _ip("link", "add", f"{self.name}br", "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", f"{self.name}br")
        _ip("link", "set", f"{self.name}br", "up")
        for host in range(self.hosts):
            space = f"{self.name}{host}"
            _ip("netns", "add", space)
            _ip("link", "add", f"{self.name}v{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", f"{self.name}v{host}", "master", f"{self.name}br")
            self.heal(host)
            _ip("-n", space, "addr", "add", f"{self.subnet}.{host + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")

    def remove(self) -> None:
        """Removes what `make` has made, also if it failed."""
        with suppress(FileNotFoundError):  # a machine without the program has nothing to be removed
            for host in range(self.hosts):
                _ip("netns", "del", f"{self.name}{host}", check=False)
                _ip("link", "del", f"{self.name}v{host}", check=False)
            _ip("link", "del", f"{self.name}br", check=False)


@contextmanager
def etcd_at(address: str, folder: Path, port: int = 2379) -> Iterator[str]:
    """Runs an etcd that listens at an address; yields its `host:port`."""
    client, peer = f"http://{address}:{port}", f"http://{address}:{port + 1}"
    command = [find_etcd(), "--data-dir", str(folder), "--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    process = subprocess.Popen([*command, "--log-level", "error"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        yield f"{address}:{port}"
    finally:
        process.kill()
        process.wait()

"""What a host needs to take part in a job with other hosts: the job's secret, and an address at which the others reach it."""

from __future__ import annotations

import hashlib
import socket
import stat
from pathlib import Path
from typing import Any

from elastic.agent.start import Sharing
from elastic.errors import SettingsError
from elastic.membership.endpoint import EtcdEndpoint

_SECRET_BYTES = 16  # at least


def sharing_of(etcd: str | None, secret: bytes | str, interface: str | None, least: int, given: dict[str, Any]) -> Sharing:
    """Returns how this host shares the job. `given` are the job's settings that must be the founder's. Raises SettingsError."""
    if etcd is None:
        raise SettingsError("secret=... is for a job of several hosts, which need an etcd that all of them reach: give etcd= too")
    if least < 1:
        raise SettingsError(f"hosts_min={least}: use a whole number of at least 1")
    value = secret.encode() if isinstance(secret, str) else secret
    if len(value) < _SECRET_BYTES:
        raise SettingsError(f"the job's secret has {len(value)} bytes: use at least {_SECRET_BYTES}, as of `openssl rand -hex 32`")
    key = hashlib.sha256(b"the secret of a job" + value).hexdigest()
    return Sharing(secret=key, interface=interface or reachable_from(etcd), least=least, given=given)


def read_secret(path: Path) -> bytes:
    """Returns the secret in a file. Raises SettingsError if it cannot be read, or if other users can read it too."""
    try:
        mode, value = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"secret_file={str(path)!r} cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"secret_file={str(path)!r} can be read by other users of this host: chmod 600 it")
    return value


def reachable_from(etcd: str) -> str:
    """Returns the IP address of this host on the way to etcd, at which other hosts that use it can probably reach it too."""
    endpoint = EtcdEndpoint.parse(etcd)
    if endpoint.path is not None:
        return "127.0.0.1"
    try:
        family, kind, _, _, target = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise SettingsError(
            f"no way from this host to etcd at {endpoint} ({error.strerror}): give interface= (--interface), this host's IP address"
        ) from error

"""What a host needs to take part in a job with other hosts: the job's secret, and an address at which the others reach it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.agent.start import Sharing
from elastic.comm.tls import Credentials, Tls
from elastic.errors import EtcdUnavailable, SettingsError
from elastic.host.private_file import read_private
from elastic.membership.endpoint import EtcdEndpoint
from elastic.settings import RACK, own_environment

_SECRET_BYTES = 16  # at least
_RACK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")


def sharing_of(
    etcd: str | None,
    files: Mapping[str, str],
    secret: bytes | str,
    interface: str | None,
    least: int,
    given: dict[str, Any],
    credentials: Credentials | None,
    *,
    tls: bool,
    rack: str | None = None,
) -> Sharing:
    """Returns how this host shares the job. `given` are the job's settings that must be the founder's.

    Raises SettingsError, or EtcdUnavailable if there is no way to etcd now.
    """
    if etcd is None:
        raise SettingsError("secret=... is for a job of several hosts, which need an etcd that all of them reach: give etcd= too")
    if least < 1:
        raise SettingsError(f"hosts_min={least}: use a whole number of at least 1")
    return Sharing(
        secret=key_of(secret),
        interface=interface_of(interface, EtcdEndpoint.parse(etcd, files)),
        least=least,
        given=given,
        rack=rack_of(rack),
        tls=tls or credentials is not None,
        credentials=None if credentials is None else credentials.to_json(),
    )


def rack_of(given: str | None) -> str | None:
    """Returns the rack of this host: the `given` one, else that of its environment, else None. Raises SettingsError for a bad name."""
    name, source = (given, "rack") if given is not None else (own_environment().get(RACK), f"the environment variable {RACK}")
    if name is None or (isinstance(name, str) and _RACK.fullmatch(name)):
        return name
    text = repr(name)
    raise SettingsError(
        f"{source}={text if len(text) < 80 else f'{text[:60]}... ({len(text) - 2} characters)'} is no name of a rack: use 1 to 64 letters, "
        "digits, dots, colons, slashes, dashes and underscores, beginning with a letter or digit, or leave it out"
    )


def read_credentials(
    cert: str | os.PathLike[str] | None, key: str | os.PathLike[str] | None, ca: str | os.PathLike[str] | None
) -> Credentials | None:
    """Returns the certificates in these files, None without any. Raises SettingsError if one is missing, cannot be read or does not fit."""
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise SettingsError("tls_cert=, tls_key= and tls_ca= need each other; tls=True alone makes certificates from the job's secret")
    texts = {"certificate": _text(cert, "tls_cert"), "authority": _text(ca, "tls_ca")}
    credentials = Credentials(**texts, key=read_private(Path(key), "tls_key").decode(errors="replace"))
    Tls(credentials)
    return credentials


def _text(path: str | os.PathLike[str], argument: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError as error:
        raise SettingsError(f"{argument}={str(path)!r} cannot be read: {error.strerror}") from error


def key_of(secret: bytes | str) -> str:
    """Returns the key that authenticates a job's links, hexadecimal. Raises SettingsError for a short secret."""
    value = secret.encode() if isinstance(secret, str) else secret
    if len(value) < _SECRET_BYTES:
        raise SettingsError(f"the job's secret has {len(value)} bytes: use at least {_SECRET_BYTES}, as of `openssl rand -hex 32`")
    return hashlib.sha256(b"the secret of a job" + value).hexdigest()


def read_secret(path: Path) -> bytes:
    """Returns the secret in a file. Raises SettingsError if it cannot be read, or if other users can read it too."""
    return read_private(path, "secret_file")


def interface_of(given: str | None, etcd: EtcdEndpoint) -> str:
    """Returns the IP address at which others reach this host: the `given` one, else that on the way to etcd.

    Raises SettingsError if this host does not have the given address, EtcdUnavailable if there is no way to etcd now.
    """
    if given is None:
        return reachable_from(etcd)
    what = f"interface={given!r} (--interface)"
    try:
        address = ipaddress.ip_address(given)
    except ValueError as error:
        raise SettingsError(f"{what} is no IP address: give that of the network device at which other hosts reach this one") from error
    if address.is_unspecified:
        raise SettingsError(f"{what} is no address at which others can reach this host: give that of one of its network devices")
    try:
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((given, 0))
    except OSError as error:
        why = f"this host has no network device with this address ({error.strerror}); `ip address` shows those it has"
        raise SettingsError(f"{what}: {why}") from error
    return given


def reachable_from(etcd: EtcdEndpoint) -> str:
    """Returns the IP address of this host on the way to etcd, at which other hosts that use it can probably reach it too.

    Raises EtcdUnavailable if there is no way to any of etcd's members now: its name may not be known yet, or the network not be up.
    """
    if etcd.path is not None:
        return "127.0.0.1"
    last: OSError | None = None
    for host, port in etcd.places:
        try:
            family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
        except OSError as error:
            last = error
    why = "no address" if last is None else last.strerror
    advice = "check the address of etcd and the network of this host, or give interface= (--interface), this host's IP address"
    raise EtcdUnavailable(f"there is no way from this host to etcd at {etcd} ({why}): {advice}") from last

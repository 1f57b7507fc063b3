"""The addresses of an etcd, with its login and the files for TLS."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from elastic.errors import EtcdUnavailable, SettingsError
from elastic.host.private_file import read_private

_LOGIN = r"(?:(?!unix:/)(?:(?P<user>[^:]+):(?P<password>.+?)|(?P<name>[^:]+))@)?"
_ADDRESS = r"(?:\[[^\]@/\s]+\]|[^@:,/\[\]\s]+):[0-9]+"
_TEXT = re.compile(rf"{_LOGIN}(?P<addresses>unix:/.+|{_ADDRESS}(?:,{_ADDRESS})*)", re.DOTALL)
_UNIX = "unix:"


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdEndpoint:
    """The addresses of etcd's members, each `host:port` (an IPv6 address in brackets), or one `unix:/path` of a socket on this host.

    With `ca`, the file of certificates that etcd's must be signed by, connections use TLS; `cert` and `key` are the files with this
    client's. The password of `user` is `password`, or in `password_file`, which is read again at each login.
    """

    addresses: tuple[str, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    private: bool = False

    @classmethod
    def parse(cls, text: str, files: Mapping[str, str] | None = None) -> EtcdEndpoint:
        """Parses `[user[:password]@]address[,address]...`. `files` are the fields of this class that name files. Raises SettingsError."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise SettingsError(
                "etcd=...: use 'host:port' or 'user:password@host:port', and 'host:port,host:port' for several members, without https:// "
                "(etcd_ca= asks for TLS); for a socket on this host, 'unix:/path' instead of 'host:port'"
            )
        addresses = found["addresses"]
        several = (addresses,) if addresses.startswith(_UNIX) else tuple(addresses.split(","))
        for address in several if not addresses.startswith(_UNIX) else ():
            if not 0 < int(address.rpartition(":")[2]) < 1 << 16:
                raise SettingsError(f"etcd=...: {address!r} has no port from 1 to 65535; etcd's own is 2379")
        made = cls(addresses=several, user=found["user"] or found["name"], password=found["password"])
        return replace(made, **(files or {})).checked()

    def checked(self) -> EtcdEndpoint:
        """Returns itself. Raises SettingsError if files are missing, cannot be read, or do not fit each other."""
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise SettingsError("etcd_cert= and etcd_key= need each other, and etcd_ca=")
        if self.password is not None and self.password_file is not None:
            raise SettingsError("the password of etcd is given twice: etcd='user@host:port' is enough with etcd_password_file=")
        if self.user is None and self.password_file is not None:
            raise SettingsError("etcd_password_file= needs the user's name: etcd='user@host:port'")
        if self.user is not None and self.password is None and self.password_file is None:
            raise SettingsError("etcd='user@host:port' needs etcd_password_file=, or 'user:password@host:port'")
        if self.password_file is not None:
            self.current_password()
        if self.ca is not None:
            _check_tls(self.ca, self.cert, self.key)
        return self

    def __str__(self) -> str:
        return ",".join(self.addresses)

    @property
    def path(self) -> str | None:
        """The path of its socket, None if it has none on this host."""
        return self.addresses[0].removeprefix(_UNIX) if self.addresses[0].startswith(_UNIX) else None

    @property
    def places(self) -> list[tuple[str, int]]:
        """Host (without brackets) and port of each member; nothing for a socket on this host."""
        split = [] if self.path is not None else [address.rpartition(":") for address in self.addresses]
        return [(host.strip("[]"), int(port)) for host, _, port in split]

    @property
    def title(self) -> str:
        """Its name in messages."""
        return "the private etcd" if self.private else f"etcd at {self}"

    def current_password(self) -> str:
        """Returns the user's password. Raises SettingsError if its file cannot be read."""
        if self.password_file is None:
            return self.password or ""
        return read_private(Path(self.password_file), "etcd_password_file").decode(errors="replace")

    def tls_files(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Returns the contents of `ca`, `key` and `cert`. Raises EtcdUnavailable if one cannot be read now."""
        try:
            ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert))
        except OSError as error:
            raise EtcdUnavailable(f"{error.filename}, which TLS to {self.title} needs, cannot be read: {error.strerror}") from error
        return ca, key, cert


def _check_tls(ca: str, cert: str | None, key: str | None) -> None:
    """Raises SettingsError, naming the file, if TLS cannot use the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise SettingsError(f"etcd_ca={ca!r} has no certificate in PEM form") from error
    except OSError as error:
        raise SettingsError(f"etcd_ca={ca!r} cannot be read: {error.strerror}") from error
    if cert is None or key is None:
        return
    try:
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        why = "are not a certificate and its own key, without a passphrase, in PEM form"
        raise SettingsError(f"etcd_cert={cert!r} and etcd_key={key!r} {why} ({error.reason})") from error
    except OSError as error:
        raise SettingsError(f"etcd_cert={cert!r} or etcd_key={key!r} cannot be read: {error.strerror}") from error

"""The address of an etcd, with the login it wants."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where etcd is: `[user:password@]host:port`."""

    host: str
    port: int
    user: str | None = None
    password: str | None = None

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Raises SettingsError."""
        login, _, address = text.rpartition("@")
        host, _, port = address.rpartition(":")
        user, _, password = login.partition(":")
        if not host or not port.isdigit() or (login and not (user and password)):
            raise SettingsError("etcd=...: use 'host:port' or 'user:password@host:port'")
        return cls(host=host, port=int(port), user=user or None, password=password or None)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

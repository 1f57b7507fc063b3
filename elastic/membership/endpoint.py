"""The address of an etcd, with its login."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from elastic.errors import SettingsError

_LOGIN = r"(?:(?!unix:/)(?P<user>[^:]+):(?P<password>.+?)@)?"
_TEXT = re.compile(rf"{_LOGIN}(?:unix:(?P<path>/.+)|(?P<host>[^@]+):(?P<port>[0-9]+))", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdEndpoint:
    """The address of etcd: `[user:password@]host:port`, or `[user:password@]unix:/path` of a socket on this host."""

    host: str = ""
    port: int = 0
    path: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    private: bool = False

    @classmethod
    def parse(cls, text: str) -> EtcdEndpoint:
        """Parses an address. Raises SettingsError."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise SettingsError(
                "etcd=...: use 'host:port' or 'user:password@host:port'; for a socket on this host, 'unix:/path' instead of 'host:port'"
            )
        return cls(
            host=found["host"] or "", port=int(found["port"] or 0), path=found["path"], user=found["user"], password=found["password"]
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.path is None else f"unix:{self.path}"

    @property
    def title(self) -> str:
        """Its name in messages."""
        return "the private etcd" if self.private else f"etcd at {self}"

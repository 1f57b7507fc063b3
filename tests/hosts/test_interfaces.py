"""Tests at which address a host is reached by others."""

from __future__ import annotations

import socket

import pytest

from elastic.errors import EtcdUnavailable, SettingsError
from elastic.launch import sharing
from elastic.launch.sharing import interface_of
from elastic.membership.endpoint import EtcdEndpoint

HERE = EtcdEndpoint.parse("127.0.0.1:2379")


def test_an_address_of_this_host_is_taken_and_by_default_that_towards_etcd() -> None:
    assert interface_of("127.0.0.2", HERE) == "127.0.0.2"
    assert interface_of(None, HERE) == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nonsense", "is no IP address"),
        ("localhost", "is no IP address"),
        ("", "is no IP address"),
        ("eth0", "is no IP address"),
        ("0.0.0.0", "is no address at which others can reach this host"),
        ("::", "is no address at which others can reach this host"),
        ("192.0.2.77", "this host has no network device with this address"),
    ],
)
def test_another_address_is_refused_before_anything_starts(given: str, why: str) -> None:
    with pytest.raises(SettingsError, match="--interface") as refused:
        interface_of(given, HERE)
    assert why in str(refused.value)


def test_a_name_of_etcd_that_is_not_known_yet_is_no_wrong_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may start the host again: the network may not be up, or etcd not be registered."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(sharing.socket, "getaddrinfo", unknown)
    with pytest.raises(
        EtcdUnavailable, match=r"no way from this host to etcd at etcd\.example:2379 \(Name or service not known\)"
    ) as refused:
        interface_of(None, EtcdEndpoint.parse("etcd.example:2379"))
    assert refused.value.exit_code == 75

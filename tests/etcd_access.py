"""The etcd client for tests. It needs a variable that is set before the first import of protobuf; otherwise only agents set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    from elastic.membership.channels import Channels, etcdrpc
    from elastic.membership.claim import Claim
    from elastic.membership.etcd import Compare, EtcdClient, KeyValue
    from elastic.membership.session import Notices, Session, Standing
    from elastic.membership.views import mark

from elastic.membership import server
from elastic.membership.endpoint import EtcdEndpoint
from elastic.membership.server import PrivateEtcd

__all__ = [
    "Channels",
    "Claim",
    "Compare",
    "EtcdClient",
    "EtcdEndpoint",
    "KeyValue",
    "Notices",
    "Session",
    "Standing",
    "change_password",
    "enable_auth",
    "etcd_with",
    "etcd_with_login",
    "etcdrpc",
    "mark",
]


@contextmanager
def etcd_with(directory: Path, **flags: str) -> Iterator[PrivateEtcd]:
    """A real etcd that was started with other flags, where `_` stands for `-`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in flags.items():
            patch.setitem(server._FLAGS, name.replace("_", "-"), value)
        etcd = PrivateEtcd(directory)
    try:
        etcd.endpoint()
        yield etcd
    finally:
        etcd.stop()


@contextmanager
def etcd_with_login(directory: Path) -> Iterator[str]:
    """A real etcd that requires a login: root with password `right`."""
    etcd = PrivateEtcd(directory)
    try:
        enable_auth(etcd.endpoint())
        yield str(etcd.endpoint())
    finally:
        etcd.stop()


def change_password(endpoint: EtcdEndpoint, password: str) -> None:
    """Changes root's password, which is the one in `endpoint` before."""
    client = EtcdClient(endpoint)
    request = etcdrpc.AuthUserChangePasswordRequest(name="root", password=password)
    client._channels.current.auth.UserChangePassword(request, metadata=client._metadata)
    client.close()


def enable_auth(endpoint: EtcdEndpoint, password: str = "right") -> None:
    """Makes an etcd want a login: root with this password."""
    client = EtcdClient(endpoint)
    auth = client._channels.current.auth
    auth.RoleAdd(etcdrpc.AuthRoleAddRequest(name="root"))
    auth.UserAdd(etcdrpc.AuthUserAddRequest(name="root", password=password))
    auth.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user="root", role="root"))
    auth.AuthEnable(etcdrpc.AuthEnableRequest())
    client.close()

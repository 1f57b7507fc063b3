"""The etcd client, for tests: it wants a variable set before protobuf is first imported, which only agents have otherwise."""

from __future__ import annotations

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    from elastic.membership.etcd import Compare, Entry, EtcdClient, etcdrpc

from elastic.membership.endpoint import Endpoint

__all__ = ["Compare", "Endpoint", "Entry", "EtcdClient", "enable_auth"]


def enable_auth(endpoint: Endpoint) -> None:
    """Makes an etcd want a login: root with password `right`."""
    client = EtcdClient(endpoint)
    auth = etcdrpc.AuthStub(client._client.channel)
    auth.RoleAdd(etcdrpc.AuthRoleAddRequest(name="root"))
    auth.UserAdd(etcdrpc.AuthUserAddRequest(name="root", password="right"))
    auth.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user="root", role="root"))
    auth.AuthEnable(etcdrpc.AuthEnableRequest())
    client.close()

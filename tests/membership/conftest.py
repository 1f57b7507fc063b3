"""A real etcd for these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.membership.server import PrivateEtcd
from tests.etcd_access import EtcdClient, EtcdEndpoint


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdEndpoint]:
    server = PrivateEtcd(Path(tmp_path_factory.mktemp("etcd")))
    yield server.endpoint()
    server.stop()


@pytest.fixture
def client(endpoint: EtcdEndpoint) -> Iterator[EtcdClient]:
    connected = EtcdClient(endpoint)
    yield connected
    connected.delete_prefix("/")
    connected.close()

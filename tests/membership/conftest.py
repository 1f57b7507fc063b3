"""A real etcd for the tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.membership.server import PrivateEtcd
from tests.etcd_access import Endpoint, EtcdClient


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    server = PrivateEtcd(Path(tmp_path_factory.mktemp("etcd")))
    yield server.endpoint()
    server.stop()


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[EtcdClient]:
    connected = EtcdClient(endpoint)
    yield connected
    connected.delete_prefix("/")
    connected.close()

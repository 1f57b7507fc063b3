"""An etcd at a port, and handlers of nodes as torchrun makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

from elastic.torchrun import etcd_v3
from tests.etcd_access import EtcdClient, EtcdEndpoint
from tests.etcd_cluster import Cluster, cluster

Node = Callable[..., RendezvousHandler]


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(Path(tmp_path_factory.mktemp("etcd"))) as made:
        yield made


@pytest.fixture
def client(etcd: Cluster) -> Iterator[EtcdClient]:
    connected = EtcdClient(EtcdEndpoint.parse(etcd.addresses))
    yield connected
    connected.delete_prefix("/")
    connected.close()


@pytest.fixture
def node(etcd: Cluster) -> Node:
    """Makes a node of one rendezvous."""
    run = uuid4().hex

    def made(nodes: tuple[int, int] = (2, 2), **config: object) -> RendezvousHandler:
        settings = {"join_timeout": "60", "last_call_timeout": "1", **config}
        return etcd_v3()(RendezvousParameters("etcd-v3", etcd.addresses, run, *nodes, local_addr="127.0.0.1", **settings))

    return made

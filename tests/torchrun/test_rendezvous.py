"""Nodes that meet through etcd, by torch's own rules: ranks, rounds, late nodes, timeouts, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)

from elastic.torchrun import etcd_v3
from tests.torchrun.conftest import Node

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

PROJECT = Path(__file__).parents[2] / "pyproject.toml"

pytestmark = pytest.mark.slow


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that wait for each other."""
    results: list[Any] = [None] * len(calls)

    def run(at: int) -> None:
        results[at] = calls[at]()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return results


def until(found: Callable[[], bool]) -> None:
    """Asks until it is so; the test's timeout limits this. torch looks for news once a second."""
    pause = threading.Event()
    while not found():
        pause.wait(0.05)


def met(*handlers: RendezvousHandler) -> list[RendezvousInfo]:
    return together(*(each.next_rendezvous for each in handlers))


def test_nodes_get_ranks_and_a_store_in_common(node: Node) -> None:
    nodes = [node(), node()]
    infos = met(*nodes)
    assert sorted(info.rank for info in infos) == [0, 1]
    assert [info.world_size for info in infos] == [2, 2]
    infos[0].store.set("said", "by one")
    assert infos[1].store.get("said") == b"by one"
    addresses = {(info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in infos}
    assert len(addresses) == 1
    assert not any(each.is_closed() for each in nodes)
    assert all(each.get_backend() == "etcd-v3" for each in nodes)
    assert nodes[0].shutdown()
    until(nodes[1].is_closed)


@pytest.mark.long
def test_all_meet_again_in_a_new_round_with_another_store(node: Node) -> None:
    nodes = [node(), node()]
    first = met(*nodes)
    first[0].store.set("of", "the first round")
    second = met(*nodes)
    assert sorted(info.rank for info in second) == [0, 1]
    assert not second[1].store.check(["of"])
    nodes[0].shutdown()


@pytest.mark.long
def test_a_late_node_is_seen_and_taken_along(node: Node) -> None:
    nodes = [node((1, 3)), node((1, 3))]
    met(*nodes)
    late = node((1, 3))
    joined = threading.Thread(target=late.next_rendezvous)
    joined.start()
    until(lambda: nodes[0].num_nodes_waiting() > 0)
    infos = met(*nodes)
    joined.join()
    assert [info.world_size for info in infos] == [3, 3]
    nodes[0].shutdown()


@pytest.mark.long
def test_nodes_hear_of_a_new_rank_0(node: Node) -> None:
    """torch's own handler leaves them the address of the one before."""
    nodes = [node((1, 3), keep_alive_interval="1", keep_alive_max_attempt="2") for _ in range(3)]
    before = met(*nodes)
    lost = next(at for at, info in enumerate(before) if info.rank == 0)
    nodes[lost]._handler._stop_heartbeats()  # as a node does that is gone
    rest = [each for at, each in enumerate(nodes) if at != lost]
    after = met(*rest)  # which waits until the node that is not heard counts as gone
    assert [info.world_size for info in after] == [2, 2]
    ports = {info.bootstrap_store_info.master_port for info in after}
    assert len(ports) == 1
    assert ports != {before[lost].bootstrap_store_info.master_port}
    rest[0].shutdown()


def test_a_node_alone_gives_up_in_time(node: Node) -> None:
    alone = node(join_timeout="1")
    with pytest.raises(RendezvousTimeoutError):
        alone.next_rendezvous()


def test_nobody_meets_after_the_end(node: Node) -> None:
    first, second = node(), node()
    first.set_closed()
    with pytest.raises(RendezvousClosedError):
        second.next_rendezvous()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"endpoint": ""}, "--rdzv-endpoint is missing"),
        ({"endpoint": "https://etcd:2379"}, "--rdzv-endpoint=https://etcd:2379: etcd=.*use 'host:port'"),
        ({"run_id": ""}, "--rdzv-id is missing"),
        ({"ttl": "0"}, "ttl=0: give a number of seconds above 0"),
        ({"read_timeout": "soon"}, "read_timeout"),
        ({"cert": "/nowhere/cert.pem"}, "etcd_cert= and etcd_key= need each other"),
    ],
)
def test_a_wrong_option_is_named(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"endpoint": "127.0.0.1:1", "run_id": "run", "min_nodes": 1, "max_nodes": 1, **changed}
    with pytest.raises(ValueError, match=message):
        etcd_v3()(RendezvousParameters("etcd-v3", **given))


def test_an_etcd_that_is_not_there_is_named() -> None:
    with pytest.raises(RendezvousConnectionError, match=r"--rdzv-endpoint=127\.0\.0\.1:1"):
        etcd_v3()(RendezvousParameters("etcd-v3", "127.0.0.1:1", "run", 1, 1))


def test_torch_finds_it_by_its_entry_point() -> None:
    declared = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["torchrun.handlers"]
    assert EntryPoint("etcd-v3", declared["etcd-v3"], "torchrun.handlers").load() is etcd_v3

"""Makes the handler of a torchrun rendezvous on etcd from torchrun's own options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

from elastic.errors import EtcdUnavailable, SettingsError
from elastic.membership.endpoint import EtcdEndpoint
from elastic.settings import python_protobuf

if TYPE_CHECKING:
    from elastic.membership.etcd import EtcdClient

_ROOT = "/torchrun/"
_FILES = ("ca", "cert", "key", "password_file")
_PATIENCE_S = 60
_TTL_S = 7200


class EtcdV3Handler(RendezvousHandler):
    """torch's handler, which forgets the address of the last round's rank 0.

    torch's keeps it: a node that is new in a round waits for an address that nobody writes, and the others have that of a node that may be
    gone.
    """

    def __init__(self, handler: DynamicRendezvousHandler, client: EtcdClient) -> None:
        self._handler = handler
        self._client = client

    @property
    def use_agent_store(self) -> bool:
        return self._handler.use_agent_store

    def get_backend(self) -> str:
        return self._handler.get_backend()

    def next_rendezvous(self) -> RendezvousInfo:
        self._handler._bootstrap_store_info = None
        return self._handler.next_rendezvous()

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        return self._handler.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        closed = self._handler.shutdown()
        self._client.close()
        return closed


def create(params: RendezvousParameters) -> RendezvousHandler:
    """Makes the handler of this node.

    `--rdzv-endpoint` is `[user@]host:port[,host:port...]`, or `unix:/path`. `--rdzv-conf` may have, besides torch's own timeouts:

        ca, cert, key      files for TLS, PEM: certificates that sign etcd's; this client's certificate, and its key
        password_file      the password of etcd's user, readable by you alone
        read_timeout       seconds that an outage of etcd is waited for, by default 60
        ttl                seconds after which keys of a node that has gone vanish, by default 7200

    The keys lie under /torchrun/<rdzv-id>/.

    Raises:
        SettingsError: an option is wrong; a ValueError.
        RendezvousConnectionError: etcd cannot be reached or logged in to.
    """
    if not params.run_id:
        raise SettingsError("--rdzv-id is missing: nodes with the same id train together")
    patience_s, ttl_s = _positive(params, "read_timeout", _PATIENCE_S), _positive(params, "ttl", _TTL_S)
    endpoint = _endpoint(params)
    try:
        with python_protobuf():
            from elastic.membership.etcd import EtcdClient
            from elastic.torchrun.backend import Access, EtcdV3Backend
            from elastic.torchrun.store import EtcdV3Store
    except TypeError as error:
        if "Descriptors" not in str(error):
            raise
        raise SettingsError(
            "--rdzv-backend=etcd-v3 needs protobuf in Python, and something in this process has loaded another one before: start torchrun "
            "with PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python in its environment"
        ) from error
    try:
        client = EtcdClient(endpoint)
    except EtcdUnavailable as error:
        raise RendezvousConnectionError(f"--rdzv-endpoint={endpoint}: {error}") from error
    access, under = Access(client, patience_s=patience_s, ttl_s=ttl_s), f"{_ROOT}{params.run_id}/"
    handler = create_handler(EtcdV3Store(access, f"{under}store/"), EtcdV3Backend(access, f"{under}state"), params)
    return EtcdV3Handler(handler, client)


def _endpoint(params: RendezvousParameters) -> EtcdEndpoint:
    if not params.endpoint:
        raise SettingsError("--rdzv-endpoint is missing: name etcd's host and port, such as etcd.example:2379")
    given: dict[str, Any] = {name: params.get(name) for name in _FILES if params.get(name)}
    try:
        return EtcdEndpoint.parse(params.endpoint, given)
    except SettingsError as error:
        raise SettingsError(f"--rdzv-endpoint={params.endpoint.rpartition('@')[2]}: {error}") from error


def _positive(params: RendezvousParameters, name: str, default: int) -> int:
    value = params.get_as_int(name, default)
    if value is None or value <= 0:
        raise SettingsError(f"--rdzv-conf {name}={value}: give a number of seconds above 0")
    return value

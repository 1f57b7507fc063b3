"""Connections to the members of an etcd: one is used, and when it fails, the next.

Each member has a gRPC channel of its own, not one channel for the list: so TLS checks each certificate against the address of that member,
names are resolved by gRPC whenever it connects, and a member that accepts connections but does not answer is left too.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

from elastic.membership.endpoint import EtcdEndpoint

with warnings.catch_warnings():  # protobuf and etcd3 emit deprecation warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    import grpc
    from etcd3 import etcdrpc as _etcdrpc

etcdrpc: Any = _etcdrpc  # generated at run time, without types

IMPATIENT_S = 1.5  # how long one of several members may take to answer, until all of them have been slower
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment would also be used for loopback and cluster addresses
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # finds a connection of a watch that broke without a word; etcd permits one in 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
]


class Member:
    """The services of one member."""

    def __init__(self, address: str, tls: tuple[bytes | None, bytes | None, bytes | None]) -> None:
        if tls[0] is None:
            self.channel: Any = grpc.insecure_channel(address, options=_OPTIONS)
        else:
            self.channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*tls), options=_OPTIONS)
        self.kv: Any = etcdrpc.KVStub(self.channel)
        self.lease: Any = etcdrpc.LeaseStub(self.channel)
        self.keep_lease: Any = self.channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",  # etcd answers each request of this stream once: a plain call needs no thread of its own
            request_serializer=etcdrpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=etcdrpc.LeaseKeepAliveResponse.FromString,
        )
        self.auth: Any = etcdrpc.AuthStub(self.channel)
        self.watch: Any = etcdrpc.WatchStub(self.channel)
        self.maintenance: Any = etcdrpc.MaintenanceStub(self.channel)


class Channels:
    """The members of one etcd; any thread may call. Files for TLS that have changed are read again when a connection fails."""

    def __init__(self, endpoint: EtcdEndpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._tls = endpoint.tls_files()
        self._index = 0
        self._late = 0  # members in a row that have not answered in time
        self._member = Member(endpoint.addresses[0], self._tls)
        self._streams: list[tuple[Member, Any]] = []

    @property
    def current(self) -> Member:
        """The member to ask."""
        return self._member

    def patience(self, timeout_s: float) -> float:
        """Returns how long to wait for an answer of one member, where `timeout_s` is the most."""
        several = len(self._endpoint.addresses)
        return timeout_s if several == 1 or self._late >= several else min(timeout_s, IMPATIENT_S)

    def answered(self, seconds: float) -> None:
        """Notes an answer that took so long."""
        if seconds < IMPATIENT_S:
            self._late = 0

    def leave(self, member: Member, *, late: bool) -> None:
        """Goes on to the next member, unless another thread has left `member` already. Ends its streams, which might never end."""
        with self._lock:
            if member is not self._member:
                return
            tls = self._endpoint.tls_files()
            self._late += late
            if len(self._endpoint.addresses) == 1 and tls == self._tls:
                return  # gRPC connects again
            self._tls = tls
            self._index = (self._index + 1) % len(self._endpoint.addresses)
            self._member = Member(self._endpoint.addresses[self._index], tls)
            left = [stream for at, stream in self._streams if at is member]
        for stream in left:
            stream.cancel()
        # `member` is not closed, since other threads may be using it: gRPC closes it when nobody does.

    def stream(self, member: Member, stream: Any) -> None:
        """Notes a stream of `member`."""
        with self._lock:
            self._streams = [(at, known) for at, known in self._streams if known.is_active()]
            self._streams.append((member, stream))
            left = member is not self._member
        if left:
            stream.cancel()

    def close(self) -> None:
        """Closes the connection."""
        self._member.channel.close()

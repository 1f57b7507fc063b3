"""The etcd client: the little of it that the runtime needs, with errors that say what to do. Only this module imports etcd3."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership.endpoint import Endpoint

with warnings.catch_warnings():  # protobuf and etcd3 call each other old
    warnings.simplefilter("ignore", DeprecationWarning)
    import etcd3
    import etcd3.exceptions
    import etcd3.utils
    import grpc
    from etcd3 import etcdrpc as _etcdrpc
    from etcd3.etcdrpc import kv_pb2 as _kv_pb2

etcdrpc: Any = _etcdrpc  # generated at run time, without types
kv_pb2: Any = _kv_pb2

_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment would swallow loopback and cluster addresses
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_RETRY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key as read or watched. `value` is None where a watch saw it deleted."""

    key: str
    value: str | None
    mod_revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """What a transaction demands of a key: this mod_revision (0: there is no such key), or this value."""

    key: str
    mod_revision: int | None = None
    value: str | None = None


class EtcdClient:
    """A connection to etcd; every call raises EtcdUnavailable within `timeout_s` when it cannot be served. Any thread may call."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 5.0) -> None:
        self.endpoint = endpoint
        # etcd3 joins the two by a colon: that makes gRPC's name of a UNIX socket as well.
        place: tuple[Any, Any] = ("unix", endpoint.path) if endpoint.path else (endpoint.host, endpoint.port)
        with self._translated():
            self._client = etcd3.client(
                host=place[0],
                port=place[1],
                user=endpoint.user,
                password=endpoint.password,
                timeout=timeout_s,
                grpc_options=_OPTIONS,
            )
        # The token travels as metadata; as call credentials gRPC refuses to send it over a plain connection.
        self._client.call_credentials = None
        self._watches: list[_Watch] = []
        try:
            self.get("/elastic")
        except EtcdUnavailable:
            self._client.close()
            raise

    def get(self, key: str) -> Entry | None:
        with self._translated():
            value, meta = self._client.get(key)
        return None if value is None or meta is None else Entry(key=key, value=value.decode(), mod_revision=meta.mod_revision)

    def get_prefix(self, prefix: str) -> list[Entry]:
        with self._translated():
            found = list(self._client.get_prefix(prefix))
        return [Entry(key=meta.key.decode(), value=value.decode(), mod_revision=meta.mod_revision) for value, meta in found]

    def put(self, key: str, value: str, *, lease: int | None = None) -> None:
        with self._translated():
            self._client.put(key, value, lease=lease)

    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int:
        """The new mod_revision. Raises Conflict if the key exists."""
        return self.compare_and_put(key, value, 0, lease=lease)

    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int:
        """Writes if the key's mod_revision is still the expected one (0: there is no such key). Raises Conflict."""
        return self.transaction([Compare(key=key, mod_revision=expected_mod_revision)], {key: value}, lease=lease)

    def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None) -> int:
        """Writes all of `puts` if all demands are met, at once; their mod_revision. Raises Conflict, and then has written nothing."""
        of = self._client.transactions
        request = etcdrpc.TxnRequest(
            compare=[comparison.build_message() for demand in demands for comparison in _comparisons(of, demand)],
            success=self._client._ops_to_requests([of.put(key, value, lease) for key, value in puts.items()]),
        )
        with self._translated():
            response = self._call(self._client.kvstub.Txn, request)
        if not response.succeeded:
            raise Conflict(f"etcd: somebody else wrote {' or '.join(demand.key for demand in demands)} in the meantime")
        return response.header.revision

    def delete(self, key: str) -> None:
        with self._translated():
            self._client.delete(key)

    def delete_prefix(self, prefix: str) -> None:
        with self._translated():
            self._client.delete_prefix(prefix)

    def grant(self, ttl_s: int) -> int:
        """A new lease."""
        with self._translated():
            return self._client.lease(ttl_s).id

    def refresh(self, lease: int) -> bool:
        """Whether the lease is still alive, now for its whole time again."""
        with self._translated():
            return any(response.TTL > 0 for response in self._client.refresh_lease(lease))

    def revoke(self, lease: int) -> None:
        with self._translated():
            self._client.revoke_lease(lease)

    def watch_prefix(self, prefix: str, callback: Callable[[Entry], None]) -> None:
        """Calls back from a thread for every key under the prefix: for what is there now, then for each change, in order, once.

        Goes on where it was after an outage.
        """
        watch = _Watch(self, prefix, callback)
        self._watches.append(watch)
        watch.start()

    def close(self) -> None:
        for watch in self._watches:
            watch.stop()
        self._client.close()

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        return method(request, self._client.timeout, metadata=self._client.metadata)

    def _range(self, prefix: str) -> tuple[list[Entry], int]:
        with self._translated():
            response = self._client.get_prefix_response(prefix)
        return [_entry(pair) for pair in response.kvs], response.header.revision

    def _watch_stream(self, requests: Iterable[Any]) -> Any:
        return etcdrpc.WatchStub(self._client.channel).Watch(requests, metadata=self._client.metadata)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _unavailable(self.endpoint, error) from error
        except etcd3.exceptions.Etcd3Exception as error:
            cause = error.__context__
            raise _unavailable(self.endpoint, cause if isinstance(cause, grpc.RpcError) else error) from error
        except ValueError as error:
            if "closed channel" not in str(error):
                raise
            raise EtcdUnavailable(f"the connection to {self.endpoint.title} is closed") from error


def _comparisons(of: Any, demand: Compare) -> Iterator[Any]:
    if demand.mod_revision is not None:
        yield of.mod(demand.key) == demand.mod_revision
    if demand.value is not None:
        yield of.value(demand.key) == demand.value


def _unavailable(endpoint: Endpoint, error: Exception) -> EtcdUnavailable:
    code = error.code() if isinstance(error, grpc.Call) else None
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    if code in _REFUSED or (code is grpc.StatusCode.FAILED_PRECONDITION and "authentication" in str(details)):
        refusal = EtcdUnavailable(f"{endpoint.title} refused ({details}): check user and password in etcd='user:password@host:port'")
        refusal.surely_not_done = True
        return refusal
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "no answer in time"
    advice = "" if endpoint.private else ": check that it runs, and that this is its client port"
    return EtcdUnavailable(f"{endpoint.title} cannot be reached ({details}){advice}")


def _entry(pair: Any, *, deleted: bool = False) -> Entry:
    return Entry(key=pair.key.decode(), value=None if deleted else pair.value.decode(), mod_revision=pair.mod_revision)


class _Watch:
    """etcd3's own watcher forgets its watches when the connection breaks, and then spins; this one resumes after the last seen revision."""

    def __init__(self, client: EtcdClient, prefix: str, callback: Callable[[Entry], None]) -> None:
        self._client = client
        self._prefix = prefix
        self._callback = callback
        self._stopped = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name="elastic-etcd-watch", daemon=True)
        self._next_revision: int | None = None
        self._seen: dict[str, int] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._stream is not None:
            self._stream.cancel()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if self._next_revision is None:
                    self._catch_up()
                self._follow()
            except (grpc.RpcError, EtcdUnavailable):
                self._stopped.wait(_RETRY_S)

    def _catch_up(self) -> None:
        entries, revision = self._client._range(self._prefix)
        current = {entry.key: entry.mod_revision for entry in entries}
        for key in self._seen.keys() - current.keys():  # deleted while nobody looked
            self._deliver(Entry(key=key, value=None, mod_revision=revision))
        for entry in sorted(entries, key=lambda entry: entry.mod_revision):
            if self._seen.get(entry.key) != entry.mod_revision:
                self._deliver(entry)
        self._next_revision = revision + 1

    def _follow(self) -> None:
        ended = threading.Event()
        self._stream = self._client._watch_stream(self._requests(ended))
        if self._stopped.is_set():
            self._stream.cancel()
        try:
            for response in self._stream:
                if response.compact_revision:
                    self._next_revision = None
                    return
                for event in response.events:
                    self._deliver(_entry(event.kv, deleted=event.type == kv_pb2.Event.DELETE))
                    self._next_revision = event.kv.mod_revision + 1
        finally:
            ended.set()

    def _deliver(self, entry: Entry) -> None:
        if entry.value is None:
            self._seen.pop(entry.key, None)
        else:
            self._seen[entry.key] = entry.mod_revision
        self._callback(entry)

    def _requests(self, ended: threading.Event) -> Iterator[Any]:
        create = etcdrpc.WatchCreateRequest(
            key=self._prefix.encode(),
            range_end=etcd3.utils.increment_last_byte(self._prefix.encode()),
            start_revision=self._next_revision or 0,
        )
        yield etcdrpc.WatchRequest(create_request=create)
        ended.wait()  # an exhausted iterator would half-close the stream

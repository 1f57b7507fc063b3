"""The etcd client: the operations that the runtime needs, with errors that advise what to do. Only this module imports etcd3."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from elastic.errors import Conflict, ElasticError, EtcdRefused, EtcdUnavailable, SettingsError
from elastic.membership.channels import Channels, Member, etcdrpc
from elastic.membership.endpoint import EtcdEndpoint
from elastic.membership.refusals import login_ran_out, may_answer_elsewhere, meaning, was_not_sent
from elastic.membership.revisions import Revisions

with warnings.catch_warnings():  # protobuf and etcd3 emit deprecation warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    import etcd3.utils
    import grpc
    from etcd3 import transactions
    from etcd3.etcdrpc import kv_pb2 as _kv_pb2

kv_pb2: Any = _kv_pb2

ROOT = "/elastic/"  # all keys of all jobs lie under it
VALUE_BYTES = 64 << 10  # no value is larger: etcd holds agreements, never bulk data
_RECENT = 16  # answers whose times are remembered
_LEADING = ("hasleader", "true")  # asks a member to end a watch when the majority is out of its reach


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """One key as read or watched. `value` is None if a watch saw it deleted; bytes that are no text become replacement characters.
    `lease` is the id of its lease, 0 without one."""

    key: str
    value: str | None
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """A transaction's demand on a key: this mod_revision (0: there is no such key), or this value."""

    key: str
    mod_revision: int | None = None
    value: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """The keys under a prefix, at `revision` of the etcd cluster `cluster`."""

    entries: list[KeyValue]
    revision: int
    cluster: int


class EtcdClient:
    """A connection to etcd; any thread may call.

    Every call raises EtcdUnavailable within `timeout_s` if it cannot be served: EtcdRefused if a retry cannot help, EtcdFull if etcd has no
    space. A call that one member does not answer is made at the next one, if it surely was not done or may be done twice. A login that ran
    out is renewed. Raises SettingsError if the file of the password cannot be read.
    """

    def __init__(self, endpoint: EtcdEndpoint, *, timeout_s: float = 5.0) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._channels = Channels(endpoint)
        self._login = threading.Lock()
        # The token is sent as metadata; gRPC refuses to send call credentials over an unencrypted connection.
        self._metadata: tuple[tuple[str, str], ...] = ()
        self.revisions = Revisions()
        self._watches: list[Any] = []
        self._seconds: deque[float] = deque([0.0], maxlen=_RECENT)
        self._known = False  # whether etcd has served this client: a login or certificate that is refused later may become right again
        try:
            self._connect()
        except (EtcdUnavailable, SettingsError):
            self._channels.close()
            raise

    def _connect(self) -> None:
        for left in reversed(range(len(self.endpoint.addresses))):
            try:
                self.log_in(self._metadata)
                self.get(ROOT)
                self._known = True
                return
            except EtcdRefused:
                raise
            except EtcdUnavailable:
                if not left:
                    raise

    @property
    def slowest_s(self) -> float:
        """The seconds that etcd's slowest recent answer has taken."""
        return max(self._seconds)

    @property
    def version(self) -> str | None:
        """The version of the member in use, None if it does not say so. Raises EtcdUnavailable."""
        try:
            return self._call(lambda member: member.maintenance.Status, etcdrpc.StatusRequest()).version
        except EtcdRefused:  # it wants more rights for this
            return None

    def get(self, key: str) -> KeyValue | None:
        found = self._ask_data(_range, etcdrpc.RangeRequest(key=key.encode()))
        return entry(found.kvs[0]) if found.kvs else None

    def get_prefix(self, prefix: str) -> list[KeyValue]:
        return self.find(prefix).entries

    def find(self, prefix: str) -> KeyState:
        """Returns the keys under the prefix and the revision at which they were read."""
        found = self._ask_data(_range, etcdrpc.RangeRequest(key=prefix.encode(), range_end=end_of(prefix)))
        return KeyState(entries=[entry(pair) for pair in found.kvs], revision=found.header.revision, cluster=found.header.cluster_id)

    def put(self, key: str, value: str, *, lease: int | None = None) -> None:
        self._call(lambda member: member.kv.Put, _put(key, value, lease))

    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int:
        """Writes a new key and returns its mod_revision. Raises Conflict if the key exists."""
        return self.compare_and_put(key, value, 0, lease=lease)

    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int:
        """Writes if the key's mod_revision is still the expected one (0: there is no such key). Raises Conflict."""
        return self.transaction([Compare(key=key, mod_revision=expected_mod_revision)], {key: value}, lease=lease)

    def transaction(
        self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, deletes: Iterable[str] = ()
    ) -> int:
        """Atomically writes `puts` and deletes `deletes` if all demands are met. Returns their mod_revision.

        Raises Conflict, having written nothing.
        """
        request = etcdrpc.TxnRequest(
            compare=[comparison.build_message() for demand in demands for comparison in _comparisons(demand)],
            success=[
                *(etcdrpc.RequestOp(request_put=_put(key, value, lease)) for key, value in puts.items()),
                *(etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key.encode())) for key in deletes),
            ],
        )
        response = self._ask_data(lambda member: member.kv.Txn, request, repeatable=False)
        if not response.succeeded:
            raise Conflict(f"etcd: another client wrote {' or '.join(demand.key for demand in demands)} since it was read here")
        return response.header.revision

    def delete(self, key: str) -> None:
        self._call(lambda member: member.kv.DeleteRange, etcdrpc.DeleteRangeRequest(key=key.encode()))

    def delete_prefix(self, prefix: str) -> None:
        self._call(lambda member: member.kv.DeleteRange, etcdrpc.DeleteRangeRequest(key=prefix.encode(), range_end=end_of(prefix)))

    def grant(self, ttl_s: int) -> int:
        """Grants a new lease."""
        return self._call(lambda member: member.lease.LeaseGrant, etcdrpc.LeaseGrantRequest(TTL=ttl_s)).ID

    def refresh(self, lease: int) -> bool:
        """Renews a lease for its whole time to live. Returns whether it was still alive."""
        return self._call(lambda member: member.keep_lease, etcdrpc.LeaseKeepAliveRequest(ID=lease)).TTL > 0

    def revoke(self, lease: int) -> None:
        self._call(lambda member: member.lease.LeaseRevoke, etcdrpc.LeaseRevokeRequest(ID=lease))

    def watch_prefix(
        self, prefix: str, callback: Callable[[KeyValue], None], failed: Callable[[ElasticError], None] = lambda _: None
    ) -> None:
        """Calls back from a thread for every key under the prefix: for the current ones, then for each change, in order, once.

        Resumes where it was after an outage. Calls `failed` once, and stops watching, if etcd refuses permanently.
        """
        from elastic.membership.watch import KeyWatch  # imports this module

        watch = KeyWatch(self, prefix, callback, failed)
        self._watches.append(watch)
        watch.start()

    def watch_stream(self, requests: Iterable[Any]) -> Any:
        """Returns the stream of answers to watch requests. Raises gRPC's errors."""
        member = self._channels.current
        stream = member.watch.Watch(requests, metadata=(*self._metadata, _LEADING))
        self._channels.stream(member, stream)
        return stream

    def log_in(self, token: tuple[tuple[str, str], ...] | None = None) -> None:
        """Gets a new token, unless another thread has already replaced `token`."""
        with self._login:
            if self.endpoint.user is None or (token is not None and token is not self._metadata):
                return
            request = etcdrpc.AuthenticateRequest(name=self.endpoint.user, password=self._password())
            answer = self._ask(lambda member: member.auth.Authenticate, request, (), repeatable=True)
            self._metadata = (("token", answer.token),)

    def close(self) -> None:
        for watch in self._watches:
            watch.stop()
        self._channels.close()

    def _password(self) -> str:
        try:
            return self.endpoint.current_password()
        except SettingsError as error:
            if not self._known:
                raise
            raise EtcdUnavailable(f"no login at {self.endpoint.title}: {error}") from error

    def _ask_data(self, method: Callable[[Member], Callable[..., Any]], request: Any, *, repeatable: bool = True) -> Any:
        """Does what `_call` does for a request whose answer is as new as all that any member has answered or told before."""
        known = self.revisions.newest
        answer = self._call(method, request, repeatable=repeatable)
        self.revisions.answered(answer.header.revision, known)
        return answer

    def _call(self, method: Callable[[Member], Callable[..., Any]], request: Any, *, repeatable: bool = True) -> Any:
        token = self._metadata
        try:
            return self._ask(method, request, token, repeatable=repeatable)
        except EtcdUnavailable as error:
            if self.endpoint.user is None or error.__cause__ is None or not login_ran_out(error.__cause__):
                raise
        self.log_in(token)
        return self._ask(method, request, self._metadata, repeatable=repeatable)

    def _ask(self, method: Callable[[Member], Callable[..., Any]], request: Any, token: Any, *, repeatable: bool) -> Any:
        """Asks one member after another, for `timeout_s` in all. Each is asked at most once."""
        until = time.monotonic() + self.timeout_s
        for left in reversed(range(len(self.endpoint.addresses))):
            member, asked = self._channels.current, time.monotonic()
            with self._translated():
                try:
                    answer = method(member)(request, self._channels.patience(until - asked), metadata=token)
                    seconds = time.monotonic() - asked
                    self._seconds.append(seconds)
                    self._channels.answered(seconds)
                    return answer
                except grpc.RpcError as error:
                    if may_answer_elsewhere(error):
                        self._channels.leave(member, late=error.code() is grpc.StatusCode.DEADLINE_EXCEEDED)
                    elsewhere = may_answer_elsewhere(error) and (repeatable or was_not_sent(error))
                    if not left or not elsewhere or time.monotonic() >= until:
                        raise
        raise AssertionError  # the last try returns or raises

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise meaning(self.endpoint, error, known=self._known) from error
        except StopIteration as error:
            raise EtcdUnavailable(f"{self.endpoint.title} ended a request without an answer") from error
        except ValueError as error:
            if "closed channel" not in str(error):
                raise
            raise EtcdUnavailable(f"the connection to {self.endpoint.title} is closed") from error


def _range(member: Member) -> Callable[..., Any]:
    return member.kv.Range


def _comparisons(demand: Compare) -> Iterator[Any]:
    if demand.mod_revision is not None:
        yield transactions.Mod(demand.key) == demand.mod_revision
    if demand.value is not None:
        yield transactions.Value(demand.key) == demand.value


def _put(key: str, value: str, lease: int | None) -> Any:
    data = value.encode()
    if len(data) > VALUE_BYTES:
        raise EtcdRefused(f"the value of {key} has {len(data)} bytes, and none may have more than {VALUE_BYTES}: report this as a bug")
    return etcdrpc.PutRequest(key=key.encode(), value=data, lease=lease or 0)


def entry(pair: Any, *, deleted: bool = False) -> KeyValue:
    """Converts a key from etcd's form."""
    value = None if deleted else pair.value.decode(errors="replace")
    return KeyValue(key=pair.key.decode(errors="replace"), value=value, mod_revision=pair.mod_revision, lease=pair.lease)


def end_of(prefix: str) -> bytes:
    """Returns the end of the range of keys that begin with the prefix."""
    return etcd3.utils.increment_last_byte(prefix.encode())

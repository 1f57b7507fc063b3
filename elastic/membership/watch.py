"""A watch that survives broken connections: etcd3's own watcher loses its watches when a connection breaks, and then spins."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from elastic.errors import ElasticError, EtcdRefused, EtcdUnavailable, JobFailed
from elastic.membership.channels import etcdrpc
from elastic.membership.etcd import EtcdClient, KeyValue, end_of, entry, kv_pb2
from elastic.membership.refusals import login_ran_out, meaning

_RETRY_S = 0.2


class KeyWatch:
    """Delivers every key under a prefix, from a thread; resumes after the last revision it saw, as long as the etcd cluster is the same."""

    def __init__(
        self, client: EtcdClient, prefix: str, callback: Callable[[KeyValue], None], failed: Callable[[ElasticError], None]
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._callback = callback
        self._failed = failed
        self._stopped = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name="elastic-etcd-watch", daemon=True)
        self._next_revision: int | None = None
        self._cluster = 0
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
                self._catch_up()
                self._follow()
            except EtcdRefused as error:
                if not self._stopped.is_set():
                    self._failed(error)
                return
            except EtcdUnavailable:
                self._stopped.wait(_RETRY_S)
            except Exception:  # the thread's boundary: otherwise it would end without a message
                self._failed(JobFailed(f"the agent's thread that watches etcd failed; this is a bug:\n{traceback.format_exc()}"))
                return

    def _catch_up(self) -> None:
        """Delivers changes that the stream cannot: a stream that begins after etcd's last revision would deliver nothing, without error."""
        found = self._client.find(self._prefix)
        same = found.cluster == self._cluster and self._next_revision is not None and found.revision + 1 >= self._next_revision
        if same:
            return
        if found.cluster != self._cluster:
            self._seen = dict.fromkeys(self._seen, 0)  # revisions of another etcd
        current = {entry.key: entry.mod_revision for entry in found.entries}
        for key in self._seen.keys() - current.keys():  # deleted while there was no stream
            self._deliver(KeyValue(key=key, value=None, mod_revision=found.revision))
        for known in sorted(found.entries, key=lambda entry: entry.mod_revision):
            if self._seen.get(known.key) != known.mod_revision:
                self._deliver(known)
        self._cluster, self._next_revision = found.cluster, found.revision + 1

    def _follow(self) -> None:
        ended = threading.Event()
        try:
            self._stream = self._client.watch_stream(self._requests(ended))
            if self._stopped.is_set():
                self._stream.cancel()
            for response in self._stream:
                if response.canceled:
                    self._canceled(response)
                    return
                for event in response.events:
                    self._next_revision = event.kv.mod_revision + 1
                    self._client.revisions.answered(event.kv.mod_revision, known=0)
                    self._deliver(entry(event.kv, deleted=event.type == kv_pb2.Event.DELETE))
        except grpc.RpcError as error:
            self._broken(error)
        except ValueError as error:
            if "closed channel" not in str(error):
                raise
            self._stopped.set()
        finally:
            ended.set()

    def _canceled(self, response: Any) -> None:
        """Handles the end of the watch, but not of the stream; `compact_revision` is set if the history was compacted."""
        if response.compact_revision:
            self._next_revision = None
        else:
            self._broken(ValueError(response.cancel_reason or "it ended a watch"))

    def _broken(self, error: Exception) -> None:
        if login_ran_out(error) or "permission denied" in str(error):  # etcd confuses the two when it ends a watch
            self._client.log_in()
            self._client.find(self._prefix)  # raises EtcdRefused if the permission is really missing
            raise EtcdUnavailable("the login ran out and was renewed")
        raise meaning(self._client.endpoint, error, known=True) from error

    def _deliver(self, known: KeyValue) -> None:
        if known.value is None:
            self._seen.pop(known.key, None)
        else:
            self._seen[known.key] = known.mod_revision
        self._callback(known)

    def _requests(self, ended: threading.Event) -> Iterator[Any]:
        create = etcdrpc.WatchCreateRequest(
            key=self._prefix.encode(), range_end=end_of(self._prefix), start_revision=self._next_revision or 0
        )
        yield etcdrpc.WatchRequest(create_request=create)
        ended.wait()  # an exhausted iterator would half-close the stream

"""One agent's place in the membership: its etcd, its lease, the job's record and the view."""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from elastic.errors import Conflict, EtcdUnavailable, SettingsError
from elastic.membership.attempts import Attempts
from elastic.membership.election import Election
from elastic.membership.endpoint import Endpoint
from elastic.membership.etcd import EtcdClient
from elastic.membership.founding import Ready
from elastic.membership.leases import Lease
from elastic.membership.server import PrivateEtcd
from elastic.membership.views import ViewStore, job_prefix
from elastic.settings import JobSettings
from elastic.view import View


class Session:
    """Connects, claims the job's name, and calls `on_view` from a thread with every committed view.

    `attempts` is this agent's part in finding the next view. Without `settings.etcd` it runs a private etcd under `directory`.
    Raises EtcdUnavailable, or SettingsError if the name is taken.
    """

    def __init__(self, settings: JobSettings, directory: Path, on_view: Callable[[View, int], None]) -> None:
        self._prefix = job_prefix(settings.name)
        self._server = PrivateEtcd(directory) if settings.etcd is None else None
        self._client: EtcdClient | None = None
        self._lease: Lease | None = None
        self._claimed = False
        try:
            endpoint = Endpoint.parse(settings.etcd or "") if self._server is None else self._server.endpoint()
            self._client = EtcdClient(endpoint)
            self._lease = lease = Lease(self._client)
            self._claim(settings, self._client, lease)
            lease.start()
            self._views = ViewStore(self._client, settings.name)
            self._views.watch(on_view)
            host = socket.gethostname()
            election = Election(self._client, f"{self._prefix}coordinator", f"{host}/{secrets.token_hex(4)}", lambda: lease.id)
            self.attempts = Attempts(self._client, settings.name, host, election, self._views)
        except BaseException:
            self.close()
            raise

    def admit(self, worker: int, ready: Ready) -> None:
        """Lists a worker that is ready, for as long as this agent lives."""
        assert self._lease is not None  # set in a session that was made
        entry = {"host": ready.host, "address": ready.address, "fingerprint": ready.fingerprint}
        self._lease.put(f"{self._prefix}workers/{worker}", json.dumps(entry))

    def dismiss(self, worker: int) -> None:
        """Takes a dead worker off the list."""
        assert self._lease is not None  # as above
        self._lease.drop(f"{self._prefix}workers/{worker}")

    def publish(self, view: View) -> int:
        """Commits the first view, as the coordinator; its mod_revision. Raises Conflict, EtcdUnavailable."""
        self.attempts.begin((view.epoch, view.attempt))
        return self._views.publish(view)

    def close(self) -> None:
        """Leaves nothing of the job in etcd."""
        if self._client is not None:
            if self._lease is not None:
                self._lease.stop()
            if self._claimed and self._server is None:
                with suppress(EtcdUnavailable):
                    self._client.delete_prefix(self._prefix)
            self._client.close()
        if self._server is not None:
            self._server.stop()

    def _claim(self, settings: JobSettings, client: EtcdClient, lease: Lease) -> None:
        try:
            lease.claim(f"{self._prefix}record", json.dumps(settings.record()))
        except Conflict as error:
            raise SettingsError(f"name={settings.name!r}: a job of this name runs on etcd at {client.endpoint}; choose another") from error
        self._claimed = True
        for rest in ("view", "workers/", "attempt", "proposals/", "votes/"):  # of an earlier job of this name, whose agent was killed
            client.delete_prefix(f"{self._prefix}{rest}")

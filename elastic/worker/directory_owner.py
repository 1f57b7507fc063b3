"""Decides which job may save into a directory of checkpoints, and which of its checkpoints this job may reload."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import replace

from elastic.checkpoint.directory import collect
from elastic.checkpoint.owner import Owner, check_owner, claim, read_owner
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.store import Store
from elastic.errors import CheckpointError

_log = logging.getLogger(__name__)
EXTRA = "elastic"
"""The key of a checkpoint's extra contents that only this runtime reads."""

DEAD_S = 3600.0
"""Seconds without a change after which an unfinished save counts as abandoned."""


class DirectoryOwner:
    """This job's ownership of `store`. The job that began last owns a directory; earlier ones may no longer save."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self.own = Owner(job=hashlib.sha256(b"owner " + secret).hexdigest()[:16], began_from=None)
        self._predecessor = read_owner(store)

    def join(self) -> None:
        """Joins a running job: the present owner came before this worker, but not before the job."""
        owner, self._predecessor = self._predecessor, None
        if owner is not None and owner.job == self.own.job:
            self.own = owner

    def began_from(self, order: tuple[int, int, int]) -> None:
        """Stores the order of the checkpoint that the job began from."""
        self.own = replace(self.own, began_from=order)

    def claim(self) -> None:
        """Takes the directory, and removes unfinished saves of the previous owner. Called by the leader of the founders."""
        try:
            claim(self._store, self.own)
            if self._predecessor is not None and self._store.renames:
                collect(self._store, older_than_s=0.0, now=math.inf, tag=self._predecessor.tag)  # it may no longer commit
            collect(self._store, older_than_s=DEAD_S, now=time.time())
        except CheckpointError as error:
            _log.warning("%s", error)  # if the directory cannot be written, saves fail and report it

    def may_save(self, store: Store) -> None:
        """Raises CheckpointError if another job owns the directory."""
        owner = read_owner(store)
        if owner is None or owner == self._predecessor:  # the leader died before its claim, or could not write
            claim(store, self.own)
        check_owner(store, self.own.job)

    def is_own(self, source: ElasticSource) -> bool:
        """Returns whether this job saved the checkpoint or began from it or a newer one: other jobs may save into the directory too."""
        began_from = self.own.began_from
        owner = read_owner(self._store)
        if began_from is None and owner is not None and owner.job == self.own.job:  # a joiner
            began_from = owner.began_from
        if began_from is not None and source.manifest.order <= began_from:
            return True
        return source.manifest.contents.extra.get(EXTRA, {}).get("job") == self.own.job

"""Which job may save into a directory of checkpoints, and which of its checkpoints are this job's to go back to."""

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
"""Where a checkpoint has what only this runtime reads."""

DEAD_S = 3600.0
"""A save in which nothing has changed for so long has no saver any more."""


class DirectoryOwner:
    """This job's part in `store`. The last job that began owns a directory; earlier ones save no more."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store = store
        self.own = Owner(job=hashlib.sha256(b"owner " + secret).hexdigest()[:16], began_from=None)
        self._predecessor = read_owner(store)

    def join(self) -> None:
        """This worker joins a job that runs: whoever owns the directory by now came before this worker, not before the job."""
        owner, self._predecessor = self._predecessor, None
        if owner is not None and owner.job == self.own.job:
            self.own = owner

    def began_from(self, order: tuple[int, int, int]) -> None:
        """The job goes on from the checkpoint with this order."""
        self.own = replace(self.own, began_from=order)

    def claim(self) -> None:
        """Takes the directory, and removes what its predecessor left half saved. Called by the leader of the founders."""
        try:
            claim(self._store, self.own)
            if self._predecessor is not None and self._store.renames:
                collect(self._store, older_than_s=0.0, now=math.inf, tag=self._predecessor.tag)  # it may not commit any more
            collect(self._store, older_than_s=DEAD_S, now=time.time())
        except CheckpointError as error:
            _log.warning("%s", error)  # saves will tell whether anything can be written there

    def may_save(self, store: Store) -> None:
        """Raises CheckpointError where another job owns the directory."""
        owner = read_owner(store)
        if owner is None or owner == self._predecessor:  # whoever had to claim it died, or could not write
            claim(store, self.own)
        check_owner(store, self.own.job)

    def is_own(self, source: ElasticSource) -> bool:
        """Whether this job saved it, or it was there when the job began: other jobs may have saved into the directory meanwhile."""
        began_from = self.own.began_from
        owner = read_owner(self._store)
        if began_from is None and owner is not None and owner.job == self.own.job:  # a joiner, who was not there
            began_from = owner.began_from
        if began_from is not None and source.manifest.order <= began_from:
            return True
        return source.manifest.contents.extra.get(EXTRA, {}).get("job") == self.own.job

"""What every agent of a shared job knows of it, so that any of them can go on coordinating it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from elastic.host.channel import Message
from elastic.host.packed import unpacked
from elastic.view import View

if TYPE_CHECKING:
    from elastic.comm.message import AttemptId

_PROPOSED = 3  # the last proposal may have been committed, since its coordinator can be lost before it says so


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """The founder's `settings`, the announcement of the first view's coordinator (`founder`), and the newest `views`: the last one that was
    committed as far as this agent knows, and those proposed since. The number of the next new worker is above `last_worker`; the job is
    scaled to `limit` workers, if to any; `stopping` once it was asked to stop. `committed` are epoch and attempt of the first of the views,
    (0, 0) if this agent has not heard that it was committed; `heard` is the last attempt of which workers were told. All are JSON; views
    that this agent has only passed on are not decoded before they are needed."""

    settings: dict[str, Any]
    founder: dict[str, Any]
    views: list[Any]
    last_worker: int = -1
    limit: int | None = None
    stopping: bool = False
    committed: AttemptId = (0, 0)
    heard: AttemptId = (0, 0)

    def to_json(self) -> dict[str, Any]:
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "views": [*map(_view, self.views)]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobFacts:
        return cls(**{**data, "committed": tuple(data["committed"]), "heard": tuple(data["heard"])})

    def knowing(self, order: Message) -> JobFacts:
        """Returns the facts after an order that the coordinator has sent to workers."""
        if order["type"] == "stop":
            return replace(self, stopping=True)
        if order["type"] not in ("quiesce", "propose", "view"):
            return self
        attempt_id = order["epoch"], order["attempt"]
        known = replace(self, heard=max(self.heard, attempt_id))
        if order["type"] == "view":
            return replace(known, views=[order["view"]], committed=attempt_id)
        if order["type"] == "propose":
            return replace(known, views=[*self.views[:1], *[*self.views[1:], order["proposal"]][-_PROPOSED:]])
        return known

    def started(self, worker: int) -> JobFacts:
        """Returns the facts after a worker was started somewhere."""
        return replace(self, last_worker=max(self.last_worker, worker))

    def joined(self, other: JobFacts) -> JobFacts:
        """Returns what this agent and another one know."""
        newer, older = (self, other) if self.committed >= other.committed else (other, self)
        views, more = [*map(_view, newer.views)], [*map(_view, older.views)]
        return replace(
            self,
            views=[*views, *(view for view in more if view not in views)],
            last_worker=max(self.last_worker, other.last_worker),
            stopping=self.stopping or other.stopping,
            committed=newer.committed,
            heard=max(self.heard, other.heard),
        )

    def view(self, text: str) -> View | None:
        """Returns the view of this mark, None if it is not among the views."""
        from elastic.membership.views import mark  # imports the etcd client, which takes long

        return next((view for view in map(View.from_json, map(_view, self.views)) if mark(view) == text), None)

    def last(self, newest: str | None) -> View | None:
        """Returns the view that was committed last, None if it is not among the views. `newest` is the newest mark that was seen at etcd,
        which may be older than the last view if etcd has lost data."""
        from elastic.membership.views import number

        if newest is None or (number(newest) or (0, 0)) < self.committed:
            return View.from_json(_view(self.views[0])) if self.committed > (0, 0) else None
        return self.view(newest)


def _view(kept: Any) -> dict[str, Any]:
    """Returns the JSON of a view that was kept as it was announced, or as a part of its proposal."""
    value = unpacked(kept)
    return value.get("view", value)

"""What every agent of a shared job knows of it, so that any of them can go on coordinating it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastic.host.channel import Message
from elastic.view import View

_KEPT = 4  # a view is committed while at most one other is proposed


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """The founder's `settings`, the announcement of the first view's coordinator (`founder`), and the newest `views`, each committed or
    proposed. The number of the next new worker is above `last_worker`; the job is scaled to `limit` workers, if to any. All are JSON."""

    settings: dict[str, Any]
    founder: dict[str, Any]
    views: list[dict[str, Any]]
    last_worker: int = -1
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobFacts:
        return cls(**data)

    def knowing(self, order: Message) -> JobFacts:
        """Returns the facts after an order that the coordinator has sent to workers."""
        view = order["view"] if order["type"] == "view" else order["proposal"]["view"] if order["type"] == "propose" else None
        return self if view is None or view in self.views else replace(self, views=[*self.views, view][-_KEPT:])

    def started(self, worker: int) -> JobFacts:
        """Returns the facts after a worker was started somewhere."""
        return replace(self, last_worker=max(self.last_worker, worker))

    def joined(self, other: JobFacts) -> JobFacts:
        """Returns what this agent and another one know."""
        views = [*self.views, *(view for view in other.views if view not in self.views)]
        return replace(self, views=views, last_worker=max(self.last_worker, other.last_worker))

    def view(self, text: str) -> View | None:
        """Returns the view of this mark, None if it is not among the views."""
        from elastic.membership.views import mark  # imports the etcd client, which takes long

        return next((view for view in map(View.from_json, self.views) if mark(view) == text), None)

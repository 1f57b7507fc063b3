"""The outcome message of a job, which is sent to the launcher."""

from __future__ import annotations

from elastic.errors import ElasticError
from elastic.host.channel import Message


def failed(kind: type[ElasticError], message: str) -> Message:
    """Returns the outcome of a job that ends with this error."""
    return {"type": "failed", "kind": kind.__name__, "message": message}

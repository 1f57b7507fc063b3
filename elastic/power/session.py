"""One client's conversation with a guardian or daemon: JSON lines; the end of the connection restores every clock that was set over it.

    {"type": "claim", "gpu": UUID, "own": [PID...]}          -> {"type": "claimed", "gpu": UUID}
    {"type": "lock", "gpu": UUID, "mhz": N, "own": [PID...]} -> {"type": "locked", "gpu": UUID, "mhz": read back}
    {"type": "unlock", "gpu": UUID}                          -> {"type": "unlocked", "gpu": UUID}
    {"type": "close"}                                        -> {"type": "closed", "complaints": [...]}
    a request that cannot be met                             -> {"type": "refused", "gpu": UUID, "condition": ..., "why": ...}

Nothing else can be asked for: neither another setting, nor a program, nor a file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from elastic.errors import PowerError
from elastic.power.conditions import Condition
from elastic.power.keeper import Keeper

Message = dict[str, Any]


def answered(keeper: Keeper, request: Message) -> Message:
    """Does what a request asks for, and returns the answer."""
    kind, uuid = request.get("type"), request.get("gpu")
    try:
        if kind == "lock" and isinstance(uuid, str) and _whole(request.get("mhz")):
            return {"type": "locked", "gpu": uuid, "mhz": keeper.lock(uuid, request["mhz"], _processes(request.get("own")))}
        if kind == "claim" and isinstance(uuid, str):
            keeper.claim(uuid, _processes(request.get("own")))
            return {"type": "claimed", "gpu": uuid}
        if kind == "unlock" and isinstance(uuid, str):
            keeper.unlock(uuid)
            return {"type": "unlocked", "gpu": uuid}
        if kind == "close":
            return {"type": "closed", "complaints": keeper.close()}
    except PowerError as error:
        return {"type": "refused", "gpu": uuid, "condition": error.condition, "why": str(error)}
    return {
        "type": "refused",
        "gpu": None,
        "condition": Condition.UNKNOWN.value,
        "why": f"this version does not know the request {request!r}",
    }


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _processes(value: object) -> Collection[int]:
    return [each for each in value if isinstance(each, int)] if isinstance(value, list) else []

"""How `train_fn` ends: what it may return, and threads that are still running."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from elastic.errors import TrainFunctionError

_END_S = 1.0


class NoStepLeft(BaseException):
    """Leaves a train function that begins loops again and again after the job has stopped."""


def check_value(value: Any, train_fn: str = "train_fn") -> None:
    """Raises TrainFunctionError if `value`, which `train_fn` has returned, would not reach the launcher unchanged."""
    try:
        json.dumps(value)
        key = _other_key(value)
    except (TypeError, ValueError) as error:
        raise TrainFunctionError(
            f"{train_fn} returned a {type(value).__name__} that cannot be sent to the launcher as JSON ({error}); "
            "return numbers, strings, lists and dicts, or nothing"
        ) from error
    if key:
        raise TrainFunctionError(
            f"{train_fn} returned a dict with the key {key[0]!r}, which JSON would turn into a string on the way to the launcher: use "
            "strings as keys, or a list of pairs"
        )


def is_value(value: Any) -> bool:
    """Whether `value` would reach the launcher unchanged."""
    with suppress(TrainFunctionError):
        check_value(value)
        return True
    return False


def _other_key(value: Any) -> list[Any]:
    """Returns a list with one key in `value`, at any depth, that is not a string; empty if there is none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                return [key]
            if found := _other_key(inner):
                return found
    elif isinstance(value, list | tuple):
        for inner in value:
            if found := _other_key(inner):
                return found
    return []


def tell_of_lasting_threads(tell: Callable[[list[str]], None], patience_s: float = _END_S) -> None:
    """Calls `tell` with the names of non-daemon threads that are alive after `patience_s` and keep this process from ending.

    Returns at once: idle threads of an executor end only when Python does.
    """

    def watch() -> None:
        time.sleep(patience_s)
        if names := [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]:
            tell(names)

    threading.Thread(target=watch, name="elastic-lasting", daemon=True).start()

"""Names a line of the user's code: the one that made a call which the runtime refuses, or the definition of the train function."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from elastic.script.sources import is_ours, is_own


def called_at(tb: TracebackType | None) -> str:
    """Returns ` (called at FILE:LINE)` for the innermost line of the user's own code in a traceback; empty if there is none.

    If all code outside this package is installed, as a training package may be, it is the outermost line of that. A traceback may have no
    frame of the user's: a plain loop runs the engine in a greenlet of its own.
    """
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(tb)]
    own = [place for place in places if is_own(place[0])]
    others = [place for place in places if not is_ours(place[0]) and not place[0].startswith("<")]
    file, line = own[-1] if own else others[0] if others else ("", 0)
    return f" (called at {file}:{line})" if file else ""


def defined_at(function: Callable[..., Any]) -> str:
    """Returns ` (FILE:LINE)`, where a function is defined; empty for one without Python code."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None and is_own(code.co_filename) else ""

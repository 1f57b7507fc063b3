"""The frame that a thread of this process executes.

`sys._current_frames` holds the interpreter's lock on its list of threads while it makes objects, and so may begin a garbage collection.
Code that this runs may hand the global interpreter lock to a thread that waits for the list, because it starts or ends: then both wait for
ever (CPython issue 106883, found in Python 3.11.7).
"""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

_one_at_a_time = threading.Lock()


def frame_of(thread: int) -> FrameType | None:
    """Returns the frame that the thread with this identifier executes now, None if there is none. No garbage is collected meanwhile."""
    with _one_at_a_time:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread)
        finally:
            if collects:
                gc.enable()

"""The frames that a thread of this process executes.

`sys._current_frames` holds the interpreter's lock on its list of threads while it makes objects, and so may begin a garbage collection.
Code that this runs may hand the global interpreter lock to a thread that waits for the list, because it starts or ends: then both wait for
ever (CPython issue 106883, found in Python 3.11.7). `frame.f_back` of a running thread makes objects too. A worker has died by SIGSEGV
there once: probably a collection let that thread go on, and the frame was gone. This could not be repeated.
"""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

_one_at_a_time = threading.Lock()


def stack_of(thread: int) -> list[FrameType]:
    """Returns the frames that the thread with this identifier executes now, innermost first. No garbage is collected meanwhile."""
    with _one_at_a_time:
        collects = gc.isenabled()
        gc.disable()
        try:
            frame, found = sys._current_frames().get(thread), list[FrameType]()
            while frame is not None:
                found.append(frame)
                frame = frame.f_back
            return found
        finally:
            if collects:
                gc.enable()

"""A thread's frames are found while garbage is due, and while other threads begin and end: this is where the interpreter can lock up."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

from elastic.host.frames import stack_of

_ROUNDS = 100  # `sys._current_frames` alone locks up within the first ten
_PROGRAM = f"""
import gc, threading, time
from elastic.host.frames import stack_of

class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        time.sleep(0.0005)  # another thread runs meanwhile
        if not ended.is_set():
            Cycle()  # garbage for the next collection

def wait(depth):
    if depth:
        wait(depth - 1)
    while not ended.wait(0.001):
        pass

def begin_and_end():
    while not ended.is_set():
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()

ended = threading.Event()
threads = [threading.Thread(target=wait, args=(5,)) for _ in range(20)] + [threading.Thread(target=begin_and_end) for _ in range(2)]
for thread in threads:
    thread.start()
Cycle()
gc.set_threshold(1)
for _ in range({_ROUNDS}):
    assert stack_of(threads[0].ident)
ended.set()
for thread in threads:
    thread.join()
print("ended")
"""


def test_no_garbage_is_collected_while_the_list_of_threads_is_locked() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended\n", done.stderr


def test_the_frame_is_that_of_the_thread_and_the_collector_is_as_before() -> None:
    names = [frame.f_code.co_name for frame in stack_of(threading.get_ident())]
    assert names[0] == "stack_of"
    assert "test_the_frame_is_that_of_the_thread_and_the_collector_is_as_before" in names
    assert stack_of(-1) == []
    assert gc.isenabled()
    gc.disable()
    try:
        stack_of(threading.get_ident())
        assert not gc.isenabled()
    finally:
        gc.enable()

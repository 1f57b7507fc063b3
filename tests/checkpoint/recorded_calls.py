"""A replacement of the `os` module for a store. It numbers every call, and can record it, fail at it or kill the process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CALLS = {"open", "close", "mkdir", "stat", "fstat", "listdir", "posix_fallocate", "ftruncate"}
CALLS |= {"pwrite", "preadv", "fsync", "rename", "replace", "unlink", "rmdir"}


@dataclass
class Call:
    """One call: its arguments and its result."""

    kind: str
    arguments: tuple[Any, ...]
    result: Any = None


@dataclass
class Recorder:
    """`at` is the number of the call at which `fault` happens; it gets the call, and may raise or never return."""

    at: int | None = None
    fault: Callable[[Call], None] | None = None
    calls: list[Call] = field(default_factory=list)
    fired: bool = False

    def __getattr__(self, name: str) -> Any:
        plain = getattr(os, name)
        if name not in CALLS:
            return plain

        def numbered(*arguments: Any) -> Any:
            kept = tuple(bytes(value) if isinstance(value, memoryview) else value for value in arguments)
            call = Call(name, kept if name != "preadv" else arguments[::2])
            self.calls.append(call)
            if len(self.calls) - 1 == self.at and self.fault is not None:
                self.fired = True
                self.fault(call)
            call.result = plain(*arguments)
            return call.result

        return numbered


def kill(_call: Call) -> None:
    """Before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_torn(call: Call) -> None:
    """In the middle of a write: half of it is there."""
    if call.kind == "pwrite":
        descriptor, data, offset = call.arguments
        os.pwrite(descriptor, data[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Callable[[Call], None]:
    """The call fails with this errno."""

    def fail(_call: Call) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def in_child(work: Callable[[], None]) -> int:
    """Forks, works, and returns the child's exit status or minus the signal that ended it; 1 if it raised."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)

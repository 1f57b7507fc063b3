"""What a process of the runtime does to itself: die with its parent, carry a name, start another with the same import path."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

_TIED = (
    "import ctypes, os, resource, sys; ctypes.CDLL(None).prctl(1, 9); "
    "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); "
    "resource.setrlimit(resource.RLIMIT_NOFILE, (soft if soft < 0 or hard < 0 else max(soft, min(hard, 4096)), hard)); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def die_with_parent(parent: int) -> None:
    """Asks the kernel to SIGKILL this process when the thread that started it ends; exits at once if `parent` is gone already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def continue_without_parent() -> None:
    """Asks the kernel for a SIGCONT when the thread that started this process ends: even if stopped, it then notices, and cleans up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def name_process(name: str) -> None:
    """Shows `name` (15 bytes at most) in ps and top."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


def is_stopped(pid: int | None) -> bool:
    """Whether a process has got SIGSTOP, or a debugger holds it."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def end_session(leader: int, mark: str, timeout_s: float = 5.0) -> None:
    """SIGKILLs what is left of the session of `leader` but not itself, and what has `mark` in the environment that it was started with.

    That is how helper processes are found that `train_fn` started, in sessions of their own too. Waits until they have ended.
    """
    deadline = time.monotonic() + timeout_s
    while (found := _left(leader, mark)) and time.monotonic() < deadline:  # again: one may just have started another
        for pid in found:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
                finally:
                    os.close(pidfd)


def _left(leader: int, mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (leader, os.getpid()):
            with suppress(OSError):  # gone, or another user's
                state, _parent, _group, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and (int(session) == leader or mark.encode() in (entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
    return found


def tied_command(command: Sequence[str]) -> list[str]:
    """`command`, made to die with this process, and allowed to open as many files as its limits can be raised to (but no more than 4,096).

    A program that is not ours cannot ask for the first itself, and the request outlives exec.
    """
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]


def import_path() -> list[str]:
    """Where this process imports from. What Python passes over is left out: entries that are no text, a working directory that is gone."""
    found = []
    for entry in sys.path:
        if isinstance(entry, str):
            with suppress(FileNotFoundError):  # by getcwd
                found.append(entry or os.getcwd())
    return found


def module_command(module: str, *arguments: str) -> list[str]:
    """Runs `module.main()` in a new interpreter that imports from where this one does, whatever the working directory holds.

    The directory of the script comes last: a `six.py` beside it is the script's business, and nobody else's.
    """
    own = _script_directories()
    path = import_path()
    path.sort(key=lambda entry: os.path.realpath(entry) in own)
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; main()"
    return [sys.executable, "-c", code, *arguments]


def _script_directories() -> set[str]:
    """The script's, and the working directory; but not the one that this package was imported from."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    found = set() if script is None else {os.path.dirname(os.path.realpath(script))}
    with suppress(FileNotFoundError):  # it was removed
        found.add(os.path.realpath(os.getcwd()))
    return found.difference({os.path.realpath(Path(__file__).parents[2])})


def default_children() -> None:
    """Lets this process wait for its children, which Linux forbids where whoever started it ignores SIGCHLD."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

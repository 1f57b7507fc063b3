"""Functions for the runtime's processes: die with the parent, set a name, end processes, start others with the same import path."""

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
_TRACKER_S = 1.0
_EXEC_S = 0.02

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
    """Asks the kernel for SIGCONT when the thread that started this process ends, so that a stopped process notices it and cleans up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def signal_with_parent(number: signal.Signals) -> None:
    """Asks the kernel for this signal when the thread that started this process ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def name_process(name: str) -> None:
    """Shows `name` (15 bytes at most) in ps and top."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


def is_stopped(pid: int | None) -> bool:
    """Whether a process is stopped by SIGSTOP or by a debugger."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def end_session(leader: int, mark: str, timeout_s: float = 5.0) -> None:
    """SIGKILLs the other processes in the session of `leader`, and those whose initial environment has `mark`; waits until they have ended.

    `mark` finds helper processes that `train_fn` started, also in sessions of their own. Resource trackers of multiprocessing may end by
    themselves: they remove the shared memory and semaphores that their processes have left, when these have ended.
    """
    deadline = time.monotonic() + timeout_s
    while (found := _left_twice(leader, mark)) and time.monotonic() < deadline:  # repeated: one may just have started another
        users = [pid for pid in found if not _is_tracker(pid)]
        for pid in users or found:
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    if users or not select.select([pidfd], [], [], _TRACKER_S)[0]:
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
                finally:
                    os.close(pidfd)


def _is_tracker(pid: int) -> bool:
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _left_twice(leader: int, mark: str) -> list[int]:
    """Looks again when nothing is found: the environment of a process that is just being executed is empty."""
    found = _left(leader, mark)
    if not found:
        time.sleep(_EXEC_S)
        found = _left(leader, mark)
    return found


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
    """Returns a command that runs `command`, dies with this process, and raises its soft limit of files to the hard one (at most 4,096).

    A foreign program cannot ask the kernel to die with its parent; the request survives exec.
    """
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]


def import_path() -> list[str]:
    """Returns this process's import path, without entries that Python skips: non-strings, and a working directory that is gone."""
    found = []
    for entry in sys.path:
        if isinstance(entry, str):
            with suppress(FileNotFoundError):  # from getcwd
                found.append(entry or os.getcwd())
    return found


def module_command(module: str, *arguments: str) -> list[str]:
    """Returns a command that runs `module.main()` in a new interpreter with this one's import path, in any working directory.

    The script's directory comes last, so that a file such as `six.py` in it does not shadow a package of the runtime.
    """
    own = _script_directories()
    path = import_path()
    path.sort(key=lambda entry: os.path.realpath(entry) in own)
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; main()"
    return [sys.executable, "-c", code, *arguments]


def _script_directories() -> set[str]:
    """Returns the script's directory and the working directory, except the one that this package was imported from."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    found = set() if script is None else {os.path.dirname(os.path.realpath(script))}
    with suppress(FileNotFoundError):  # it was removed
        found.add(os.path.realpath(os.getcwd()))
    return found.difference({os.path.realpath(Path(__file__).parents[2])})


def default_children() -> None:
    """Lets this process wait for its children: it cannot if it inherited an ignored SIGCHLD."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

"""Another user of the host, who tries to read, reach and disturb a job. He becomes `nobody`, and prints what has succeeded, as JSON.

stdin    {pids, paths, listening, texts}    processes, files and folders of the job; its TCP addresses; what must not be found anywhere
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NOBODY = 65534
_PIDFD_GETFD = 438
_PTRACE_SEIZE = 0x4206
_libc = ctypes.CDLL(None, use_errno=True)
succeeded: list[str] = []


def attempt(what: str, act: Callable[[], Any]) -> Any:
    """Notes what succeeded, and returns its result."""
    try:
        result = act()
    except (OSError, ProcessLookupError):
        return None
    succeeded.append(what)
    return result


def called(function: Any, *arguments: Any) -> int:
    result = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def opened(path: Path, how: str = "rb") -> None:
    with path.open(how) as file:
        if how == "rb":
            file.read(1)


def disturb(pid: int) -> None:
    """Reads and disturbs a process."""
    for name in ("environ", "mem", "maps", "auxv", "pagemap", "io", "stack"):
        attempt(f"read /proc/{pid}/{name}", lambda name=name: opened(Path(f"/proc/{pid}/{name}")))
    attempt(f"list /proc/{pid}/fd", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt(f"list /proc/{pid}/map_files", lambda: os.listdir(f"/proc/{pid}/map_files"))
    attempt(f"enter /proc/{pid}/cwd", lambda: os.listdir(f"/proc/{pid}/cwd/"))
    for fd in range(3, 64):
        attempt(f"open /proc/{pid}/fd/{fd}", lambda fd=fd: os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK))
    attempt(f"trace {pid}", lambda: called(_libc.ptrace, _PTRACE_SEIZE, pid, None, None))
    pidfd = os.pidfd_open(pid)
    for fd in range(64):
        attempt(f"take descriptor {fd} of {pid}", lambda fd=fd: called(_libc.syscall, _PIDFD_GETFD, pidfd, fd, 0))
    for number in (0, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):
        attempt(f"send signal {int(number)} to {pid}", lambda number=number: os.kill(pid, number))
        attempt(f"send signal {int(number)} to {pid} by pidfd", lambda number=number: signal.pidfd_send_signal(pidfd, number))
    attempt(f"renice {pid}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt(f"pin {pid}", lambda: os.sched_setaffinity(pid, {0}))
    attempt(f"limit {pid}", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, 8)))


def look(path: Path) -> None:
    """Reads, writes and locks files and folders of the job."""
    if path.is_dir():
        for entry in attempt(f"list {path}", lambda: sorted(path.iterdir())) or ():
            look(entry)
        attempt(f"write in {path}", (path / "intruder").touch)
        attempt(f"lock {path}", lambda: fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB))
    else:
        attempt(f"read {path}", lambda: opened(path))
        attempt(f"write {path}", lambda: opened(path, "ab"))


def reach(pids: list[int]) -> None:
    """Connects to every UNIX socket whose name says that it may be the job's."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        name = line.split(maxsplit=7)[7] if len(line.split(maxsplit=7)) == 8 else ""
        if name.startswith("@elastic") or any(folder in name for folder in folders):
            attempt(f"talk to {name}", lambda name=name: spoken(name))


def spoken(name: str) -> None:
    """Raises OSError if nobody answers, and the connection is closed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2.0)
        sock.connect("\0" + name[1:] if name.startswith("@") else name)
        sock.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        if not sock.recv(100):
            raise OSError("closed")


def found(texts: list[str]) -> list[str]:
    """Where anybody can read one of these texts of processes."""
    places = []
    for entry in Path("/proc").iterdir():
        for name in ("cmdline", "environ", "comm", "status", "wchan") if entry.name.isdigit() and int(entry.name) != os.getpid() else ():
            try:
                data = (entry / name).read_bytes()
            except OSError:
                continue
            places += [f"{entry / name}" for text in texts if text.encode() in data]
    return places


if __name__ == "__main__":
    told = json.load(sys.stdin)
    folders = [str(path) for path in told["paths"]]
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    for process in told["pids"]:
        disturb(process)
    for place in told["paths"]:
        look(Path(place))
    reach(told["pids"])
    print(json.dumps({"succeeded": succeeded, "found": found(told["texts"])}))

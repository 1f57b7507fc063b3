"""Sockets and addresses: listening, address format, and the check of a connection's user.

Within a host a worker listens at a socket file in the job's private directory, which no other user can reach. If there is no such
directory, or no file can be made in it, the socket is in the abstract namespace, which every user of the host can reach. Therefore each end
of a UNIX connection also checks the user of the other end.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from elastic.errors import LinkError

SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC})
"""Errors that mean that this process or host has no descriptors or memory left for now."""

SocketAddress = bytes | tuple[str, int]

_BACKLOG = 4096
_BUFFER_BYTES = 4 << 20
_PATH_BYTES = 107
_CREDENTIALS = struct.Struct("iII")
_KEEPALIVE = {
    socket.TCP_NODELAY: 1,
    socket.TCP_KEEPIDLE: 2,
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: 3,
    # For a host that vanished with unacknowledged data. The kernel of a stopped worker keeps acknowledging until its agent kills it.
    socket.TCP_USER_TIMEOUT: 20_000,
}


def stream(family: socket.AddressFamily) -> socket.socket:
    """Returns a new non-blocking stream socket that no child inherits."""
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def listen_tcp(interface: str) -> tuple[socket.socket, str]:
    """Returns a socket that listens at a free port of an IP address, and its part of the worker's address."""
    sock = _listening(_family(interface), (interface, 0))
    return sock, f"tcp:{interface}:{sock.getsockname()[1]}"


def listen_unix(directory: Path | None, name: str) -> tuple[socket.socket, str, Path | None]:
    """Returns a socket that listens at the file `directory/name` or in the abstract namespace, its part of an address, and its file."""
    if directory is not None:
        path = directory.absolute() / name
        with suppress(OSError):
            return listen_at(path), f"unix:{quote(str(path))}", path
    abstract = f"elastic-{secrets.token_hex(12)}"
    return _listening(socket.AF_UNIX, b"\0" + abstract.encode()), f"unix:@{abstract}", None


def listen_at(path: Path) -> socket.socket:
    """Returns a socket that listens at a new file, in a directory that it makes for this user alone.

    Raises OSError if it cannot, or if another user has made the directory.
    """
    _make_private(path.parent)
    temporary = path.with_name(f"{path.name}.new")  # not yet `path`: between `bind` and `listen` dialers are refused
    with suppress(FileNotFoundError):
        temporary.unlink()
    with _short(temporary) as short:
        sock = _listening(socket.AF_UNIX, short)
    try:
        os.rename(temporary, path)
    except OSError:
        sock.close()
        raise
    return sock


def connect(sock: socket.socket, target: SocketAddress | Path) -> None:
    """Begins to connect. Raises OSError; BlockingIOError with EINPROGRESS if the outcome is not known yet."""
    if isinstance(target, Path):
        with _short(target) as short:
            sock.connect(short)
    else:
        sock.connect(target)


def target_of(peer: int, address: str, *, local: bool) -> tuple[socket.AddressFamily, SocketAddress | Path]:
    """Returns family and target to connect to for an address such as `unix:PATH,tcp:IP:PORT`. Raises LinkError if no part fits."""
    parts = dict(part.split(":", 1) for part in address.split(",") if ":" in part)
    if local and "unix" in parts:
        name = parts["unix"]
        return socket.AF_UNIX, b"\0" + name[1:].encode() if name.startswith("@") else Path(unquote(name))
    ip, _, port = parts.get("tcp", "").rpartition(":")
    if not port.isdigit():
        raise LinkError(f"worker {peer} is on another host and has no TCP address: {address}", peer=peer)
    return _family(ip), (ip, int(port))


def of_this_user(sock: socket.socket) -> bool:
    """Whether the other end of a connection within the host belongs to this user; True for TCP, where it cannot be checked."""
    if sock.family is not socket.AF_UNIX:
        return True
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user == os.geteuid()


def tune(sock: socket.socket) -> None:
    """Sets large buffers, and for TCP the timeouts that detect a vanished host. Raises OSError if the connection is gone."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    if sock.family is not socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _listening(family: socket.AddressFamily, target: SocketAddress) -> socket.socket:
    sock = stream(family)
    try:
        sock.bind(target)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _make_private(directory: Path) -> None:
    """Makes the directory for this user alone. Raises OSError if it cannot, or if another user has made one of that name."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(errno.EPERM, "not a directory of this user alone", str(directory))


@contextmanager
def _short(path: Path) -> Iterator[bytes]:
    """A path of at most 107 bytes, the kernel's limit for a socket; a longer one goes through a descriptor of its directory."""
    whole = os.fsencode(path)
    if len(whole) <= _PATH_BYTES:
        yield whole
        return
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield os.fsencode(f"/proc/self/fd/{descriptor}/{path.name}")
    finally:
        os.close(descriptor)

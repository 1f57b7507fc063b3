"""Python runs this module when it starts with this folder in its path: TCP connections of the process then go through a proxy.

The proxy listens at the port `PROXY_PORT` of this machine, and gets the wanted address as a first line (see `proxies.py`).
"""

from __future__ import annotations

import os
import socket
from typing import Any

_connect = socket.socket.connect
_PROXY = ("127.0.0.1", int(os.environ["PROXY_PORT"]))


def _through_proxy(sock: socket.socket, address: Any) -> None:
    if sock.family != socket.AF_INET or sock.type != socket.SOCK_STREAM:
        _connect(sock, address)
        return
    timeout = sock.gettimeout()
    sock.settimeout(5.0)
    try:
        _connect(sock, _PROXY)
        sock.sendall(f"{address[0]}:{address[1]}\n".encode())
    finally:
        sock.settimeout(timeout)


socket.socket.connect = _through_proxy

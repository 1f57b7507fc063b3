"""A stand-in for the metadata services of clouds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NOW = 1_700_000_000.0  # its time, which is not this machine's


@dataclass
class StandIn:
    """A metadata service: what it answers at each path, and the requests that it has had."""

    address: str
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    refuses: Callable[[str, str, dict[str, str]], int | None] = lambda method, path, headers: None
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[StandIn]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.requests.append((self.command, self.path))
            headers = {name.lower(): value for name, value in self.headers.items()}
            refused = made.refuses(self.command, self.path, headers)
            status, text = (refused, "refused") if refused is not None else made.answers.get(self.path, (404, "<html>not found"))
            self.send_response_only(status)
            self.send_header("Date", formatdate(NOW, usegmt=True))
            if 300 <= status < 400:
                self.send_header("Location", text)
            self.end_headers()
            if status != 204:
                self.wfile.write(text.encode())

        do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Is silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = StandIn(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

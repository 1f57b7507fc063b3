"""A web page that shows how a job stands, for `elastic top --web`: a small HTTP server on loopback.

    GET  /             the page, which asks for /live.json every second
    GET  /live.json    the job's state (`elastic.agent.live`), the last events, and a history of loss and seconds per step
    GET  /report.html  the page of `elastic report`, if the job's run directory is on this host
    POST /drain        {secret, host}: drains a host
    POST /kill         {secret, worker}: ends a worker's process

The two POST requests need the job's secret each time. Requests are refused if their `Host` header does not name this server (DNS rebinding)
or if their `Origin` is another site.
"""

from __future__ import annotations

import hmac
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from elastic.errors import ElasticError, SettingsError
from elastic.observe.page import STYLE

_FILES = Path(__file__).parent / "web_page"
_ADDRESS = "127.0.0.1"
_EVENTS, _HISTORY = 50, 600
_MOST_BYTES = 4096
_ENDS_S = 0.02  # how long `shutdown` may take
_WRONG_S = 1.0  # how long the answer to a wrong secret takes
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; frame-ancestors 'none'"
_INLINE = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"  # the report is one file without scripts


class Viewed(Protocol):
    """A job that is looked at."""

    @property
    def over(self) -> bool: ...
    def events(self) -> list[dict[str, Any]]: ...
    def standing(self) -> dict[str, Any]: ...


class Board:
    """What the page shows: the newest state of the job, its last events, and a history. `look` is called regularly, by one thread.

    `shown` makes the text of an event. Other threads call `to_json`.
    """

    def __init__(self, job: Viewed, shown: Callable[[dict[str, Any]], str]) -> None:
        self._job, self._shown = job, shown
        self._lock = threading.Lock()
        self._standing: dict[str, Any] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._history: deque[tuple[int, float | None, float | None]] = deque(maxlen=_HISTORY)
        self._over = False

    def look(self) -> bool:
        """Asks the job. Returns whether it has not ended."""
        over = self._job.over
        events = [{"at": event["at"], "kind": event["kind"], "text": self._shown(event)} for event in self._job.events()]
        try:
            standing = self._job.standing()
        except ElasticError:  # it has not begun to train, or has ended
            standing = None
        with self._lock:
            self._events.extend(events)
            self._standing, self._over = standing or self._standing, over
            if standing is not None and standing["step"] is not None and (not self._history or self._history[-1][0] != standing["step"]):
                self._history.append((standing["step"], standing["loss"], standing["seconds"]))
        return not over

    def to_json(self) -> dict[str, Any]:
        """Returns the newest state as JSON."""
        with self._lock:
            return {
                "now": time.time(),
                "over": self._over,
                "standing": self._standing,
                "events": [*self._events],
                "history": [*self._history],
            }


class Acts:
    """Carries out what may be asked on the page, for who knows the job's secret. `key` makes what is compared of a secret."""

    def __init__(self, secret: str, key: Callable[[str], str], ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._secret, self._key, self._ask = secret, key, ask
        self._lock = threading.Lock()

    def act(self, what: str, request: Mapping[str, Any]) -> tuple[HTTPStatus, str]:
        """Returns the answer to a request. Wrong secrets are answered late, one after the other."""
        with self._lock:
            try:
                right = hmac.compare_digest(self._secret.encode(), self._key(str(request.get("secret", ""))).encode())
            except SettingsError:  # too short for a secret
                right = False
            if not right:
                time.sleep(_WRONG_S)
                return HTTPStatus.FORBIDDEN, "this is not the job's secret: nothing was done"
            name, kind = ("host", str) if what == "drain" else ("worker", int)
            if type(request.get(name)) is not kind:
                return HTTPStatus.BAD_REQUEST, f"give the {name}: nothing was done"
            try:
                return HTTPStatus.OK, self._ask({"what": what, name: request[name]})["said"]
            except ElasticError as error:
                return HTTPStatus.CONFLICT, str(error)


def serve(board: Board, port: int, acts: Acts | None, report: Callable[[], str] | None) -> ThreadingHTTPServer:
    """Serves the page on loopback, in a thread; port 0 takes a free one. Raises SettingsError if the port cannot be used.

    `acts` is None if nothing may be asked, `report` if there is no run directory to report on.
    """

    class Handler(_Handler):
        pass

    Handler.board, Handler.acts, Handler.report = board, acts, None if report is None else staticmethod(report)  # type: ignore[assignment]
    try:
        server = ThreadingHTTPServer((_ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"port {port} of {_ADDRESS} cannot be used: {why}. Give another one, or 0 for a free one") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(_ENDS_S,), name="web", daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer
    board: Board
    acts: Acts | None
    report: Callable[[], str] | None
    timeout = 10.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not self._allowed():
            return
        if path == "/live.json":
            told = {**self.board.to_json(), "acts": self.acts is not None, "report": self.report is not None}
            self._answer(HTTPStatus.OK, json.dumps(told), "application/json")
        elif path == "/report.html" and self.report is not None:
            try:
                self._answer(HTTPStatus.OK, self.report(), "text/html", _INLINE)
            except SettingsError as error:
                self._answer(HTTPStatus.NOT_FOUND, str(error), "text/plain")
        elif path in _PAGES:
            file, kind = _PAGES[path]
            self._answer(HTTPStatus.OK, file.read_text(), kind)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is no such page", "text/plain")

    def do_POST(self) -> None:
        if not self._allowed():
            return
        what = self.path.removeprefix("/")
        if what not in ("drain", "kill"):
            self._answer(HTTPStatus.NOT_FOUND, "there is no such request", "text/plain")
        elif self.acts is None:
            self._answer(HTTPStatus.FORBIDDEN, "this page only shows: start it with --etcd and --secret-file", "text/plain")
        elif self.headers.get_content_type() != "application/json":  # which a form of another site cannot send
            self._answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON", "text/plain")
        else:
            request = self._request()
            found = (HTTPStatus.BAD_REQUEST, "not a JSON object") if request is None else self.acts.act(what, request)
            self._answer(*found, "text/plain")

    def _request(self) -> dict[str, Any] | None:
        try:
            size = int(self.headers.get("Content-Length", ""))
            found = json.loads(self.rfile.read(size)) if 0 <= size <= _MOST_BYTES else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _allowed(self) -> bool:
        port = self.server.server_port
        names = {f"{name}:{port}" for name in (_ADDRESS, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names):
            return True
        self._answer(HTTPStatus.FORBIDDEN, f"open this page as http://{_ADDRESS}:{port}/ (or let ssh forward this port)", "text/plain")
        return False

    def _answer(self, status: HTTPStatus, text: str, kind: str, policy: str = _POLICY) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


_PAGES = {
    "/": (_FILES / "page.html", "text/html"),
    "/script.js": (_FILES / "script.js", "text/javascript"),
    "/style.css": (STYLE, "text/css"),
    "/more.css": (_FILES / "more.css", "text/css"),
}

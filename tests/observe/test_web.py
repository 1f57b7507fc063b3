"""Tests the page of `elastic top --web`: what it serves, to whom, and what may be asked with it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.errors import SettingsError
from elastic.launch.sharing import key_of
from elastic.observe import web
from elastic.observe.web import Acts, Board

SECRET = "the secret of the job that is shown"
STANDING: dict[str, Any] = {"at": 1.0, "job": "job", "step": 7, "loss": 2.5, "seconds": 0.1}


class Job:
    """A job that has made one step more each time it is asked."""

    over = False

    def __init__(self) -> None:
        self.step = 7
        self.asked: list[dict[str, Any]] = []

    def events(self) -> list[dict[str, Any]]:
        return [{"at": 2.0, "kind": "said", "text": f"step {self.step}"}]

    def standing(self) -> dict[str, Any]:
        self.step += 1
        return {**STANDING, "step": self.step}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request == {"what": "kill", "worker": 9}:
            raise SettingsError("there is no worker 9; there are 0, 1")
        self.asked.append(request)
        return {"said": "done"}


class Page:
    def __init__(self, port: int, job: Job, board: Board) -> None:
        self.port, self.job, self.board = port, job, board

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        kind = {} if body is None else {"Content-Type": "application/json"}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), {**kind, **names})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text


@pytest.fixture
def page() -> Iterator[Page]:
    job = Job()
    board = Board(job, lambda event: event["text"])
    with web.serve(board, 0, Acts(key_of(SECRET), key_of, job.ask), None) as server:
        yield Page(server.server_port, job, board)
        server.shutdown()


def test_it_shows_the_job(page: Page) -> None:
    assert json.loads(page.ask("GET", "/live.json")[1])["standing"] is None
    assert page.board.look()
    assert page.board.look()
    told = json.loads(page.ask("GET", "/live.json")[1])
    assert told["standing"] == {**STANDING, "step": 9}
    assert told["history"] == [[8, 2.5, 0.1], [9, 2.5, 0.1]]
    assert [event["text"] for event in told["events"]] == ["step 7", "step 8"]
    assert (told["over"], told["acts"], told["report"]) == (False, True, False)


def test_the_state_stays_when_the_job_has_ended(page: Page) -> None:
    page.board.look()
    page.job.over = True
    assert not page.board.look()
    assert json.loads(page.ask("GET", "/live.json")[1])["over"]


@pytest.mark.parametrize("path", ["/", "/script.js", "/style.css", "/more.css"])
def test_its_files(page: Page, path: str) -> None:
    assert page.ask("GET", path)[0] == 200


@pytest.mark.parametrize("path", ["/report.html", "/../web.py", "/etc/passwd", "/live", "/report"])
def test_what_is_not_there(page: Page, path: str) -> None:
    assert page.ask("GET", path) == (404, "there is no such page")


@pytest.mark.parametrize(
    ("path", "request_"), [("/drain", {"what": "drain", "host": "a"}), ("/kill", {"what": "kill", "worker": 1})], ids=["drain", "kill"]
)
def test_who_knows_the_secret_may_ask(page: Page, path: str, request_: dict[str, Any]) -> None:
    assert page.ask("POST", path, {**request_, "secret": SECRET}) == (200, "done")
    assert page.job.asked == [request_]


def test_the_refusal_of_the_job_is_shown(page: Page) -> None:
    assert page.ask("POST", "/kill", {"worker": 9, "secret": SECRET}) == (409, "there is no worker 9; there are 0, 1")


@pytest.mark.parametrize(
    "body",
    [{"worker": 1}, {"worker": 1, "secret": "short"}, {"worker": 1, "secret": SECRET + "!"}, {"worker": 1, "secret": 7}],
    ids=["none", "short", "wrong", "number"],
)
def test_nobody_else_may(page: Page, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[float] = []
    monkeypatch.setattr("elastic.observe.web.time", SimpleNamespace(sleep=late.append))  # others' threads sleep too
    assert page.ask("POST", "/kill", body) == (403, "this is not the job's secret: nothing was done")
    assert (page.job.asked, late) == ([], [1.0])


@pytest.mark.parametrize("worker", [None, "1", True, 1.0, [1]])
def test_bad_requests(page: Page, worker: object) -> None:
    assert page.ask("POST", "/kill", {"worker": worker, "secret": SECRET}) == (400, "give the worker: nothing was done")


@pytest.mark.parametrize("body", [[], "text", {"secret": "x" * 5000}])
def test_what_is_no_request(page: Page, body: object) -> None:
    assert page.ask("POST", "/kill", body) == (400, "not a JSON object")


@pytest.mark.parametrize(
    "headers", [{"Host": "elsewhere.example"}, {"Host": "127.0.0.1:1"}, {"Origin": "http://elsewhere.example"}, {"Origin": "null"}]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/live.json"), ("POST", "/kill")])
def test_other_sites_get_nothing(page: Page, method: str, path: str, headers: dict[str, str]) -> None:
    status, text = page.ask(method, path, {"worker": 1, "secret": SECRET} if method == "POST" else None, **headers)
    assert (status, page.job.asked) == (403, [])
    assert f"http://127.0.0.1:{page.port}/" in text


def test_a_form_of_another_site(page: Page) -> None:
    assert page.ask("POST", "/kill", None, Content_Type="text/plain") == (415, "send JSON")


def test_without_the_secret_it_only_shows() -> None:
    job = Job()
    with web.serve(Board(job, str), 0, None, lambda: "<p>the report</p>") as server:
        made = Page(server.server_port, job, Board(job, str))
        assert made.ask("POST", "/drain", {"host": "a", "secret": SECRET})[0] == 403
        assert made.ask("GET", "/report.html") == (200, "<p>the report</p>")
        server.shutdown()


def test_a_port_that_is_taken(page: Page) -> None:
    with pytest.raises(SettingsError, match=rf"port {page.port} of 127.0.0.1 cannot be used: Address already in use. Give another one"):
        web.serve(page.board, page.port, None, None)

"""Tests notices of termination: each metadata service's form, against a stand-in, and everything that must not be taken for a notice."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic.agent.notice_watch import NoticeWatch
from elastic.errors import SettingsError
from elastic.host import notices
from elastic.host.notices import Notice, Unclear, notice_source
from tests.process.metadata_service import StandIn, serving

AWS = "/latest/meta-data/spot/instance-action"
AZURE = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
GCP = "/computeMetadata/v1/instance/preempted"


@pytest.fixture
def service() -> Iterator[StandIn]:
    with serving() as made:
        yield made


def with_token(token: Callable[[], str]) -> Callable[[str, str, dict[str, str]], int | None]:
    """IMDSv2: nothing without the token, which is only given on PUT with a time to live."""

    def refuses(method: str, path: str, headers: dict[str, str]) -> int | None:
        if path == "/latest/api/token":
            return None if method == "PUT" and int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", 0)) > 0 else 400
        return None if headers.get("x-aws-ec2-metadata-token") == token() else 401

    return refuses


def test_aws(service: StandIn) -> None:
    token = ["first"]
    service.refuses = with_token(lambda: token[0])
    service.answers["/latest/api/token"] = (200, "first")
    source = notice_source(f"aws={service.address}")
    assert source.look() is None
    service.answers["/latest/meta-data/events/recommendations/rebalance"] = (200, '{"noticeTime": "2023-11-14T22:13:20Z"}')
    assert source.look() is None
    assert service.requests == [("PUT", "/latest/api/token"), ("GET", AWS), ("GET", AWS)]
    token[0] = "second"
    service.answers["/latest/api/token"] = (200, "second")
    service.answers[AWS] = (200, '{"action": "terminate", "time": "2023-11-14T22:15:20Z"}')
    assert source.look() == Notice(why="AWS: this spot instance gets the action 'terminate'", left_s=120.0)


def test_azure(service: StandIn) -> None:
    service.refuses = lambda method, path, headers: None if headers.get("metadata") == "true" else 400
    service.answers[AZURE_NAME] = (200, "vm_1")
    source = notice_source(f"azure={service.address}/")

    def look(*events: dict[str, object]) -> Notice | None:
        service.answers[AZURE] = (200, json.dumps({"DocumentIncarnation": 1, "Events": events}))
        return source.look()

    event = {"EventId": "A", "ResourceType": "VirtualMachine", "EventStatus": "Scheduled", "NotBefore": "Tue, 14 Nov 2023 22:13:50 GMT"}
    assert look() is None
    assert look({**event, "EventType": "Freeze", "Resources": ["vm_1"]}, {**event, "EventType": "Preempt", "Resources": ["vm_0"]}) is None
    for kind in ("Preempt", "Terminate", "Redeploy", "Reboot"):
        found = look({**event, "EventType": "Freeze", "Resources": ["vm_1"]}, {**event, "EventType": kind, "Resources": ["vm_0", "vm_1"]})
        assert found == Notice(why=f"Azure: the event {kind} is scheduled for this machine", left_s=30.0)
    found = look({**event, "EventType": "Preempt", "Resources": ["vm_1"], "EventStatus": "Started", "NotBefore": ""})
    assert found is not None
    assert found.left_s is None


def test_azure_without_the_name_of_this_machine_drains_nobody(service: StandIn) -> None:
    event = {"EventType": "Preempt", "Resources": ["vm_1"], "NotBefore": ""}
    service.answers[AZURE] = (200, json.dumps({"Events": [event]}))
    with pytest.raises(Unclear, match="answers 404"):
        notice_source(f"azure={service.address}").look()


def test_gcp(service: StandIn) -> None:
    service.refuses = lambda method, path, headers: None if headers.get("metadata-flavor") == "Google" else 403
    source = notice_source(f"gcp={service.address}")
    service.answers[GCP] = (200, "FALSE")
    assert source.look() is None
    service.answers[GCP] = (200, "TRUE\n")
    assert source.look() == Notice(why="Google: this instance is preempted", left_s=30.0)


def test_the_real_addresses_are_the_defaults() -> None:
    titles = [notice_source(name).title for name in ("aws", "azure", "gcp")]
    places = ["AWS metadata service at http://169.254.169.254", "Azure metadata service at http://169.254.169.254"]
    assert titles == [f"the {place}" for place in [*places, "Google metadata service at http://metadata.google.internal"]]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", None),
        ("bye", None),
        ("45\n", 45.0),
        ("2023-11-14T22:13:50Z", 30.0),
        ("2023-11-14T23:13:50+01:00", 30.0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ('{"action": "stop", "time": "2023-11-14T22:13:50Z"}', 30.0),
        ('{"time": 12.5}', 12.5),
        ("2023-11-14T22:00:00Z", 0.0),
        ("1e999", None),
        ("nan", None),
        ("[" * 30000, None),
    ],
)
def test_a_url_and_the_time_that_its_notice_leaves(service: StandIn, text: str, left: float | None) -> None:
    source = notice_source(f"{service.address}/gone?host=1")
    assert source.look() is None
    service.answers["/gone?host=1"] = (204, "")
    assert source.look() is None
    service.answers["/gone?host=1"] = (200, text)
    assert source.look() == Notice(why=f"{service.address}/gone?host=1 answers 200", left_s=left)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "leave"
    source = notice_source(f"file:{path}")
    assert source.look() is None
    path.write_text("20")
    assert source.look() == Notice(why=f"file {path} is there", left_s=20.0)
    path.unlink()
    path.mkdir()
    with pytest.raises(Unclear, match="Is a directory"):
        source.look()


@pytest.mark.parametrize("kind", ["aws", "azure", "gcp"])
@pytest.mark.parametrize(
    "answer", [(500, "oops"), (503, ""), (200, ""), (200, "<html>login"), (200, "[1]"), (200, "\0\xff"), (200, "{}"), (302, "/login")]
)
def test_what_no_service_says_is_no_notice(service: StandIn, kind: str, answer: tuple[int, str]) -> None:
    service.answers["/latest/api/token"] = (200, "token")
    service.answers["/login"] = (200, '{"action": "terminate", "time": "now"}')
    service.answers[AWS] = service.answers[AZURE] = service.answers[GCP] = answer
    with pytest.raises(Unclear):
        notice_source(f"{kind}={service.address}").look()


@pytest.mark.parametrize("status", [302, 401, 403, 500])
def test_of_a_url_only_200_is_a_notice(service: StandIn, status: int) -> None:
    service.answers["/gone"] = (status, "/other")
    service.answers["/other"] = (200, "")
    with pytest.raises(Unclear, match=f"it answers {status}"):
        notice_source(f"{service.address}/gone").look()


@pytest.mark.parametrize("kind", ["aws=", "azure=", "gcp=", ""])
def test_a_service_that_is_not_there_or_does_not_answer_is_no_notice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(Unclear, match=r"no answer for 0.1 s"):
            notice_source(f"{kind}http://127.0.0.1:{port}").look()
    with pytest.raises(Unclear, match="refused"):
        notice_source(f"{kind}http://127.0.0.1:{port}").look()


def test_what_is_no_http_is_no_notice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as other:
                other.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(Unclear):
            notice_source(f"http://127.0.0.1:{server.getsockname()[1]}").look()
        thread.join()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "use 'file:PATH'"),
        ("awss", "use 'file:PATH'"),
        ("ftp://there", "use 'file:PATH'"),
        ("aws=there:80", "'there:80' is no URL"),
        ("aws=", "'' is no URL"),
        ("http://", "'http://' is no URL"),
        ("http://there:port/", "'http://there:port/' is no URL"),
        ("file:", "is a directory; name a file"),
        ("file:/tmp", "'/tmp' is a directory; name a file"),
        ("file:/nowhere/at/all", "there is no directory '/nowhere/at'"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(text: str, why: str) -> None:
    with pytest.raises(SettingsError, match="drain_on=") as caught:
        notice_source(text)
    assert why in str(caught.value)


class Scripted:
    """A source that gives these answers, one after the other."""

    title = "the scripted one"

    def __init__(self, *answers: Notice | Exception | None) -> None:
        self._answers = iter(answers)

    def look(self) -> Notice | None:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_watch_says_once_that_it_cannot_see_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.agent.notice_watch.EVERY_S", 0.001)
    heard: queue.Queue[object] = queue.Queue()
    notice = Notice(why="so")
    watch = NoticeWatch(Scripted(None, Unclear("odd"), Unclear("odder"), None, Unclear("again"), notice), heard.put, heard.put)
    lines = [heard.get(timeout=10) for _ in range(3)]
    watch.close()
    said = "the scripted one gives no notice of termination, and may not be able to: {}; it is asked again and again"
    assert lines == [said.format("odd"), said.format("again"), notice]
    assert heard.empty()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_a_job_stops_at_a_step_boundary_on_a_notice_and_exits_as_on_sigterm(tmp_path: Path, service: StandIn) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, elastic, pathlib\n"
        "def train(job):\n"
        "    trainer = elastic.Trainer([torch.nn.Linear(4, 4)], lambda output, batch: output.mean(),\n"
        "        lambda p: torch.optim.SGD(p, lr=0.1), torch.utils.data.TensorDataset(torch.ones(64, 4)),\n"
        "        batch_size=4, micro_batch_size=2, checkpoint='" + str(tmp_path / "saved") + "', every=100_000)\n"
        "    for report in trainer.run(100_000):\n"
        "        pathlib.Path('" + str(tmp_path / "trains") + "').touch()\n"
    )
    service.answers["/gone"] = (500, "")
    command = [sys.executable, "-m", "elastic.cli.main", "run", f"{script}:train", "--drain-on", f"{service.address}/gone"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "trains").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        service.answers["/gone"] = (200, "60")
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert f"elastic: this machine is about to be taken away, in 60 s ({service.address}/gone answers 200)\n" in err
    assert err.count("gives no notice of termination, and may not be able to: it answers 500") == 1
    assert [path.name[:5] for path in (tmp_path / "saved").iterdir() if path.is_dir()] == ["step-"]

"""Tests jobs that end normally or by an error in the workers, run from this process."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastic
from elastic.errors import EtcdUnavailable, JobFailed, MismatchError, NotInJob, SettingsError, TrainFunctionError
from elastic.settings import best_isa, worker_environment
from elastic.view import View
from tests.conftest import Leftovers
from tests.etcd_access import Claim, EtcdClient, EtcdEndpoint, etcd_with_login
from tests.etcd_cluster import cluster as etcd_cluster
from tests.process import functions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]


def test_workers_run_in_a_sound_environment_and_leave_nothing(leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_TEST_MARK", "seen")
    result = elastic.run(functions.facts, workers=3, args=["text", 7], seed=5)
    assert leftovers.processes() == {}, "also the helper processes that the workers forgot"
    assert (result.epoch, result.stopped) == (0, False)
    seen = [result.value[str(worker)] for worker in range(3)]
    assert [worker["worker"] for worker in seen] == [0, 1, 2]
    assert [worker["name"] for worker in seen] == ["elastic-w0", "elastic-w1", "elastic-w2"]
    assert [worker["profile"] for worker in seen] == [True, False, False]
    for worker in seen:
        assert worker["args"] == ["text", 7]
        assert worker["current"]
        assert worker["stdin"] == "/dev/null"
        own = f"{worker['directory']}/activity/{worker['worker']}"
        opened = sorted(name.partition(":")[0] for name in worker["open"])
        assert opened == ["/memfd", "/memfd", own, "socket"], "only its agent socket, its activity, and its segment and a map of its header"
        assert worker["threads"] == 1
        assert worker["protobuf"] is None
        assert worker["mark"] == "seen"
        assert Path(worker["directory"]).parent == leftovers.directory
        fixed = worker_environment(1, best_isa())
        assert {name: value for name, value in worker["fingerprint"].items() if name in fixed}.items() <= fixed.items()
        assert worker["fingerprint"]["MKL_CBWR"].endswith("STRICT")
    for field in ("parent", "secret", "random", "fingerprint"):
        assert len({str(worker[field]) for worker in seen}) == 1, field


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    with etcd_with_login(tmp_path) as endpoint:
        yield endpoint


def test_a_given_etcd_carries_the_first_view_and_is_left_clean(guarded: str) -> None:
    endpoint = f"root:right@{guarded}"
    with pytest.raises(EtcdUnavailable, match="check user and password"):
        elastic.run(functions.announces, workers=2, etcd=f"root:wrong@{guarded}")
    client = EtcdClient(EtcdEndpoint.parse(endpoint))
    Claim(client, "taken", "first").take(client.grant(60))
    left = client.get_prefix("/elastic/")
    client.put("/elastic/mine/earlier/view", "of a job whose agent was killed")
    with pytest.raises(SettingsError, match=rf"a job of this name runs \(on host .*, process {os.getpid()}, incarnation first\)"):
        elastic.run(functions.announces, workers=2, etcd=endpoint, name="taken")
    watched: list[str] = []
    client.watch_prefix("/elastic/mine/", lambda entry: watched.append(f"{entry.key} {entry.value}"))
    result = elastic.run(functions.announces, workers=3, stages=2, etcd=endpoint, name="mine")
    view = View.from_json(result.value["view"])
    assert (result.epoch, view.epoch, view.attempt) == (1, 1, 0)
    assert [member.address for member in view.members] == ["unix:@0", "unix:@1", "unix:@2"]
    assert len(view.plan.stages) == 2
    assert (result.value["epoch"], result.value["leader"], result.value["kept"]) == (1, True, True)
    assert result.value["etcd"] is None, "workers need no password"
    client.delete("/elastic/mine/earlier/view")
    assert client.get_prefix("/elastic/") == left, "of the other incarnations nothing is touched"
    client.close()
    assert any(re.match("/elastic/mine/[0-9a-f]{16}/view {", line) for line in watched)
    assert any(re.match("/elastic/mine/[0-9a-f]{16}/workers/2 {", line) for line in watched)
    assert not any("right" in line for line in watched), "the password is in no key"


def test_workers_that_disagree_are_named() -> None:
    with pytest.raises(MismatchError, match=r"workers 2, 3 .* settings\.batch_size is 33 there and 32 on worker 0"):
        elastic.run(functions.disagrees, workers=4)


@pytest.mark.long
def test_a_worker_that_never_joins_does_not_hold_the_others_up() -> None:
    with pytest.raises(JobFailed, match=r"returned on workers \[1\] before making a Trainer, and workers \[0, 2\]|workers \[[02]\] wait"):
        elastic.run(functions.does_not_join, workers=3)


@pytest.mark.long
def test_the_cause_is_reported_and_not_its_consequences() -> None:
    with pytest.raises(JobFailed, match=r"worker 1 failed in epoch 3, step 17") as failure:
        elastic.run(functions.consequences, workers=3)
    text = str(failure.value)
    assert text.count("Traceback") == 1
    assert text.rstrip().endswith("ZeroDivisionError: the root of it")
    assert "PeerLost" not in text


@pytest.mark.long
def test_an_exception_that_train_fn_swallows_ends_the_job_all_the_same() -> None:
    with pytest.raises(JobFailed, match=r"(?s)Error: the end of the training.*train_fn caught this exception and neither raised"):
        elastic.run(functions.swallows, workers=2)


@pytest.mark.long
def test_a_value_that_cannot_travel_is_refused() -> None:
    with pytest.raises(TrainFunctionError, match=r"train_fn \(.*functions.py:\d+\) returned a socket that cannot be sent to the launcher"):
        elastic.run(functions.returns_a_socket, workers=1)


@pytest.mark.long
def test_a_thread_may_run_a_job_and_nothing_comes_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    caught: list[BaseException] = []

    def body() -> None:
        try:
            elastic.run(functions.exits, workers=1)
        except JobFailed as error:
            caught.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert "SystemExit: 3" in str(caught[0])


def test_an_etcd_that_is_not_there_yet_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with etcd_cluster(tmp_path / "etcd") as etcd:
        etcd.kill()
        listener = socket.create_server(("127.0.0.1", etcd.ports[0]))

        def start() -> None:
            """Starts etcd when somebody has asked for it."""
            with listener:
                listener.accept()[0].close()
            etcd.start()

        later = threading.Thread(target=start)
        later.start()
        result = elastic.run(functions.announces, workers=2, etcd=etcd.addresses)
        later.join()
    assert result.value["epoch"] == 1
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith(f"elastic: etcd at {etcd.addresses} cannot be reached")
    assert "the start of the job waits for it" in first
    assert last == "elastic: etcd answers again: the work that waited for it continues"


def test_outside_of_a_job_there_is_no_current_one() -> None:
    assert "inside the train_fn" in functions.outside()
    with pytest.raises(NotInJob):
        elastic.worker.job.current_job()  # pyright: ignore[reportAttributeAccessIssue]
    assert "elastic-" not in str(os.listdir(os.environ["TMPDIR"]))


@pytest.mark.long
def test_a_worker_that_has_finished_stays_until_all_have(tmp_path: Path) -> None:
    """Its links carry what others still wait for, and their closing would look like its death."""
    assert elastic.run(functions.finishes_last, workers=2, args=[str(tmp_path)]).value is True

"""Tests that clocks come back when several processes die at once, when a guardian is stopped, or when a signal comes while it restores."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest

from elastic.errors import PowerError
from elastic.power.clocks import Clocks
from tests.power.test_guardian import restored

pytestmark = pytest.mark.slow


@pytest.fixture
def clocks(standin, tmp_path):
    made = Clocks("a", tmp_path / "clocks", tmp_path / "no-daemon")
    yield made
    made._channel.close()
    guardian = made._guardian
    if guardian is not None:
        guardian.kill()
        guardian.wait()


def kill(clocks: Clocks) -> None:
    assert clocks._guardian is not None
    clocks._guardian.kill()
    clocks._guardian.wait()


def test_close_restores_what_a_dead_guardian_has_left(clocks, standin):
    clocks.lock(standin.uuids[0], 1080)
    kill(clocks)
    assert clocks.close() == []
    assert standin.locked == [0] * 4


@pytest.mark.long
def test_guardians_that_die_too_often_leave_no_clock(clocks, standin):
    for _ in range(3):
        clocks.lock(standin.uuids[0], 1080)
        kill(clocks)
        clocks.renew()
    clocks.lock(standin.uuids[0], 1080)
    kill(clocks)
    with pytest.raises(PowerError, match="has died 4 times"):
        clocks.renew()
    assert standin.locked == [0] * 4


@pytest.mark.long
def test_close_restores_what_a_stopped_guardian_keeps(clocks, standin, monkeypatch):
    monkeypatch.setattr("elastic.power.clocks._ANSWER_S", 0.5)
    monkeypatch.setattr("elastic.power.clocks._CLOSE_S", 0.2)
    clocks.lock(standin.uuids[0], 1080)
    os.kill(clocks._guardian.pid, signal.SIGSTOP)
    assert clocks.close() == []
    assert standin.locked == [0] * 4


@pytest.mark.long
@pytest.mark.parametrize("spoil", ["removed", "another user's", "a link", "records removed"])
def test_a_dead_guardians_clocks_come_back_without_its_records(clocks, standin, tmp_path, spoil):
    directory = tmp_path / "clocks"
    clocks.lock(standin.uuids[0], 1080)
    standin.gpus[1].locked_min = standin.gpus[1].locked_max = 1215  # an operator's
    kill(clocks)
    if spoil == "another user's":
        directory.chmod(0o777)
    elif spoil == "records removed":
        for path in directory.iterdir():
            path.unlink()
    else:
        directory.rename(tmp_path / "elsewhere")
        if spoil == "a link":
            directory.symlink_to(tmp_path / "elsewhere")
    assert clocks.close() == []
    assert standin.locked == [0, 1215, 0, 0]


@pytest.mark.long
def test_signals_while_it_restores_do_not_end_it(clocks, standin):
    standin.gpus[0].switch_ms = 5
    clocks.lock(standin.uuids[0], 1080)
    clocks.lock(standin.uuids[1], 1080)
    standin.gpus[0].fails = 19  # in use: it tries again for a while
    pid = clocks._guardian.pid
    os.kill(pid, signal.SIGTERM)
    for _ in range(40):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.002)
    standin.gpus[0].fails = 0
    assert restored(standin, 3.0)

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.observe.activity import (
    NOBODY,
    PHASES,
    RECOVERY_PHASES,
    STEP_PHASES,
    TRAIN_FN,
    Activity,
    ActivityReader,
    Doing,
    Standing,
    read,
)


def test_the_phases_are_those_of_a_step_and_of_a_recovery() -> None:
    names = "idle forward backward reduce ready apply gather replicate quiesce propose migrate gate commit"
    assert list(PHASES) == names.split()
    assert list(PHASES) == ["idle", *STEP_PHASES, *RECOVERY_PHASES]


def test_what_is_entered_is_read(tmp_path: Path) -> None:
    activity = Activity(tmp_path, 3)
    assert (tmp_path / "activity" / "3").stat().st_size == 256
    first = read(tmp_path, 3)
    assert first is not None
    assert (first.phase, first.step, first.epoch) == ("idle", -1, 0)
    for step, phase in enumerate(PHASES):
        before = time.monotonic()
        activity.enter(phase, step, 7, step - 1)
        doing = read(tmp_path, 3)
        assert doing is not None
        assert before <= doing.at <= time.monotonic()
        assert doing == Doing(worker=3, pid=os.getpid(), phase=phase, step=step, epoch=7, at=doing.at, micro_batch=step - 1)
    activity.enter("apply", 1 << 30, 1 << 31)
    activity.close()
    doing = read(tmp_path, 3)
    assert doing is not None
    assert (doing.phase, doing.step, doing.epoch, doing.micro_batch) == ("apply", 1 << 30, 1 << 31, -1)


def test_who_never_said_does_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, 0) is None
    Activity(tmp_path, 0).close()
    assert read(tmp_path, 1) is None
    with pytest.raises(FileNotFoundError):
        ActivityReader(tmp_path, 1)


def test_an_unknown_phase_is_a_mistake_and_leaves_the_record(tmp_path: Path) -> None:
    activity = Activity(tmp_path, 0)
    activity.enter("forward", 1, 1)
    with pytest.raises(KeyError):
        activity.enter("lunch", 2, 1)
    doing = read(tmp_path, 0)
    assert doing is not None
    assert doing.phase == "forward"
    activity.close()


def test_the_newest_is_read_also_when_the_numbers_start_again(tmp_path: Path) -> None:
    activity, watch = Activity(tmp_path, 0), ActivityReader(tmp_path, 0)
    for step in range(140_000):
        activity.enter("forward", step, 1)
        if step % 65_534 < 9 or step % 997 == 0:
            doing = watch.read()
            assert doing is not None
            assert doing.step == step
    activity.close()
    watch.close()


@pytest.mark.parametrize("torn", [0, 32])
@pytest.mark.parametrize("part", [0, 24])
def test_a_record_torn_by_death_leaves_the_one_before(tmp_path: Path, torn: int, part: int) -> None:
    activity = Activity(tmp_path, 0)
    for step in range(11 if torn else 10):
        activity.enter("forward", step, 1)
    activity.close()
    path = tmp_path / "activity" / "0"
    data = bytearray(path.read_bytes())
    data[torn + part] ^= 0xFF  # in the record being written: the new number or the old one
    path.write_bytes(data)
    doing = read(tmp_path, 0)
    assert doing is not None
    assert doing.step == (9 if torn else 8)


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    Activity(tmp_path, 0).close()
    (tmp_path / "activity" / "0").write_bytes(bytes(256))
    assert read(tmp_path, 0) is None


@contextmanager
def writer(directory: Path) -> Iterator[int]:
    """A child that enters as fast as it can, with fields that belong together; it is killed and reaped. Yields its pid."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        activity = Activity(directory, 5)
        os.write(tell, b"x")
        step = 0
        while True:
            activity.enter(PHASES[step % 13], step, step % 1000, step % 77)
            step += 1
    try:
        assert os.read(told, 1) == b"x"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)


def belongs_together(doing: Doing | None) -> bool:
    if doing is None:
        return False
    step = doing.step
    return step == -1 or (doing.phase, doing.epoch, doing.micro_batch) == (PHASES[step % 13], step % 1000, step % 77)


@pytest.mark.slow
def test_records_are_whole_while_they_are_written(tmp_path: Path) -> None:
    with writer(tmp_path) as pid:
        watch = ActivityReader(tmp_path, 5)
        steps: list[int] = []
        deadline = time.monotonic() + 20.0
        while len(set(steps)) < 50 and time.monotonic() < deadline:
            for _ in range(5000):
                doing = watch.read()
                assert doing is not None
                assert doing.pid == pid
                assert belongs_together(doing)
                steps.append(doing.step)
        assert steps == sorted(steps), "never an older one than before"
        assert len(set(steps)) >= 50
        watch.close()


@pytest.mark.slow
def test_whoever_is_killed_leaves_a_whole_record(tmp_path: Path) -> None:
    for _ in range(30):
        with writer(tmp_path):
            pass
        assert belongs_together(read(tmp_path, 5))


def standing(directory: Path) -> Standing:
    reader = ActivityReader(directory, 0)
    try:
        return reader.standing(reader.read())
    finally:
        reader.close()


def test_where_it_stands(tmp_path: Path) -> None:
    activity = Activity(tmp_path, 0)
    assert (standing(tmp_path).place, standing(tmp_path).waits_for) == (TRAIN_FN, NOBODY)
    assert activity.at("runtime") == TRAIN_FN
    activity.waits(2)
    assert (standing(tmp_path).place, standing(tmp_path).waits_for) == ("runtime", 2)
    activity.waits(None)
    thread = threading.Thread(target=activity.waits, args=(5,))
    thread.start()
    thread.join()
    assert standing(tmp_path).waits_for == NOBODY, "other threads do not count"
    activity.close()


def test_how_long_phases_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting and loading do not count, and what is older than two windows is forgotten."""
    now = [10.0]
    monkeypatch.setattr("elastic.observe.activity._now", lambda: now[0])
    activity = Activity(tmp_path, 0)
    activity.at("runtime")
    for step in range(40):
        activity.enter("forward", step, 1, 0)
        assert standing(tmp_path).first == (step == 0)
        now[0] += 5.0 if step == 2 else 1.0
        activity.waits(1)
        now[0] += 7.0
        activity.waits(None)
        activity.at("data loader")
        assert standing(tmp_path).longest_s == (2.0 if step else 0.0), "of the loader"
        now[0] += 2.0
        activity.at("runtime")
        activity.enter("reduce", step, 1)
        activity.enter("forward", step, 1, 1)
        assert standing(tmp_path).longest_s == (1.0 if step < 2 or step >= 16 else 5.0)
    activity.close()


def test_the_first_step_of_a_view_is_known_as_such(tmp_path: Path) -> None:
    activity = Activity(tmp_path, 0)
    for epoch, step, first in ((1, 0, True), (1, 1, False), (2, 1, True), (2, 2, False)):
        activity.enter("idle", step - 1, epoch)
        activity.enter("forward", step, epoch, 0)
        assert standing(tmp_path).first == first
    activity.close()

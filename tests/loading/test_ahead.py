"""Tests that processes of a DataLoader load the same bits ahead, that they are replaced, and that none is left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from elastic.engine.streaming import digest_of
from elastic.errors import TrainerError
from elastic.worker.loading.ahead import LoadedAhead
from elastic.worker.loading.given import given
from elastic.worker.loading.pool import Pool
from elastic.worker.plain.source import Stream, stream_of
from tests.conftest import wait_for_end
from tests.loading import data
from tests.loading.data import Noted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]
long = pytest.mark.long

Made = Callable[..., Any]
BATCH, MICRO_BATCH = 16, 4


def stream(dataset: Any, processes: int, **options: Any) -> Stream:
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=processes, **options)
    return stream_of(given(loader, None, None), MICRO_BATCH, 3)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes streams whose processes have begun."""
    streams: list[LoadedAhead] = []

    def one(processes: int, act: str = "", dataset: Any = None, **options: Any) -> Stream:
        found = stream(dataset or Noted(tmp_path, act), processes, **options)
        assert isinstance(found.source, LoadedAhead)
        streams.append(found.source)
        begin(found)
        return found

    yield one
    for each in streams:
        each.close()


def pool_of(found: Any) -> Pool:
    pool = found.source._pool
    assert pool is not None
    return pool


def begin(found: Any) -> None:
    """Starts the processes, and waits for them."""
    if not found.source._started:
        found.source._started = True
        data.wait_for_processes(pool_of(found))
    while not all(loader.begun for loader in pool_of(found)._loaders.values()):
        pool_of(found).hear(None)


def settle(found: Any) -> None:
    """Waits until processes have nothing to do."""
    while pool_of(found)._asked:
        pool_of(found).hear(None)


def taken(found: Stream, *steps: int, order: tuple[int, ...] = (0, 2, 3)) -> list[str]:
    return [digest_of([found.load(step, micro_batch)]) for step in steps for micro_batch in order]


@pytest.fixture
def wanted(tmp_path: Path) -> Callable[..., list[str]]:
    """What is taken without processes."""
    folder = tmp_path / "wanted"
    folder.mkdir()
    return lambda *steps, **options: taken(stream(Noted(folder), 0), *steps, **options)


def pids(folder: Path) -> set[int]:
    return {int(path.name.partition("-")[2]) for path in folder.glob("loader-*")}


def samples_here(folder: Path) -> int:
    return sum(len(path.read_text().split()) for path in folder.glob("worker-*"))


def ended(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return wait_for_end(pid, 10)
    return True


def test_processes_load_the_same_bits_ahead_and_end_with_the_worker(made: Made, tmp_path: Path, wanted: Made) -> None:
    found = made(2, worker_init_fn=partial(data.note, tmp_path))
    assert {path.name for path in tmp_path.glob("init-*")} == {"init-0-0-of-2-64", "init-1-1-of-2-64"}
    assert taken(found, *range(5)) == wanted(*range(5))
    assert samples_here(tmp_path) == (3 + 1 + 1) * MICRO_BATCH  # the first step, the first of the next one, and one that is compared
    assert len(loaders := pids(tmp_path)) == 2
    found.source.close()
    assert all(map(ended, loaders))
    assert taken(found, 5) == wanted(5)  # by the worker


@long
def test_nothing_waits_for_processes_that_start(tmp_path: Path, wanted: Made) -> None:
    found: Any = stream(Noted(tmp_path), 2)
    try:
        pool_of(found).start = lambda: None  # type: ignore[method-assign]
        assert taken(found, 0, 1) == wanted(0, 1)
        assert not pids(tmp_path)
    finally:
        found.source.close()


def number(dataset: Noted) -> None:
    dataset.scale = 0.5


def inside(dataset: Noted) -> None:
    dataset.shift[0] = 0.5


def in_place(dataset: Noted) -> None:
    dataset.offsets.mul_(0.5)


@pytest.mark.parametrize("change", [number, inside, in_place])
def test_a_change_of_the_dataset_between_passes_reaches_the_processes(change: Callable[[Noted], None], made: Made, tmp_path: Path) -> None:
    dataset = Noted(tmp_path)
    found = made(2, dataset=dataset)
    taken(found, 0, 1)
    loaders = pids(tmp_path)
    found.begin_pass()
    assert pool_of(found).outstanding
    change(dataset)
    found.begin_pass()
    assert not pool_of(found).outstanding
    begin(found)
    again = taken(found, 2, 3)
    settle(found)
    (tmp_path / "alone").mkdir()
    alone = Noted(tmp_path / "alone")
    change(alone)
    assert again == taken(stream(alone, 0), 2, 3)
    assert all(map(ended, loaders))
    assert pids(tmp_path) - loaders


def test_a_dataset_that_cannot_be_pickled_any_more_keeps_its_processes(made: Made, tmp_path: Path) -> None:
    dataset = Noted(tmp_path)
    found = made(1, dataset=dataset)
    taken(found, 0, 1)
    dataset.opened = open(os.devnull)  # pyright: ignore[reportAttributeAccessIssue]  # noqa: SIM115 as a file of samples is
    with dataset.opened:  # pyright: ignore[reportAttributeAccessIssue]
        found.begin_pass()
        assert pool_of(found).outstanding


@long
def test_processes_stay_when_a_worker_gets_other_micro_batches(made: Made, tmp_path: Path, wanted: Made) -> None:
    found = made(2)
    assert taken(found, 0, 1, 1, 0) == wanted(0, 1, 1, 0)
    settle(found)
    loaders = pids(tmp_path)
    assert taken(found, 2, 3, 4, order=(1, 2)) == wanted(2, 3, 4, order=(1, 2))
    assert taken(found, 7, 8, order=(3, 0)) == wanted(7, 8, order=(3, 0))
    here = samples_here(tmp_path)
    settle(found)
    assert taken(found, 9, order=(3, 0)) == wanted(9, order=(3, 0))
    assert samples_here(tmp_path) == here
    assert pids(tmp_path) == loaders


@long
@pytest.mark.parametrize("prefetch", [1, 3])
def test_so_much_is_loaded_ahead_and_no_more(prefetch: int, made: Made) -> None:
    found = made(2, prefetch_factor=prefetch)
    taken(found, 0, order=(0, 1, 2, 3))
    for step in range(1, 6):
        found.load(step, 0)
        settle(found)
        ahead = [(step + (number + 1) // 4, (number + 1) % 4) for number in range(2 * prefetch)]
        assert sorted(pool_of(found).outstanding) == ahead
        descriptors = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
        assert sum("elastic-parcel" in name for name in descriptors) == 2 * prefetch
        taken(found, step, order=(1, 2, 3))


@long
def test_samples_that_depend_on_the_process_are_refused(made: Made) -> None:
    with pytest.raises(TrainerError, match=r"loads other samples than the worker itself \(step 1, micro-batch 2\).*get_worker_info"):
        taken(made(1, "wrong"), 0, 1, 2)


@long
@pytest.mark.parametrize("who", ["first loader", "last loader", "server"])
def test_a_process_that_is_killed_is_replaced_and_changes_nothing(
    who: str, made: Made, tmp_path: Path, wanted: Made, caplog: pytest.LogCaptureFixture
) -> None:
    found = made(2)
    taken(found, 0, 1)
    settle(found)
    before = pids(tmp_path)
    killed = {"first loader": min(before), "last loader": max(before)}.get(who, pool_of(found)._server.pid)  # type: ignore[union-attr]
    os.kill(killed, signal.SIGKILL)
    assert ended(killed)
    with caplog.at_level(logging.WARNING):
        assert taken(found, 2, 3) == wanted(2, 3)
        while pool_of(found).deaths == 0:
            pool_of(found).hear(None)
        begin(found)
        assert taken(found, 4, 5, 6) == wanted(4, 5, 6)
    assert caplog.text.count("a process of the DataLoader died at step") == 1
    settle(found)
    assert len(pids(tmp_path) - before) == (2 if who == "server" else 1)
    assert all(map(ended, before if who == "server" else [killed]))


@long
def test_a_data_set_that_kills_processes_is_loaded_by_the_worker(
    made: Made, tmp_path: Path, wanted: Made, caplog: pytest.LogCaptureFixture
) -> None:
    found, order = made(1, "die"), (0, 1, 2, 3)
    with caplog.at_level(logging.WARNING):
        for step in range(40):
            assert taken(found, step, order=order) == wanted(step, order=order)
            if found.source._pool is not None:
                begin(found)
    assert caplog.text.count("is started again") == 4
    assert caplog.text.count("died 5 times, the last time at step") == 1
    assert all(map(ended, pids(tmp_path)))


@long
def test_an_error_of_a_sample_is_raised_as_it_is(made: Made) -> None:
    with pytest.raises(KeyError, match="a sample that is not there"):
        taken(made(2, "raise"), *range(5), order=(0, 1, 2, 3))


@long
def test_what_only_a_process_cannot_load_the_worker_loads(made: Made, wanted: Made, caplog: pytest.LogCaptureFixture) -> None:
    steps, order = range(9), (0, 1, 2, 3)
    with caplog.at_level(logging.WARNING):
        assert taken(made(2, "raise inside"), *steps, order=order) == wanted(*steps, order=order)
    assert caplog.text.count("OSError: this process cannot read it") == 1


@long
def test_a_timeout_is_kept(made: Made) -> None:
    with pytest.raises(TrainerError, match=r"has not loaded micro-batch \d of step \d within its timeout=0.5 seconds: give it a longer"):
        taken(made(1, "wait", timeout=0.5), *range(9), order=(0, 1, 2, 3))


@pytest.mark.parametrize("what", ["dataset", "collate_fn", "worker_init_fn"])
def test_what_cannot_be_pickled_is_refused_at_once(what: str, tmp_path: Path) -> None:
    class Inside(Noted):
        pass

    dataset = Inside(tmp_path) if what == "dataset" else Noted(tmp_path)
    options = {} if what == "dataset" else {what: lambda samples: samples}
    with pytest.raises(TrainerError, match=r"num_workers=2, but its dataset.*cannot be sent.*top level of a module.*num_workers=0"):
        stream(dataset, 2, **options)
    assert taken(stream(dataset, 0, **options), 0)


@long
def test_what_cannot_be_unpickled_there_is_refused(made: Made) -> None:
    with pytest.raises(TrainerError, match=r"(?s)cannot be used in another process.*ImportError: a library that is not there"):
        made(2, dataset=data.Here())


@long
def test_an_init_function_that_raises_is_refused(made: Made) -> None:
    with pytest.raises(TrainerError, match=r"(?s)cannot be used in another process.*process \d has no database"):
        made(2, worker_init_fn=data.fail)


@long
def test_settings_that_bits_depend_on_are_those_of_the_worker(tmp_path: Path, made: Made, wanted: Made) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert taken(made(1), 0, 1, 2) == wanted(0, 1, 2)
    finally:
        torch.set_default_dtype(torch.float32)

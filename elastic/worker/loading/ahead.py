"""Loads micro-batches ahead in processes: decides which ones, and loads in the worker itself what they have not got.

A micro-batch is a function of step and number, so it has the same bits wherever it is loaded; the first one from a process is compared with
the worker's own. Which ones a worker needs next is a guess: those that it needed in the last step, in that order, for the steps to come. A
wrong guess costs time, never bits: what was loaded and is not needed is dropped, and the worker loads what was not foreseen. So processes
stay when members change, and nothing waits for processes that are still starting.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from elastic.engine import randomness
from elastic.engine.data import Batch, DatasetBatches
from elastic.engine.streaming import digest_of
from elastic.errors import TrainerError
from elastic.memory import raw
from elastic.memory.parcel import Parcel
from elastic.worker.loading.pool import Answer, Key, Pool
from elastic.worker.loading.server import Code

_log = logging.getLogger(__name__)
_MOST_DEATHS = 5
_FORGIVEN_AFTER = 1000  # micro-batches that processes have loaded since the last death


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings:
    """What a DataLoader says of its processes. Each may load `prefetch` micro-batches ahead; `timeout_s` is 0 for no limit."""

    processes: int
    prefetch: int
    init: Callable[[int], Any] | None
    timeout_s: float

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> LoaderSettings | None:
        """Returns those of a loader; None if it has no processes."""
        if not loader.num_workers:
            return None
        prefetch = 2 if loader.prefetch_factor is None else loader.prefetch_factor
        return cls(processes=loader.num_workers, prefetch=prefetch, init=loader.worker_init_fn, timeout_s=loader.timeout)


def ahead(load: Batch, settings: LoaderSettings | None) -> Batch:
    """Returns `load`, with processes that load ahead if there are settings of them and data can be read in any order.

    Raises:
        TrainerError: if the data cannot be sent to another process.
    """
    return load if settings is None or not isinstance(load, DatasetBatches) else LoadedAhead(load, settings)


class LoadedAhead:
    """The function (step, micro_batch) -> micro-batch `load`, most of whose results are loaded ahead. The first call starts processes."""

    def __init__(self, load: DatasetBatches, settings: LoaderSettings) -> None:
        self._load, self._settings = load, settings
        self._warned = False
        self._begin()
        self._step = -1
        self._asked: list[int] = []  # of this step
        self._pattern: list[int] = []  # of the step before
        self._deaths = self._since = 0

    def __call__(self, step: int, micro_batch: int) -> Any:
        self._note(step, micro_batch)
        answer = self._from_process((step, micro_batch))
        if answer.found:
            self._check(step, micro_batch, answer.contents)
            return answer.contents
        contents = self._load(step, micro_batch)  # if a process raised an error, this raises the same
        if answer.error is not None and not self._warned:
            self._warned = True
            _log.warning("a process of the DataLoader could not load what the worker then loaded (step %d):\n%s", step, answer.error)
        return contents

    def _begin(self) -> None:
        self._pool: Pool | None = Pool(_code(self._load, self._settings), self._settings.processes)
        self._sent = _contents(self._load)
        self._started = self._checked = False

    def renew(self) -> None:
        """Starts other processes if the dataset has changed since these got it, as torch does in each epoch."""
        if self._pool is None:
            return
        (numbers, whole), (numbers_sent, whole_sent) = _contents(self._load), self._sent
        if numbers != numbers_sent or (None not in (whole, whole_sent) and whole != whole_sent):
            self.close()
            self._begin()

    def _note(self, step: int, micro_batch: int) -> None:
        if step > self._step and self._asked:
            self._pattern = self._asked
        if step != self._step:
            self._step, self._asked = step, []
        if micro_batch not in self._asked:
            self._asked.append(micro_batch)

    def _from_process(self, key: Key) -> Answer:
        pool = self._pool
        if pool is None:
            return Answer()
        if not self._started:
            self._started = True
            pool.start()
        pool.hear()
        self._fill(pool, {key})
        answer = pool.take(key, self._settings.timeout_s)
        self._since += answer.found
        self._fill(pool, set())
        self._count_deaths(pool, key[0])
        return answer

    def _fill(self, pool: Pool, now: set[Key]) -> None:
        """Asks for what is needed next, up to so many micro-batches; drops what was loaded and is neither that nor needed now."""
        most = self._settings.prefetch
        room = self._settings.processes * most
        wanted = list(itertools.islice(self._upcoming(), room))
        for key in pool.outstanding.difference(wanted, now):
            pool.drop(key)
        outstanding = pool.outstanding
        for key in wanted:
            if key not in outstanding:
                if len(outstanding) >= room or not pool.ask(key, most):
                    return
                outstanding.add(key)

    def _upcoming(self) -> Iterator[Key]:
        """Yields what this worker is taken to need after what it has asked for."""
        for step in itertools.count(self._step) if self._pattern else ():
            for micro_batch in self._pattern:
                if step > self._step or micro_batch not in self._asked:
                    yield step, micro_batch

    def _count_deaths(self, pool: Pool, step: int) -> None:
        if pool.deaths == self._deaths:
            return
        if self._since >= _FORGIVEN_AFTER:
            pool.deaths -= self._deaths
        self._deaths, self._since = pool.deaths, 0
        if self._deaths < _MOST_DEATHS:
            _log.warning("a process of the DataLoader died at step %d and is started again; the worker loads meanwhile itself", step)
            return
        self.close()
        _log.warning(
            "processes of the DataLoader died %d times, the last time at step %d, so they are not used any more: from here on the worker "
            "loads its samples itself, with the same bits but not ahead. The system may be out of memory (use fewer num_workers, or a "
            "smaller prefetch_factor), or the dataset's code crashes",
            self._deaths,
            step,
        )

    def _check(self, step: int, micro_batch: int, contents: Any) -> None:
        """Raises TrainerError if another process loads other samples than this one; compares only the first micro-batch."""
        if self._checked:
            return
        self._checked = True
        with randomness.kept():
            own = self._load(step, micro_batch)
        if digest_of([own]) != digest_of([contents]):
            raise TrainerError(
                f"a process of the DataLoader loads other samples than the worker itself (step {step}, micro-batch {micro_batch}), so a "
                "step that is computed again would have other bits. Samples may depend on their index and on the global generators of "
                "torch, NumPy and Python, but not on the process (get_worker_info, worker_init_fn, own generators), and the "
                "dataset may change between loops over the loader, not within one: mend that, or use "
                "num_workers=0"
            )

    def close(self) -> None:
        """Ends the processes; from then on the worker loads itself."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


def _contents(load: DatasetBatches) -> tuple[dict[str, Any], str | None]:
    """Returns the numbers and texts that a dataset has itself, and a checksum of all of it; None if it cannot be pickled any more."""
    own = getattr(load.dataset, "__dict__", {}).items()
    numbers = {name: value for name, value in own if isinstance(value, bool | int | float | str)}
    try:
        parcel = Parcel.of((load.dataset, load.collate))
    except Exception:  # whatever a user's class raises: it may have opened a file since it was sent
        return numbers, None
    return numbers, raw.checksum_of(map(raw.as_bytes, (parcel.pickled, *(buffer.raw() for buffer in parcel.buffers))))


def _code(load: DatasetBatches, settings: LoaderSettings) -> Parcel:
    code = Code(
        load=load,
        init=settings.init,
        dataset=load.dataset,
        processes=settings.processes,
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
    )
    try:
        return Parcel.of(code)
    except Exception as error:  # whatever a user's class raises
        raise TrainerError(
            f"the DataLoader has num_workers={settings.processes}, but its dataset, collate_fn or worker_init_fn cannot be sent to another "
            f"process ({type(error).__name__}: {error}). Define classes and functions at the top level of a module, not as lambdas or in "
            "functions, and open files and connections in __getitem__ when they are first needed; or use num_workers=0, with the same bits"
        ) from error

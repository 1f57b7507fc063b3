"""Micro-batches of data that can only be read in order: iterable datasets, such as the streaming ones of Hugging Face.

The contract: `iter(dataset)` begins again each time, and gives the same samples in the same order in every process. Before each pass
`dataset.set_epoch(pass)` is called if there is one. The i-th sample of the stream, counted over all passes, belongs to step i // batch, so
there is no sampler state but the step number. Every worker reads the whole stream. It keeps the samples of two steps, since a step may be
computed again. A worker that joins or continues later reads from the beginning up to its step; or, if the dataset has `state_dict` and
`load_state_dict`, continues from its state after the step before (`Position`). It then compares the next sample with that of the others: a
state may be incomplete, as that of a shuffle buffer is, and then it does read from the beginning.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elastic.engine import randomness
from elastic.errors import TrainerError
from elastic.memory.tensors import bytes_of, contiguous

_WAYS = (
    "Pass a map-style dataset (__len__ and __getitem__), a function batch(step, micro_batch) that returns the same micro-batch on every "
    "call, or an iterable whose __iter__ begins again with the same samples, such as an IterableDataset"
)


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Mark:
    """The place in the data before a step's first sample, and the dataset's state there."""

    number: int  # of the pass
    in_pass: int
    state: Any


class StreamBatches:
    """Returns the micro-batch `(step, micro_batch)` of an iterable dataset. Samples are drawn under generators keyed by their number."""

    def __init__(self, dataset: Any, *, batch_size: int, micro_batch_size: int, seed: int, collate: Callable[[list[Any]], Any]) -> None:
        """Raises TrainerError for data that can be read only once."""
        if hasattr(dataset, "__next__"):
            raise TrainerError(f"a {type(dataset).__name__} can be read only once, so a lost step could not be repeated. {_WAYS}")
        self._collate, self._seed = collate, seed
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self.resumable = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._given = dataset
        self._begin()

    def _begin(self) -> None:
        self._dataset = self._given
        self._iterator: Iterator[Any] | None = None
        self._pass = self._in_pass = 0
        self._read = 0  # samples of the stream so far
        self._oldest = 0
        self._window: dict[int, Any] = {}
        self._marks: dict[int, _Mark] = {}

    def __call__(self, step: int, micro_batch: int) -> Any:
        first = step * self._batch_size + micro_batch * self._micro_batch_size
        samples = self._samples(range(first, first + self._micro_batch_size), kept_from=(step - 1) * self._batch_size)
        return self._collate([copy.deepcopy(sample) for sample in samples])  # collate may change them, and the step may be computed again

    def _samples(self, wanted: range, kept_from: int) -> list[Any]:
        if wanted.start < self._oldest:
            self._begin()
        while self._read < wanted.stop:
            if self.resumable and self._read % self._batch_size == 0 and self._read >= kept_from:
                self._mark(self._read // self._batch_size)
            sample = self._next()
            if self._read >= kept_from:
                self._window[self._read] = sample
            self._read += 1
        self._oldest = max(self._oldest, kept_from)
        for index in [index for index in self._window if index < kept_from]:
            del self._window[index]
        return [self._window[index] for index in wanted]

    def _mark(self, step: int) -> None:
        self._marks = {known: mark for known, mark in self._marks.items() if known >= step - 1}
        state = copy.deepcopy(self._dataset.state_dict()) if self._iterator is not None else None  # None: nothing is read yet
        self._marks[step] = _Mark(self._pass, self._in_pass, state)

    def state_before(self, step: int) -> dict[str, Any]:
        """Returns where the data is before a step, for `continue_from` in another process; reads up to there."""
        first = step * self._batch_size
        with randomness.kept():
            (sample,) = self._samples(range(first, first + 1), kept_from=first - self._batch_size)
            if step not in self._marks:
                self._begin()
                (sample,) = self._samples(range(first, first + 1), kept_from=first - self._batch_size)
        mark = self._marks[step]
        return {"step": step, "pass": mark.number, "in_pass": mark.in_pass, "state": mark.state, "next": digest_of([sample])}

    def continue_from(self, found: Mapping[str, Any]) -> None:
        """Continues from what `state_before` returned, if the dataset's state is complete; else from the beginning."""
        step = found["step"]
        self._begin()
        if step == 0:
            return
        with randomness.kept():
            self._dataset = copy.deepcopy(self._given)  # the user's own object always begins at the beginning
            self._pass, self._in_pass = found["pass"], found["in_pass"]
            self._read = self._oldest = step * self._batch_size
            self._iterator = self._pass_over(copy.deepcopy(found["state"]))
            if digest_of(self._samples(range(self._read, self._read + 1), kept_from=self._read)) == found["next"]:
                return
        kind = type(self._dataset).__name__
        _log.warning(
            "the state of the %s does not lead to the sample that follows; it is read from the beginning up to step %d", kind, step
        )
        self._begin()

    def _next(self) -> Any:
        while True:
            if self._iterator is None:
                self._iterator = self._pass_over()
            randomness.seed_all(self._seed, "stream", self._read)
            try:
                sample = next(self._iterator)
            except StopIteration:
                if not self._in_pass:
                    raise TrainerError(f"the {type(self._dataset).__name__} gave no sample in pass {self._pass}: it is empty") from None
                self._pass, self._in_pass, self._iterator = self._pass + 1, 0, None
                continue
            self._in_pass += 1
            return sample

    def _pass_over(self, state: Any = None) -> Iterator[Any]:
        if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
            set_epoch(self._pass)
        if state is not None:
            self._dataset.load_state_dict(state)
        randomness.seed_all(self._seed, "pass", self._pass)
        return iter(self._dataset)

    def digest(self) -> str:
        """Returns a digest of the first step's samples, to be compared between workers.

        Raises:
            TrainerError: if the data gives other samples when it is read again.
        """
        with randomness.kept():
            found = [self._digest_of_first(), self._digest_of_first()]
        if found[0] != found[1]:
            raise TrainerError(
                f"the {type(self._dataset).__name__} gives other samples when it is read a second time, so a lost step could not be "
                "repeated: let their order follow from a fixed seed (and from set_epoch)"
            )
        return found[0]

    def _digest_of_first(self) -> str:
        self._begin()
        return digest_of(self._samples(range(self._batch_size), kept_from=0))


class Position:
    """The place of an iterable dataset after the newest step, as an object that workers that join and checkpoints get.

    `step` returns the number of steps taken.
    """

    def __init__(self, stream: StreamBatches, step: Callable[[], int]) -> None:
        self._stream, self._step = stream, step

    def state_dict(self) -> dict[str, Any]:
        """The place before the next step."""
        return self._stream.state_before(self._step())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a place."""
        self._stream.continue_from(state)


def digest_of(samples: list[Any]) -> str:
    """Returns a digest of samples or micro-batches that tells them apart. Objects of unknown classes count by their class only."""
    total = hashlib.blake2b(digest_size=16)
    for sample in samples:
        for part in _parts(sample):
            total.update(part)
    return total.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Yields bytes that tell values apart. Objects of other classes are not told apart."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield bytes_of(contiguous(value.detach())).tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(_parts(part) for pair in value.items() for part in pair)
    elif isinstance(value, list | tuple):
        yield f"{len(value)}".encode()
        yield from itertools.chain.from_iterable(map(_parts, value))
    elif isinstance(value, str | bytes | int | float | np.number) or value is None:
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()

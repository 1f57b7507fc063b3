"""Tries a loop's body out, before the worker takes part in the job: nothing of it counts.

The body shows how it clips gradients, and what a micro-batch costs; what would be refused later is refused now, on every worker; and a
worker that joins has done what a process does only once (choosing kernels, compiling).

The worker that measures costs runs the body several times, with the same micro-batch, parameters and random numbers. Gradients must be the
same bits. They are not if the body uses what an earlier body has left: how many bodies ran before on a worker depends on the layout.

With several optimizers it also shows its parts. In the first run, parameters are changed where optimizers' steps are, as in a plain loop.
Then the body is run as it will be for each later part: from its beginning, with the parameters as earlier parts have left them. Gradients
must be the same bits. They are not if a part uses values that were computed before an earlier part's update and depend on what it changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from elastic.engine import randomness
from elastic.engine.bit_equality import same
from elastic.engine.flops import FlopCount, counted, flops_of, may_compile
from elastic.engine.model import LayeredModel
from elastic.engine.profile import LayerProfile, SavedBytes, buffers_restored
from elastic.errors import TrainerError
from elastic.memory.tensors import copy
from elastic.worker.job import Job
from elastic.worker.plain.body import Body, checksum
from elastic.worker.plain.iteration import ONE, Iteration, Kind, Parts
from elastic.worker.plain.source import Stream

_FACTOR, _TERM = 1 + 2**-6, 2**-8  # an update of parameters, as far as a trial needs one


class Trial:
    """Runs the body on the first micro-batch of step 0: once, or more often if this worker measures the costs; at least once for each part.

    `parameters` are those of each optimizer. If not `exact`, a body may use what earlier ones have left.
    """

    def __init__(
        self, job: Job, body: Body, stream: Stream, seed: int, parameters: Sequence[Sequence[nn.Parameter]], *, exact: bool
    ) -> None:
        self._stream, self._seed, self._parameters, self._exact = stream, seed, parameters, exact
        self._measures = job.profile
        self._layered = LayeredModel(body)
        self._gradients: dict[tuple[int, int], list[torch.Tensor | None]] = {}
        self._checksum: str | None = None  # of the gradients of the run before, if this one must have the same
        self.parts = ONE
        self.clip_norms: list[float | None] = []
        self.weighs: list[bool] = []
        self.cost: LayerProfile = []
        self._saved, self._count = SavedBytes(iter(())), FlopCount(known=False)  # of a step with several updates no operations are told

    def run(self, opened: Callable[[Iteration], None], closed: Callable[[], Iteration]) -> Iterator[Any]:
        """Yields the micro-batch for each run. `opened` and `closed` are called around the body."""
        if len(self._parameters) > 1:
            yield from self._show_parts(opened, closed)
        else:
            for number in range(self._runs()):
                yield from self._run(ONE, 0, opened, closed, looks=number == 0)
                if number == 0 and may_compile():  # the next run has other kernels
                    self._checksum = None
        if self._layered.running.statistics.names and "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # code compiled without the hooks of running statistics would never call them

    def _runs(self) -> int:
        """Returns how often the body is run: to count operations, to compile it if that may be wanted, and to time it."""
        return 1 if not self._measures else 3 if may_compile() else 2

    def _show_parts(self, opened: Callable[[Iteration], None], closed: Callable[[], Iteration]) -> Iterator[Any]:
        before = [[copy(each.detach()) for each in own] for own in self._parameters]
        try:
            yield from self._run(None, None, opened, closed)
            for live in range(0 if self._measures else 1, len(self.parts)):
                self._put_back(before)
                for optimizer in [optimizer for part in self.parts[:live] for optimizer in part]:
                    self._update(optimizer)
                yield from self._run(self.parts, live, opened, closed)
        finally:
            self._put_back(before)
            self._gradients.clear()

    def _put_back(self, values: list[list[torch.Tensor]]) -> None:
        with torch.no_grad():
            for own, kept in zip(self._parameters, values, strict=True):
                for parameter, value in zip(own, kept, strict=True):
                    parameter.copy_(value)

    def _update(self, optimizer: int) -> None:
        with torch.no_grad():
            for parameter in self._parameters[optimizer]:
                parameter.mul_(_FACTOR).add_(_TERM)

    def stepped(self, now: Iteration, optimizer: int) -> None:
        """Notes, or compares, what a body has for an optimizer whose step it calls. Raises TrainerError if it differs."""
        gradients = [parameter.grad for parameter in self._parameters[optimizer]]
        if now.parts is None:
            self._gradients[now.number, optimizer] = [None if each is None else copy(each) for each in gradients]
            self._update(optimizer)
        elif now.parts is ONE:
            self._compare(now, gradients)
        elif now.number == now.live and not _alike(gradients, self._gradients[now.number, optimizer]):
            if now.number == 0 and not self._exact:
                return
            if now.number == 0:
                raise TrainerError(_not_again(now))
            raise TrainerError(
                f"in {now.where} the gradients for optimizer {optimizer} depend on values that the body computed before the step of "
                "another optimizer, with parameters that this step changes. A step has several micro-batches, so the runtime makes that "
                "update first and then runs the body again. Compute these values behind that optimizer.step(); or call all backwards first "
                "and the steps of all optimizers behind them, which is one update, from the same parameters"
            )

    def _compare(self, now: Iteration, gradients: list[torch.Tensor | None]) -> None:
        if not self._measures:  # the body runs once
            return
        before, self._checksum = self._checksum, checksum(gradients)
        if self._exact and before not in (None, self._checksum):
            raise TrainerError(_not_again(now))

    def _run(
        self,
        parts: Parts | None,
        live: int | None,
        opened: Callable[[Iteration], None],
        closed: Callable[[], Iteration],
        looks: bool = True,
    ) -> Iterator[Any]:
        looks = looks and self._measures
        if looks:
            self._saved, self._count = SavedBytes(self._layered.root.parameters()), FlopCount(known=parts is ONE)
        counting = counted(self._count) if looks and parts is ONE else nullcontext()
        with randomness.kept(), buffers_restored(self._layered), self._saved.noted() if looks else nullcontext(), counting:
            contents = self._stream.load(0, 0)
            randomness.seed_all(self._seed, 0, 0, 0)
            opened(Iteration(kind=Kind.TRIAL, step=0, micro_batch=0, parts=parts, live=live))
            yield contents
            done = closed()
        self.parts = done.shown
        self.clip_norms, self.weighs = [part.clip_norm for part in done.run], [part.weight is not None for part in done.run]
        frozen = self._layered.frozen_bytes(0)
        self.cost = [[*self._cost(done, self._saved.bytes), *flops_of([self._count]), *([frozen] if frozen else [])]]

    def _cost(self, done: Iteration, saved: int) -> list[float]:
        size, itemsize = self._layered.trained(0)
        assert done.backward_at is not None  # checked when the body ended
        loss = done.part.losses[0]
        forward_s, backward_s = done.backward_at - done.began, done.ended - done.backward_at
        return [forward_s, backward_s, size, saved, loss.numel() * loss.element_size(), itemsize, 0.0, 0.0]


def _not_again(now: Iteration) -> str:
    return (
        f"{now.where} ran twice with the same samples, parameters and random numbers, and had other gradients the "
        "second time: it uses what an earlier body has left (a running mean, a counter, a hidden state, a queue), "
        "or it or the dataset draws from a generator of its own. Workers run different numbers of bodies, so this "
        "cannot be exact. Compute it from the micro-batch; or change it once a step, where loader.report is not "
        "None, by values of the report, in an object given to loader.register_for_checkpointing; draw from the "
        "global generators of torch, NumPy and Python, which are keyed. exact=False allows it"
    )


def _alike(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    return all(same(mine, theirs) for mine, theirs in zip(one, other, strict=True))

"""Tries a loop's body out, before the worker takes part in the job: nothing of it counts.

The body shows how it clips gradients, and what a micro-batch costs; what would be refused later is refused now, on every worker; and a
worker that joins has done what a process does only once (choosing kernels, compiling).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from elastic.engine import randomness
from elastic.engine.model import LayeredModel
from elastic.engine.profile import LayerProfile, SavedBytes, buffers_restored
from elastic.worker.job import Job
from elastic.worker.plain.body import Body
from elastic.worker.plain.iteration import Iteration, Kind
from elastic.worker.plain.source import Stream


class Trial:
    """Runs the body on the first micro-batch of step 0: once, or twice if this worker measures the costs."""

    def __init__(self, job: Job, body: Body, stream: Stream, seed: int) -> None:
        self._stream, self._seed = stream, seed
        self._measures = job.profile
        self._layered = LayeredModel(body)
        self.clip_norm: float | None = None
        self.weighs = False
        self.cost: LayerProfile = []

    def run(self, opened: Callable[[Iteration], None], closed: Callable[[], Iteration]) -> Iterator[Any]:
        """Yields the micro-batch for each run. `opened` and `closed` are called around the body."""
        for _ in range(2 if self._measures else 1):
            saved = SavedBytes(self._layered.root.parameters())
            hooks = torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor) if self._measures else nullcontext()
            with randomness.kept(), buffers_restored(self._layered), hooks:
                contents = self._stream.load(0, 0)
                randomness.seed_all(self._seed, 0, 0, 0)
                opened(Iteration(kind=Kind.TRIAL, step=0, micro_batch=0))
                yield contents
                done = closed()
            self.clip_norm, self.weighs = done.clip_norm, done.weight is not None
            self.cost = [self._cost(done, saved.bytes)]
        if self._layered.running.statistics.names and "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # code compiled without the hooks of running statistics would never call them

    def _cost(self, done: Iteration, saved: int) -> list[float]:
        spec = self._layered.spec.layers[0]
        assert done.backward_at is not None  # checked when the body ended
        itemsize = spec.parameters[0].itemsize if spec.parameters else 0
        loss = done.losses[0]
        forward_s, backward_s = done.backward_at - done.began, done.ended - done.backward_at
        return [forward_s, backward_s, spec.size, saved, loss.numel() * loss.element_size(), itemsize]

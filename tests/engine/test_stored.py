"""Tests what a worker's segment says of its state while a Trainer takes steps: it is read after every store."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import nn

import elastic
from elastic.memory.digest import digest
from elastic.memory.raw import checksum
from elastic.memory.segment import MappedSegment
from elastic.memory.tensors import bytes_of, use_segment
from elastic.recovery.offers import Contents
from tests.engine import models
from tests.memory.recorded_segment import recorded

STEPS = 5


def poisoned(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 2 cannot be applied."""
    x = torch.sin(torch.arange(4 * models.WIDTH) * 0.1 + step + micro_batch).reshape(4, models.WIDTH)
    return (x * torch.nan if (step, micro_batch) == (2, 1) else x), torch.arange(4)


def shrink(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    parameter.mul_(0.99)


class Claims:
    """All that the segment said of complete copies, by step; `newest` is the newest step that must be there, or the one before it."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int, int, str], set[str]] = defaultdict(set)
        self.scalars: dict[int, set[str]] = defaultdict(set)
        self.newest: int | None = None

    def __call__(self, copy: MappedSegment) -> None:
        contents = Contents.read(copy)
        if contents is None:
            assert self.newest is None
            return
        for place in contents.complete:
            step, known = contents.step_of(place), contents.digests_of(place)
            for state, (offset, itemsize) in place.states.items():
                found = checksum(copy.bytes_at(offset, (place.stop - place.start) * itemsize))
                self.states[step, place.layer, place.start, state].add(found)
                assert known is None or known[state] == found
        for step in {contents.step_of(place) for place in contents.complete}:
            self.scalars[step].add(json.dumps(contents.scalars[step]))
            assert step < 0 or step in contents.buffers
        for place in contents.buffers.values():
            assert digest(copy.bytes_at(place.offset, place.size).copy()) == place.digest
        if self.newest is not None:
            complete = {contents.step_of(place) for place in contents.complete}
            assert complete & {self.newest, self.newest - 1, self.newest + 1}
            assert contents.loop is not None
            known = {step for step in complete if step in contents.loop.progress or step < 0}
            assert known & {self.newest, self.newest - 1, self.newest + 1}, "a step without its settings"


def test_all_that_is_said_to_be_complete_is_the_state_of_its_step(lone_job: Any) -> None:
    """A model with BatchNorm, an average, a step that is skipped, and an optimizer that makes its states in the first step."""
    claims = Claims()
    truth: dict[tuple[int, int, int, str], str] = {}
    torch.manual_seed(5)
    layers = [nn.Linear(48, 48), nn.BatchNorm1d(48), models.Head()]
    with recorded(5, claims, most_cuts=1) as both, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            lone_job.segment = both.open()
            use_segment(lone_job.segment)
            trainer = elastic.Trainer(
                layers, models.cross_entropy, models.momentum, poisoned, batch_size=24, micro_batch_size=4, on_nonfinite="skip"
            )
            trainer.after_step(shrink)
            trainer.average(0.9)
            for report in trainer.run(STEPS):
                claims.newest = report.step
                for (layer, start), shard in trainer._engine._optimizer.owned.shards.items():
                    for state, memory in shard.memory.items():
                        truth[report.step, layer, start, state] = checksum(bytes_of(memory))
            both.catch_up()
        finally:
            use_segment(None)
        assert both.cuts > 100
    assert {step for step, *_ in claims.states} == set(range(-1, STEPS))
    assert {place: found for place, found in claims.states.items() if place[0] >= 0} == {place: {found} for place, found in truth.items()}
    assert {step: len(found) for step, found in claims.scalars.items()} == dict.fromkeys(range(-1, STEPS), 1)

"""Tests the estimate of the memory that workers need when others join: what is new in the proposal that follows."""

from __future__ import annotations

import pytest

from elastic.recovery.expected import memory_needed
from elastic.recovery.proposal import propose
from tests.recovery.recovering import inventories_of, member, view_of


@pytest.mark.parametrize("stages", [1, 2, None])
@pytest.mark.parametrize("workers", [(0, 1, 2), (4, 2), (7,)])
def test_workers_prepare_what_the_proposal_gives_them(workers: tuple[int, ...], stages: int | None) -> None:
    last = view_of(workers, stages=stages and min(stages, len(workers)))
    joiners = {9: member(9)}
    needed = memory_needed(last=last, joiners=joiners, stages=stages)
    after = propose(last=last, attempt=1, inventories=inventories_of(last, workers), joiners=joiners, stages=stages).view
    assert needed.keys() == set(after.workers)
    for worker, size in needed.items():
        gathered = set(after.layout.layers_of(worker)).difference(last.layout.layers_of(worker))
        kept = {(layer, i.start, i.stop) for layer, i in last.layout.owned(worker)}
        new = sum(i.elements for layer, i in after.layout.owned(worker) if (layer, i.start, i.stop) not in kept)
        costs = last.workload.layers[0]
        elements = last.layout.model.layers[0].size
        assert size == pytest.approx(len(gathered) * costs.parameter_bytes + new / elements * costs.parameter_bytes, abs=1)
    assert needed[9] > 0

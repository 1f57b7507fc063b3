from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.engine.sampler import Permutation, samples


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 5))
def test_a_permutation_hits_every_element_once(size: int, seed: int, data_epoch: int) -> None:
    permutation = Permutation(size=size, seed=seed, data_epoch=data_epoch)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_seed_and_data_epoch_change_the_order() -> None:
    def order(seed: int, data_epoch: int) -> list[int]:
        permutation = Permutation(size=100, seed=seed, data_epoch=data_epoch)
        return [permutation[i] for i in range(100)]

    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != list(range(100))


def test_seeking_in_a_huge_dataset_takes_no_memory() -> None:
    permutation = Permutation(size=10**15, seed=1, data_epoch=0)
    assert len({permutation[10**15 - 1 - i] for i in range(50)}) == 50


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
def test_steps_walk_through_each_data_epoch_exactly_once(dataset: int, batch: int, seed: int) -> None:
    """Batches may straddle data epochs."""
    stream = [s for step in range(3 * dataset) for s in samples(seed, step, batch, dataset, range(batch))]
    for epoch in range(len(stream) // dataset):
        part = stream[epoch * dataset : (epoch + 1) * dataset]
        assert {s.data_epoch for s in part} == {epoch}
        assert sorted(s.index for s in part) == list(range(dataset))


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match="not in range"):
        Permutation(size=10, seed=0, data_epoch=0)[position]

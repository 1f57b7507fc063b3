from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.engine import randomness


def draws() -> list[float]:
    return [torch.rand(3).tolist(), torch.randn(2).tolist(), torch.randperm(9).tolist(), random.random(), float(np.random.rand())]


def test_a_key_names_the_same_draws_whatever_was_drawn_before() -> None:
    randomness.seed_all(1, 2, 3)
    first = draws()
    torch.randn(1001)
    random.gauss(0, 1)
    randomness.seed_all(1, 2, 3)
    assert draws() == first


def test_every_generator_depends_on_every_part_of_the_key() -> None:
    randomness.seed_all(1, 2, 3)
    first = draws()
    for key in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3), (1, 2, 3 + 2**32), (1, 2, 3 + 2**64)]:
        randomness.seed_all(*key)
        assert all(one != other for one, other in zip(draws(), first, strict=True)), key


@given(st.integers(0, 2**64), st.integers(0, 2**64))
def test_the_whole_state_of_torch_is_keyed_not_32_bits_of_it(one: int, other: int) -> None:
    """Were the key a 32-bit seed, the other 623 words would follow from it."""
    words = randomness.expand(one)
    randomness.seed_all(one)
    state = torch.get_rng_state().numpy()[24 : 24 + 8 * 624].view("<u8")
    assert state.tolist() == words.tolist()
    assert one == other or words.tolist() != randomness.expand(other).tolist()


def test_draws_look_uniform_and_normal() -> None:
    randomness.seed_all("a", 1)
    assert abs(torch.rand(100_000).mean().item() - 0.5) < 0.005
    assert abs(torch.randn(100_000).std().item() - 1.0) < 0.01


def test_draws_from_generators_that_are_not_keyed_are_noticed() -> None:
    generators = randomness.Generators()
    for draw in (random.random, np.random.rand, lambda: np.random.normal(), lambda: random.gauss(0, 1)):
        generators.watch()
        torch.rand(3)
        assert not generators.drawn()
        draw()
        assert generators.drawn()
    generators.all_keyed = True
    generators.watch()
    random.random()
    assert not generators.drawn()


def test_prepared_states_are_those_of_the_key() -> None:
    generators = randomness.Generators()
    generators.prepare([(1, 2, 3), (1, 2, 4)])
    generators.enter(1, 2, 4)
    prepared = torch.rand(5)
    randomness.seed_all(1, 2, 4)
    assert torch.equal(prepared, torch.rand(5))
    generators.all_keyed = True
    generators.enter(1, 2, 4)
    first = draws()
    generators.enter(1, 2, 4)
    assert draws() == first

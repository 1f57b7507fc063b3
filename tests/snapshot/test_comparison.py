"""Tests which copies are compared, when they count as different, and which of them are wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from elastic.layout.layout import Layout, spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.layout.transfer import PARAM
from elastic.snapshot.comparison import Comparison, Copied, judged, unlike
from elastic.snapshot.rest_digests import Rest

WORKERS = (0, 1, 2)
STATES = (PARAM, "exp_avg")
NOW, BEFORE = 5, 4


def layout() -> Layout:
    model = ModelSpec(layers=tuple(LayerSpec.build(i, [(f"{i}.w", (9 * BLOCK,), "float32")]) for i in range(2)))
    return spread(model, [(range(2), WORKERS)], dict(zip(WORKERS, "abc", strict=True)))


def value(layer: int, start: int, step: int, state: str) -> float:
    return 1.0 + layer + start / 7 + step * 3 + 0.5 * (state == PARAM)


class Copies:
    """The copies of all workers of one view as they are behind step 5, with their digests."""

    def __init__(self, every: int = 1, wrong: tuple[int, str, int, str] | None = None) -> None:
        """`wrong` names a copy that differs: worker, role, layer, state."""
        self.layout, self.wrong = layout(), wrong
        self.rests = {worker: Rest(every) for worker in WORKERS}
        for layer in self.layout.layers:
            for i in layer.intervals:
                run = layer.layer, i.start, i.elements
                self._note(i.owner, "live", *run, NOW, STATES)
                (replica,) = i.replicas
                self._note(replica, "replica", *run, BEFORE, STATES)
                for worker in WORKERS:
                    if worker != i.owner:
                        self._note(worker, "gathered", *run, NOW, STATES[:1])
        for layer in self.layout.layers:
            for i in layer.intervals:
                self._note(i.owner, "previous", layer.layer, i.start, i.elements, BEFORE, STATES)
        self.comparisons = {worker: Comparison(worker, self.layout, rest) for worker, rest in self.rests.items()}

    def _note(self, worker: int, role: Any, layer: int, start: int, elements: int, step: int, states: tuple[str, ...]) -> None:
        memory = {state: torch.full((elements,), value(layer, start, step, state)) for state in states}
        if self.wrong is not None and self.wrong[:3] == (worker, role, layer) and self.wrong[3] in memory:
            memory[self.wrong[3]][7] += 1
        self.rests[worker].note(role, layer, start, step, memory)

    @property
    def unlike(self) -> bool:
        return unlike({worker: each.digests(NOW, BEFORE) for worker, each in self.comparisons.items()})

    @property
    def copies(self) -> list[Copied]:
        found = [copy for each in self.comparisons.values() for copy in each.copies(NOW, BEFORE)]
        return [Copied.from_json(copy.to_json()) for copy in found]


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_equal_copies_are_alike(every: int) -> None:
    copies = Copies(every)
    assert not copies.unlike
    assert judged(copies.copies) == []


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("role", ["live", "gathered", "replica", "previous"])
def test_any_copy_that_differs_is_found(role: str, state: str) -> None:
    copies = Copies(wrong=(1, role, 0, state))
    if (role, state) == ("gathered", "exp_avg"):
        return  # there is none
    if (role, state) == ("live", "exp_avg"):
        assert not copies.unlike, "nobody else has that of this step yet"
        return
    assert copies.unlike
    found = judged(copies.copies)
    assert {(each.layer, each.state, each.step) for each in found} == {(0, state, NOW if role in ("live", "gathered") else BEFORE)}
    for each in found:
        assert [(copy.worker, copy.role) for copy in each.wrong] == ([(1, role)] if role in ("live", "gathered") else [])
        assert {copy.worker for copy in each.copies} >= {1, each.copies[0].owner}


def test_layers_are_compared_in_turn() -> None:
    for layer in range(2):
        assert Copies(2, (1, "gathered", layer, PARAM)).unlike is ((NOW + layer) % 2 == 0)
        assert Copies(2, (1, "replica", layer, "exp_avg")).unlike is ((BEFORE + layer) % 2 == 0)


def test_what_is_not_digested_yet_is_not_compared() -> None:
    copies = Copies(wrong=(1, "gathered", 0, PARAM))
    copies.rests[1].forget("gathered")
    assert not copies.unlike
    copies.rests[0].forget("live")
    assert not copies.unlike


def test_of_two_copies_neither_is_believed() -> None:
    found = judged([copy for copy in Copies(wrong=(1, "gathered", 0, PARAM)).copies if copy.worker != 2])
    assert found
    assert all(each.wrong == () for each in found)


@pytest.mark.parametrize(("changed", "wrong"), [([0], [0]), ([1], [1]), ([2], [2]), ([1, 2], [0]), ([], [])])
def test_the_most_are_right(changed: list[int], wrong: list[int]) -> None:
    copies = [
        Copied(worker=w, owner=0, role="live" if w == 0 else "gathered", layer=0, start=0, stop=64, step=3, digests={PARAM: value})
        for w in WORKERS
        for value in ["b" if w in changed else "a"]
    ]
    assert [copy.worker for each in judged(copies) for copy in each.wrong] == wrong


@pytest.mark.parametrize(
    ("owner", "gathered", "replica", "wrong"),
    [
        ("a", "aa", "b", []),  # the owner may have been wrong before others gathered
        ("b", "aa", "a", ["live"]),
        ("b", "a", "a", ["live"]),
        ("a", "b", "a", ["gathered"]),
        ("a", "ab", "a", ["gathered"]),
        ("b", "aa", "b", []),
        ("b", "aa", "c", []),
        ("a", "a", "b", []),
    ],
)
def test_a_replica_of_the_same_step_can_clear_a_copy_but_not_be_outvoted(owner: str, gathered: str, replica: str, wrong: list[str]) -> None:
    run = {"owner": 0, "layer": 0, "start": 0, "stop": 64, "step": 3}
    copies = [
        Copied(worker=0, role="live", digests={PARAM: owner}, **run),
        Copied(worker=9, role="replica", digests={PARAM: replica}, **run),
    ]
    copies += [Copied(worker=1 + i, role="gathered", digests={PARAM: each}, **run) for i, each in enumerate(gathered)]
    (difference,) = judged(copies)
    assert [copy.role for copy in difference.wrong] == wrong
    (further,) = judged([*copies, replace(copies[1], worker=10)])  # another replica that got the same gradient shows no more
    assert further.wrong == difference.wrong


def test_replicas_that_differ_from_each_other_show_nothing() -> None:
    run = {"owner": 0, "layer": 0, "start": 0, "stop": 64, "step": 3}
    one, other = (Copied(worker=9 + i, role="replica", digests={PARAM: value}, **run) for i, value in enumerate("ab"))
    for owner in "abc":
        owned = Copied(worker=0, role="live", digests={PARAM: owner}, **run)
        gathered = [Copied(worker=1 + i, role="gathered", digests={PARAM: "a"}, **run) for i in range(3)]
        for copies in ([owned, one, other], [owned, *gathered, one, other]):
            (difference,) = judged(copies)
            assert difference.wrong == ()

"""Memory that changes while nothing writes to it names its own holder; and how often each layer is looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from elastic.layout.transfer import PARAM
from elastic.memory.raw import checksum
from elastic.snapshot.held_copies import Held
from elastic.snapshot.rest_digests import SHARE, Rest, combined, intact, period
from tests.recovery.recovering import view_of

STATES = (PARAM, "exp_avg", "exp_avg_sq")


def shard(elements: int = 256) -> dict[str, torch.Tensor]:
    return {state: torch.randn(elements) for state in STATES}


def copy(role: Any, memory: dict[str, torch.Tensor], *, layer: int = 1, start: int = 64, step: int = 4) -> Held:
    stop = start + memory[PARAM].numel()
    return Held(layer=layer, start=start, stop=stop, step=step, role=role, memory=memory, scalars={})


def flip(memory: torch.Tensor, element: int = 7) -> None:
    memory.view(torch.uint8)[4 * element] ^= 1


@pytest.mark.parametrize("elements", [256, 1 << 15])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("role", ["live", "replica"])
def test_one_bit_names_the_copy_and_the_state(role: Any, state: str, elements: int) -> None:
    rest, memory = Rest(1), shard(elements)
    rest.note(role, 1, 64, 4, memory)
    rest.note(role, 2, 0, 4, shard())
    assert not rest.check()
    flip(memory[state])
    (changed,) = rest.check()
    assert (changed.role, changed.layer, changed.start, changed.stop) == (role, 1, 64, 64 + elements)
    assert (changed.state, changed.step) == (state, 4)
    assert f"{state} of layer 1, run [64, {64 + elements}), as of step 4" in str(changed)
    assert not rest.check(), "it is told once"
    assert rest.given([copy(role, memory)]) == []


def test_what_may_be_written_to_is_forgotten() -> None:
    rest, memory = Rest(1), shard()
    rest.note("live", 1, 64, 4, memory)
    rest.forget("live")
    flip(memory[PARAM])
    assert not rest.check()


def test_a_spare_has_the_contents_of_what_it_is_a_copy_of() -> None:
    rest, memory = Rest(1), shard()
    rest.note("live", 1, 64, 4, memory)
    previous = copy("previous", {state: each.clone() for state, each in memory.items()})
    rest.spared([previous])
    rest.forget("live")
    (given,) = rest.given([previous])
    assert isinstance(given, Held)
    assert given.digest == combined({state: checksum(each.numpy().view("uint8")) for state, each in memory.items()})
    flip(previous.memory["exp_avg"])
    assert not rest.check(), "it is looked at where it is needed"
    assert [changed.role for changed in rest.check(("previous",))] == ["previous"]
    assert rest.given([previous]) == []


def test_a_spare_that_was_wrong_from_the_beginning_is_found() -> None:
    rest, memory = Rest(1), shard()
    rest.note("live", 1, 64, 4, memory)
    flip(memory["exp_avg"])  # between its update and the copy
    rest.spared([copy("previous", {state: each.clone() for state, each in memory.items()})])
    assert {changed.role for changed in rest.check(("live", "previous"))} == {"live", "previous"}


@pytest.mark.parametrize(
    ("role", "state", "given"),
    [("live", PARAM, False), ("live", "exp_avg", True), ("gathered", PARAM, False), ("replica", PARAM, True), ("previous", PARAM, True)],
)
def test_a_layers_parameters_are_not_given_where_a_part_of_them_is_damaged(role: Any, state: str, given: bool) -> None:
    rest, memory = Rest(1), shard()
    rest.note(role, 1, 64, 4, memory) if role != "previous" else rest.note("live", 1, 64, 4, memory)
    if role == "previous":
        rest.spared([copy("previous", memory)])
        rest.forget("live")
    flip(memory[state])
    assert rest.check((role,))
    layer = copy("gathered", {PARAM: torch.zeros(1024)}, start=0)
    assert (rest.given([layer]) == [layer]) is given
    other = replace(layer, layer=2)
    assert rest.given([other]) == [other]


@pytest.mark.parametrize(("origin", "others"), [("live", ("previous", "kept")), ("replica", ("previous replica",))])
def test_what_is_not_trained_is_damaged_in_the_copies_of_all_steps(origin: Any, others: tuple[Any, ...]) -> None:
    """They are one memory, which is digested once, and looked at when a recovery needs it."""
    rest, memory = Rest(1, still=[1]), {PARAM: torch.arange(256.0)}
    rest.note(origin, 1, 64, 4, memory)
    copies = [copy(role, memory, step=3) for role in others]
    rest.spared(copies, origin, others[0])
    rest.forget("live", "replica")
    rest.note(origin, 1, 64, 5, memory)
    assert rest.digest_of(origin, 1, 64, 5) is not None
    assert len(rest.given([copy(origin, memory, step=5), *copies])) == 1 + len(others)
    flip(memory[PARAM])
    assert not rest.check()
    assert [(changed.role, changed.step) for changed in rest.check((origin,), in_turn=False)] == [(origin, 5)]
    elsewhere = replace(copies[0], layer=2)
    assert rest.given([copy(origin, memory, step=5), *copies, elsewhere]) == [elsewhere]


def test_a_copy_that_is_kept_for_long_is_looked_at_again() -> None:
    rest, memory = Rest(1), shard()
    rest.note("live", 1, 64, 4, memory)
    (given,) = rest.given([copy("live", memory)])
    assert intact(given)
    assert intact(replace(given, digest=None)) if isinstance(given, Held) else False
    flip(memory["exp_avg_sq"])
    assert not intact(given)


def test_every_layer_has_its_turn_and_all_have_it_at_comparisons() -> None:
    rest = Rest(5, lambda step: step % 50 == 0)
    for layer in range(7):
        assert [step for step in range(1, 50) if rest.takes(step, layer)] == [s for s in range(1, 50) if (s + layer) % 5 == 0]
        assert rest.takes(50, layer)
    memory = shard()
    rest.note("live", 0, 0, 4, memory)
    assert rest.digest_of("live", 0, 0, 4) is None
    rest.note("live", 0, 0, 5, memory)
    assert rest.digest_of("live", 0, 0, 5) is not None
    assert rest.digest_of("live", 0, 0, 6) is None


def views(parameters: int, step_s: float) -> Any:
    found = view_of((0, 1), layers=4)
    layers = tuple(replace(layer, parameters=parameters) for layer in found.workload.layers)
    return replace(found, workload=replace(found.workload, layers=layers, state_bytes=8.0), plan=replace(found.plan, step_s=step_s))


def test_layers_take_turns_so_that_the_share_of_a_step_is_bounded() -> None:
    assert period(views(1000, 0.02)) == 1
    assert period(views(10**6, 5.0)) == 1
    held = 4 * 10**7 * (4 + 2 * 12 / 2)  # bytes: all parameters, and half of the state twice
    assert period(views(10**7, 1.0)) == pytest.approx(2 * held / 5e9 / SHARE, abs=1)
    assert period(views(10**7, 0.1)) == pytest.approx(10 * period(views(10**7, 1.0)), rel=0.1)


def test_the_next_view_takes_over_digests_of_the_same_memory_only() -> None:
    memory = {"exp_avg": torch.arange(4.0)}
    before, after, other = (Rest(1) for _ in range(3))
    before.note("live", 0, 0, 5, memory)
    memory["exp_avg"][2] = -1.0  # while nobody looked
    after.note("live", 0, 0, 5, memory, before)
    assert [changed.state for changed in after.check()] == ["exp_avg"]
    other.note("live", 0, 0, 5, {"exp_avg": memory["exp_avg"].clone()}, before)
    assert other.check() == []
    later = Rest(1)
    later.note("live", 0, 0, 6, memory, before)
    assert later.check() == []

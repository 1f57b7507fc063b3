"""Tests that a good migration passes, and that each kind of seeded defect is refused with the name of its check."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic.errors import GateRefused
from elastic.layout.layout import Interval, Layout
from elastic.layout.regions import ALIGNMENT, BLOCK, LayerSpec, ModelSpec
from elastic.layout.transfer import PARAM, Transfer
from elastic.recovery.gate import check_proposal, check_received, check_scalars
from elastic.recovery.inventory import Progress
from elastic.recovery.proposal import Proposal, propose
from elastic.view import View
from tests.recovery.recovering import inventories_of, member, view_of

LAST = view_of([0, 1, 2, 3], stages=2, hosts=("a", "b"))
INVENTORIES = inventories_of(LAST, (0, 2, 3))
GOOD = propose(last=LAST, attempt=1, inventories=INVENTORIES, joiners={7: member(7, "b")}, stages=2)
VIEW, LAYOUT = GOOD.view, GOOD.view.layout
MOVE = GOOD.transfers[0]


def force(value: Any, **changes: Any) -> Any:
    """A copy with changed fields that its own checks do not see, as if it came damaged over a wire."""
    copy = object.__new__(type(value))
    for name in value.__dataclass_fields__:
        object.__setattr__(copy, name, changes.get(name, getattr(value, name)))
    return copy


def view(**changes: Any) -> Proposal:
    return replace(GOOD, view=force(VIEW, **changes))


def plan(**changes: Any) -> Proposal:
    return view(plan=force(VIEW.plan, **changes))


def layer(number: int = 1, **changes: Any) -> Proposal:
    layers = list(LAYOUT.layers)
    layers[number] = replace(layers[number], **changes)
    return view(layout=replace(LAYOUT, layers=tuple(layers)))


FIRST, SECOND = LAYOUT.layers[1].intervals[:2]
REST = LAYOUT.layers[1].intervals[2:]
OTHER_STAGE = LAYOUT.layers[3].members


def intervals(first: Interval = FIRST, second: Interval = SECOND) -> Proposal:
    return layer(intervals=(first, second, *REST))


def transfers(*moves: Transfer) -> Proposal:
    return replace(GOOD, transfers=moves)


def without(condition: Callable[[Transfer], bool]) -> Proposal:
    return transfers(*(move for move in GOOD.transfers if not condition(move)))


def members(*changed: Any) -> Proposal:
    return view(members=changed, workers=tuple(each.worker for each in changed))


def routes(change: Callable[[tuple[int, ...]], tuple[int, ...]], stage: int = 0) -> Proposal:
    changed = list(VIEW.plan.routes)
    changed[stage] = change(changed[stage])
    return plan(routes=tuple(changed))


HOSTS = {one.worker: one.host for one in VIEW.members}
SAME_HOST = next(worker for worker in VIEW.workers if worker != FIRST.owner and HOSTS[worker] == HOSTS[FIRST.owner])
TO_JOINER = next(move for move in GOOD.transfers if move.destination == 7)
OTHER_SOURCE = next(worker for worker in (0, 2, 3) if worker not in (MOVE.source, MOVE.destination))
SWAPPED = tuple(replace(a, members=b.members) for a, b in zip(VIEW.plan.stages, VIEW.plan.stages[::-1], strict=True))
LAST_STAGE = VIEW.plan.stages[-1]
INSIDE = FIRST.stop + ALIGNMENT

DAMAGE: dict[str, tuple[str, Proposal]] = {
    "stale epoch": ("attempt", view(epoch=LAST.epoch)),
    "epoch skipped": ("attempt", view(epoch=LAST.epoch + 2)),
    "attempt before the first": ("attempt", view(attempt=0)),
    "no survivor": ("membership", members(*(member(w, "b") for w in (7, 8, 9)))),
    "survivor at another address": ("membership", members(replace(VIEW.members[0], address="tcp:evil"), *VIEW.members[1:])),
    "joiner coordinates": ("membership", members(VIEW.members[-1], *VIEW.members[:-1])),
    "member without a stage": ("membership", members(*VIEW.members, member(8))),
    "plan names a stranger": ("membership", members(*VIEW.members[:-1])),
    "owner is a stranger": ("membership", intervals(replace(FIRST, owner=77))),
    "replica is a stranger": ("membership", intervals(replace(FIRST, replicas=(1,)))),
    "transfer to a stranger": ("membership", transfers(replace(MOVE, destination=1), *GOOD.transfers[1:])),
    "transfer from the dead": ("membership", transfers(replace(MOVE, source=1), *GOOD.transfers[1:])),
    "route to a stranger": ("membership", routes(lambda route: (77, *route[1:]))),
    "route to another stage": ("routes", routes(lambda route: (OTHER_STAGE[0], *route[1:]))),
    "grain dropped": ("routes", routes(lambda route: route[:-1])),
    "grain dropped in all stages": ("routes", plan(routes=tuple(route[:-1] for route in VIEW.plan.routes))),
    "grain twice": ("routes", routes(lambda route: (*route, route[-1]), stage=1)),
    "another batch": ("routes", view(workload=replace(VIEW.workload, micro_batches=16))),
    "layer in another stage than planned": ("stages", layer(1, members=OTHER_STAGE)),
    "layer that is not planned": ("stages", plan(stages=(*VIEW.plan.stages[:-1], replace(LAST_STAGE, layers=LAST_STAGE.layers[:-1])))),
    "members of stages swapped": ("routes", plan(stages=SWAPPED)),
    "layer lost": ("order", view(layout=replace(LAYOUT, layers=LAYOUT.layers[:-1]))),
    "interval lost": ("coverage", layer(intervals=(FIRST, *REST))),
    "last interval lost": ("coverage", layer(intervals=(FIRST, SECOND, *REST)[:-1])),
    "overlap": ("single owner", intervals(replace(FIRST, stop=FIRST.stop + BLOCK))),
    "interval twice": ("single owner", layer(intervals=(FIRST, FIRST, SECOND, *REST))),
    "first shifted by a block": ("coverage", intervals(replace(FIRST, start=FIRST.start + BLOCK))),
    "interval shifted by a block": ("coverage", intervals(second=replace(SECOND, start=SECOND.start + BLOCK, stop=SECOND.stop + BLOCK))),
    "cut inside a block": ("alignment", intervals(replace(FIRST, stop=INSIDE), replace(SECOND, start=INSIDE))),
    "owner of another stage": ("ownership", intervals(replace(FIRST, owner=OTHER_STAGE[0]))),
    "replica missing": ("replication", intervals(replace(FIRST, replicas=()))),
    "replica is the owner": ("replication", intervals(replace(FIRST, replicas=(FIRST.owner,)))),
    "replica on the owner's host": ("replication", intervals(replace(FIRST, replicas=(SAME_HOST,)))),
    "transfer twice": ("transfers", transfers(*GOOD.transfers, MOVE)),
    "transfer twice from another": ("transfers", transfers(*GOOD.transfers, replace(MOVE, source=OTHER_SOURCE))),
    "transfer overlaps": ("transfers", transfers(*GOOD.transfers, replace(MOVE, stop=MOVE.start + ALIGNMENT))),
    "transfer to itself": ("transfers", transfers(replace(MOVE, destination=MOVE.source), *GOOD.transfers[1:])),
    "transfer from a joiner": ("transfers", transfers(replace(MOVE, source=7, destination=0), *GOOD.transfers[1:])),
    "transfer of nothing": ("transfers", transfers(replace(MOVE, stop=MOVE.start), *GOOD.transfers[1:])),
    "transfer outside of the layer": ("transfers", transfers(replace(MOVE, stop=10**9), *GOOD.transfers[1:])),
    "transfer of a layer that is not there": ("transfers", transfers(replace(MOVE, layer=9), *GOOD.transfers[1:])),
    "transfer of an unknown state": ("transfers", transfers(replace(MOVE, state="momentum"), *GOOD.transfers[1:])),
    "joiner gets no parameters": ("transfers", without(lambda move: move.destination == 7 and move.state == PARAM)),
    "joiner misses one transfer": ("transfers", without(lambda move: move == TO_JOINER)),
    "progress of another step": ("resume", replace(GOOD, progress=Progress(step=4, apply={}))),
    "wrong step": ("resume", replace(GOOD, resume=4)),
    "step before the first": ("resume", replace(GOOD, resume=-2, progress=None)),
    "optimizer state of the initial state": ("resume", replace(GOOD, resume=-1, progress=None)),
    "scalars of an unknown parameter": ("resume", replace(GOOD, scalars={"nobody.w": {"step": 1.0}})),
}  # fmt: skip


def refused(proposal: Proposal, last: View | None = LAST, inventory=None) -> str:
    with pytest.raises(GateRefused) as caught:
        check_proposal(proposal, last, inventory)
    assert str(caught.value).startswith(f"{caught.value.check}: ")
    return caught.value.check


def test_a_good_proposal_passes():
    check_proposal(GOOD, LAST)
    check_proposal(GOOD, None)
    for inventory in INVENTORIES.values():
        check_proposal(GOOD, LAST, inventory)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(name):
    check, proposal = DAMAGE[name]
    assert refused(proposal) == check


def test_another_model_is_refused():
    model = ModelSpec(layers=tuple(LayerSpec.build(i, [("a", (9 * BLOCK,), "bfloat16")]) for i in range(4)))
    assert refused(view(layout=Layout(model=model, layers=LAYOUT.layers))) == "stages"


def test_a_joiner_refuses_what_it_can_see():
    assert refused(view(attempt=0), None) == "attempt"
    assert refused(intervals(replace(FIRST, replicas=())), None) == "replication"


SHRUNK = propose(last=LAST, attempt=1, inventories=INVENTORIES, joiners={}, stages=2)


def test_a_survivor_misses_a_transfer_that_only_it_can_know_of():
    for move in SHRUNK.transfers:
        proposal = replace(SHRUNK, transfers=tuple(other for other in SHRUNK.transfers if other != move))
        check_proposal(proposal, LAST)
        assert refused(proposal, inventory=INVENTORIES[move.destination]) == "inventory"


def test_a_survivor_does_not_hold_what_it_is_to_send():
    for move in SHRUNK.transfers:
        assert refused(SHRUNK, inventory=replace(INVENTORIES[move.source], copies=())) == "inventory"


def test_a_survivor_that_holds_another_step_refuses():
    assert refused(replace(GOOD, resume=4, progress=None), inventory=INVENTORIES[0]) == "inventory"


def test_of_the_yielded_steps_only_the_newest_is_taken_back():
    assert refused(GOOD, inventory=replace(INVENTORIES[0], yielded=7)) == "inventory"
    check_proposal(GOOD, LAST, replace(INVENTORIES[0], yielded=6))


MOVES = [
    Transfer(source=s, destination=0, state="exp_avg", layer=0, start=i * BLOCK, stop=(i + 1) * BLOCK) for i, s in enumerate((1, 2, 1))
]
CONTENTS = dict(zip(MOVES, np.random.default_rng(1).random((3, BLOCK)), strict=True))


def digests(contents) -> dict[Transfer, str]:
    return {move: hashlib.sha256(values.tobytes()).hexdigest() for move, values in contents.items()}


def refused_receipt(received, announced=None, expected=MOVES) -> str:
    with pytest.raises(GateRefused) as caught:
        check_received(expected, received, digests(CONTENTS) if announced is None else announced)
    return caught.value.check


def test_what_was_sent_passes():
    check_received(MOVES, digests(CONTENTS), digests(CONTENTS))
    check_received([], {}, {})


def test_a_missing_transfer_is_refused():
    assert refused_receipt(digests({move: CONTENTS[move] for move in MOVES[1:]})) == "completeness"


def test_an_extra_transfer_is_refused():
    extra = replace(MOVES[0], layer=1)
    assert refused_receipt(digests({**CONTENTS, extra: CONTENTS[MOVES[0]]})) == "completeness"
    assert refused_receipt(digests(CONTENTS), digests({**CONTENTS, extra: CONTENTS[MOVES[0]]})) == "completeness"


def test_a_transfer_expected_twice_is_refused():
    assert refused_receipt(digests(CONTENTS), expected=[*MOVES, MOVES[0]]) == "completeness"


def test_contents_of_two_runs_swapped_are_refused():
    """Norms and sums of the whole are the same."""
    swapped = {**CONTENTS, MOVES[0]: CONTENTS[MOVES[1]], MOVES[1]: CONTENTS[MOVES[0]]}
    assert refused_receipt(digests(swapped)) == "contents"


def test_two_elements_swapped_and_one_bit_flipped_are_refused():
    values = CONTENTS[MOVES[2]].copy()
    values[[10, 20]] = values[[20, 10]]
    assert refused_receipt(digests({**CONTENTS, MOVES[2]: values})) == "contents"
    flipped = CONTENTS[MOVES[2]].copy()
    flipped.view(np.uint8)[77] ^= 1
    assert refused_receipt(digests({**CONTENTS, MOVES[2]: flipped})) == "contents"


def test_a_digest_that_was_not_announced_is_refused():
    assert refused_receipt(digests(CONTENTS), digests({move: CONTENTS[move] for move in MOVES[:2]})) == "contents"


SCALARS = {"a": {"step": 5.0}, "b": {"step": 5.0, "eta": 0.1}}


@pytest.mark.parametrize(
    "installed",
    [{"a": {"step": 4.0}}, {"a": {}}, {"b": {"step": 5.0}}, {"b": {"step": 5.0, "eta": 0.1, "mu": 1.0}}, {"c": {"step": 5.0}}],
)
def test_other_scalars_are_refused(installed):
    with pytest.raises(GateRefused) as caught:
        check_scalars(SCALARS, installed)
    assert caught.value.check == "scalars"


def test_equal_scalars_pass():
    check_scalars(SCALARS, {"b": {"eta": 0.1, "step": 5.0}})
    check_scalars({}, {"frozen": {}})

"""Tests what is offered of dead workers' segments, and the proposals made from it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from elastic.agent.segments import Segments
from elastic.agent.supervision import WorkerProcess
from elastic.errors import CoverageLost
from elastic.layout.transfer import PARAM
from elastic.memory import segment
from elastic.memory.segment import PAGE, MappedSegment, OwnSegment
from elastic.memory.tensors import use_segment
from elastic.observe import console
from elastic.recovery.gate import check_proposal
from elastic.recovery.inventory import Inventory, Progress
from elastic.recovery.offers import Contents, Directory, Place, Run, runs
from elastic.recovery.proposal import Buffers, Proposal, propose
from elastic.view import View
from tests.recovery.recovering import inventory_of, member, view_of
from tests.recovery.stored_worker import Worker, checksums, truth

# Proposals


def outliving(view: View, hosts: str = "") -> View:
    """Returns a view whose workers have segments and no replicas; `hosts` names each worker's host by a letter."""
    there = hosts or "a" * len(view.members)
    members = tuple(replace(each, segment=True, host=host) for each, host in zip(view.members, there, strict=True))
    layers = tuple(replace(layer, intervals=tuple(replace(i, replicas=()) for i in layer.intervals)) for layer in view.layout.layers)
    return replace(view, members=members, layout=replace(view.layout, layers=layers))


LAST = outliving(view_of([0, 1, 2, 3], stages=2))


def offer(worker: int, step: int = 5, *, ahead: bool = False, last: View = LAST) -> Inventory:
    """Returns what a segment offers; a worker `ahead` has applied the next step too, and its settings are known."""
    found = inventory_of(last, worker, step, [worker] if ahead else ())
    scalars, progress = dict(found.scalars), dict(found.progress)
    if ahead:
        scalars[step + 1] = {name: {"step": step + 2.0} for name in scalars[step]}
        progress[step + 1] = replace(progress[step], step=step + 1)
    copies = tuple(copy for copy in found.copies if copy.role != "gathered")
    return replace(found, copies=copies, scalars=scalars, progress=progress)


def proposed(survivors: list[Inventory], offers: list[Inventory], joiners: tuple[int, ...] = (), last: View = LAST) -> Proposal:
    found = propose(
        last=last,
        attempt=2,
        inventories={each.worker: each for each in survivors},
        joiners={worker: replace(member(worker, "a"), segment=True) for worker in joiners},
        stages=2,
        offers=offers,
    )
    check_proposal(found, last)
    assert Proposal.from_json(json.loads(json.dumps(found.to_json()))) == found
    return found


def copied_from(proposal: Proposal) -> set[int]:
    return {proposal.transfers[place].source for place in proposal.copied}


def test_survivors_copy_what_a_dead_worker_owned() -> None:
    found = proposed([inventory_of(LAST, worker, 5) for worker in (0, 2, 3)], [offer(1)])
    assert (found.resume, found.view.workers) == (5, (0, 2, 3))
    assert 1 in copied_from(found)
    assert all(place in found.copied for place, move in enumerate(found.transfers) if move.source == 1)
    assert found.bytes_minimum


def test_without_an_offer_of_it_its_state_is_lost() -> None:
    with pytest.raises(CoverageLost, match="no surviving worker has a full copy of layer"):
        proposed([inventory_of(LAST, worker, 5) for worker in (0, 2, 3)], [])


@pytest.mark.parametrize("dead", [(0,), (1, 2), (0, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_any_workers_may_die_at_once(dead: tuple[int, ...]) -> None:
    left = [inventory_of(LAST, worker, 5) for worker in LAST.workers if worker not in dead]
    found = proposed(left, [offer(worker) for worker in dead], joiners=(7, 8))
    assert found.resume == 5
    assert set(dead) <= copied_from(found)
    assert not {move.source for move in found.transfers} - set(LAST.workers)
    assert found.progress is not None


def test_members_that_left_nothing_are_replaced_from_those_of_the_view_before() -> None:
    """They were killed before they had written anything, so the segments of their predecessors are still there."""
    later = dataclasses.replace(proposed([], [offer(worker) for worker in LAST.workers], joiners=(7, 8, 9)).view, epoch=LAST.epoch + 1)
    found = proposed([], [offer(worker) for worker in LAST.workers], joiners=(10, 11), last=later)
    assert found.resume == 5
    assert copied_from(found) <= set(LAST.workers)
    assert found.transfers
    assert len(found.copied) == len(found.transfers)


def test_members_of_several_hosts_that_left_nothing_are_replaced_from_those_of_the_view_before() -> None:
    """What a destination takes from a segment is on its own host, or a member of that host sends it."""
    before = outliving(view_of([0, 1, 2, 3], stages=2), "aabb")
    on = {worker: replace(member(worker, host), segment=True) for worker, host in ((7, "a"), (8, "b"), (9, "b"), (10, "a"), (11, "b"))}
    dead = [offer(worker, last=before) for worker in before.workers]
    first = propose(last=before, attempt=2, inventories={}, joiners={each: on[each] for each in (7, 8, 9)}, stages=2, offers=dead)
    last = replace(first.view, epoch=before.epoch + 1)
    homes = {member.worker: member.host for member in before.members}
    found = propose(last=last, attempt=2, inventories={}, joiners={each: on[each] for each in (10, 11)}, stages=2, offers=dead, homes=homes)
    check_proposal(found, last)
    where = {**homes, **{each: each_on.host for each, each_on in on.items()}}
    assert all(where[move.source] == where[move.destination] for place, move in enumerate(found.transfers) if place in found.copied)
    assert found.relayed
    assert all(where[found.transfers[place].source] == where[dead_one] for place, dead_one in found.relayed)


def test_nobody_left_and_nothing_offered() -> None:
    with pytest.raises(CoverageLost, match="no worker of epoch 3 is left"):
        proposed([], [], joiners=(7,))


@pytest.mark.parametrize("ahead", [(), (1,), (1, 3), (0, 1, 2)])
def test_where_not_all_had_applied_a_step_all_go_one_back(ahead: tuple[int, ...]) -> None:
    found = proposed([], [offer(worker, ahead=worker in ahead) for worker in LAST.workers], joiners=(7, 8))
    assert found.resume == 5
    assert set(found.scalars) == {f"{i}.w" for i in range(4)}


def test_where_all_had_applied_it_they_go_on_from_it() -> None:
    found = proposed([], [offer(worker, ahead=True) for worker in LAST.workers], joiners=(7, 8))
    assert found.resume == 6
    assert (found.progress or Progress(step=0, apply=None)).step == 6


def test_a_step_whose_settings_nobody_has_is_taken_again() -> None:
    """All died between the end of an update and the record of its settings."""
    offers = [offer(worker, ahead=True) for worker in LAST.workers]
    without = [replace(each, progress={5: each.progress[5]}) for each in offers]
    assert proposed([], without, joiners=(7, 8)).resume == 5
    assert proposed([], [*without[:3], offers[3]], joiners=(7, 8)).resume == 6


def test_survivors_that_own_nothing_learn_the_step_from_the_dead() -> None:
    """Optimizers that own whole tensors leave some workers of a stage without any; here all owners had applied a step and died."""
    owners = {i.owner for layer in LAST.layout.layers for i in layer.intervals}
    given = [replace(layer, intervals=tuple(replace(i, owner=min(layer.members)) for i in layer.intervals)) for layer in LAST.layout.layers]
    last = replace(LAST, layout=replace(LAST.layout, layers=tuple(given)))
    lone = {min(layer.members) for layer in given}
    left = [inventory_of(last, worker, 5) for worker in owners - lone]
    dead = [offer(worker, ahead=True, last=last) for worker in sorted(lone)]
    found = proposed(left, dead, last=last)
    assert (found.resume, found.progress and found.progress.step) == (6, 6)
    unknown = [replace(each, progress={5: each.progress[5]}) for each in dead]
    assert proposed(left, unknown, last=last).resume == 5


def test_a_living_worker_of_the_host_is_copied_from_and_one_of_another_host_sends() -> None:
    last = outliving(LAST, hosts="aabb")
    left = [inventory_of(last, worker, 5) for worker in last.workers]
    found = proposed(left, [], joiners=(7,), last=last)
    members = {each.worker: each for each in found.view.members}
    assert found.transfers
    for place, move in enumerate(found.transfers):
        assert (place in found.copied) is (members[move.source].host == members[move.destination].host)
    assert copied_from(found)
    assert len(found.copied) < len(found.transfers)


def test_what_a_living_worker_keeps_for_others_is_sent() -> None:
    """Replicas do not lie in segments, and those without a segment have only links."""
    replicated = view_of([0, 1, 2, 3], stages=2)
    last = replace(replicated, members=tuple(replace(each, segment=True) for each in replicated.members))
    left = [inventory_of(last, worker, 5) for worker in (0, 2, 3)]
    found = propose(last=last, attempt=2, inventories={each.worker: each for each in left}, joiners={}, stages=2)
    held = {(worker.worker, copy.layer) for worker in left for copy in worker.copies if copy.role == "replica"}
    by_link = [move for place, move in enumerate(found.transfers) if place not in found.copied]
    assert by_link
    assert all((move.source, move.layer) in held for move in by_link)
    without = replace(last, members=tuple(replace(each, segment=False) for each in last.members))
    assert propose(last=without, attempt=2, inventories={each.worker: each for each in left}, joiners={}, stages=2).copied == ()


def test_buffers_come_from_a_survivor_or_else_from_a_segment_that_has_them() -> None:
    def having(inventory: Inventory, *steps: int) -> Inventory:
        return replace(inventory, buffers={step: f"digest {step}" for step in steps})

    left = [having(inventory_of(LAST, worker, 5), 4, 5) for worker in (0, 2)]
    found = proposed(left, [having(offer(1), 4, 5), having(offer(3), 4, 5)], joiners=(7,))
    assert found.buffers == Buffers(source=0, to=(7,), digest="digest 5")
    dead = [having(offer(worker, ahead=True), *([5, 6] if worker != 2 else [6])) for worker in LAST.workers]
    found = proposed([], dead[1:] + dead[:1], joiners=(7, 8))
    assert found.buffers == Buffers(source=0, to=(7, 8), digest="digest 6", copied=(7, 8))
    with pytest.raises(CoverageLost, match="has the buffers that training changes as of step 6"):
        proposed([], [replace(each, buffers={5: "digest 5"}) for each in dead], joiners=(7, 8))


def test_buffers_of_a_dead_worker_of_another_host_are_passed_on_by_a_member_of_its_host() -> None:
    last = outliving(view_of([0, 1, 2, 3], stages=2), "aabb")
    dead = [replace(offer(worker, last=last), buffers={5: "digest 5"} if worker == 2 else {}) for worker in last.workers]
    joiners = {worker: replace(member(worker, host), segment=True) for worker, host in ((7, "a"), (8, "b"), (9, "b"))}
    found = propose(last=last, attempt=2, inventories={}, joiners=joiners, stages=2, offers=dead)
    buffers = found.buffers
    assert buffers == Buffers(source=2, to=(7, 8, 9), digest="digest 5", copied=(8, 9))
    assert (buffers.sender, buffers.receivers) == (8, (7,))
    assert Proposal.from_json(json.loads(json.dumps(found.to_json()))).buffers == buffers


# Segments


class Died:
    """The segment of worker 7, which took some steps, in the hands of its agent."""

    def __init__(self, steps: int, *, last_digested: bool = True, seed: int = 1) -> None:
        self.segments = Segments(wanted=True)
        fd = self.segments.create(7)
        assert fd is not None
        self.fd, self.segment = fd, OwnSegment(fd)
        use_segment(self.segment)
        self.worker = Worker(self.segment, random.Random(seed))
        for step in range(steps):
            self.worker.take_step(digested=last_digested or step < steps - 1)

    def offered(self, by: int = signal.SIGKILL) -> Inventory | None:
        return self.segments.offer(WorkerProcess(number=7, status=-by))

    @property
    def contents(self) -> Contents:
        mapped = MappedSegment(os.dup(self.fd))
        found = Contents.read(mapped)
        assert found is not None
        mapped.close()
        return found

    def write(self, offset: int, content: bytes = b"?") -> None:
        """Writes into the segment as a faulty pointer would."""
        os.pwrite(self.fd, content, offset)

    def place(self, role: str) -> Place:
        return next(place for place in self.contents.directory.places if place.role == role)


Make = Callable[..., Died]


@pytest.fixture
def died() -> Iterator[Make]:
    found: list[Died] = []

    def make(*arguments: Any, **options: Any) -> Died:
        found.append(Died(*arguments, **options))
        return found[-1]

    yield make
    use_segment(None)
    for each in found:
        each.segments.release(7)


def steps_of(inventory: Inventory | None, role: str) -> set[int]:
    return set() if inventory is None else {copy.step for copy in inventory.copies if copy.role == role}


def test_nothing_is_offered_of_an_empty_segment_or_without_one() -> None:
    segments = Segments(wanted=True)
    process = WorkerProcess(number=7, status=-9)
    assert segments.offer(process) is None
    assert segments.create(7) is not None
    assert segments.offer(process) is None
    segments.release(7)
    segments.release(7)
    assert segments.descriptors([7]) == {}
    assert Segments(wanted=False).create(7) is None


def test_a_host_without_anonymous_files_is_told_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(os, "memfd_create")
    segments = Segments(wanted=True)
    assert (segments.create(1), segments.create(2)) == (None, None)
    console.drain()
    (line,) = capfd.readouterr().err.splitlines()
    assert "no anonymous files in memory (memfd): so workers keep copies of each other's state" in line


def test_a_killed_worker_s_copies_of_two_steps_are_offered(died: Make) -> None:
    found = died(3).offered()
    assert found is not None
    assert (steps_of(found, "live"), steps_of(found, "previous"), steps_of(found, "gathered")) == ({2}, {1}, set())
    assert set(found.scalars) == set(found.buffers) == {1, 2}
    assert found.states == {"exp_avg": "same"}
    assert found.yielded == 2
    assert Inventory.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("by", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL])
def test_of_a_worker_that_ended_by_its_own_fault_only_what_was_digested_is_offered(died: Make, by: int) -> None:
    found = died(3).offered(by)
    assert (steps_of(found, "live"), steps_of(found, "previous")) == ({2}, {1})
    found = died(3, last_digested=False).offered(by)
    assert (steps_of(found, "live"), steps_of(found, "previous")) == (set(), {1})


def test_of_replicas_too_those_that_were_digested_are_offered(died: Make) -> None:
    one = died(3, seed=2)
    kept = one.worker.kept.shards
    assert kept, "the worker has replicas"
    one.worker.replay()
    one.worker.contents.digested(one.worker.replayed, checksums(kept))
    found = one.offered(signal.SIGSEGV)
    assert found is not None
    assert {(copy.layer, copy.start) for copy in found.copies if copy.role == "replica"} == kept.keys()
    assert steps_of(found, "replica") == {2}
    place = one.place("replica")
    one.write(place.states["exp_avg"][0] + 5)
    found = one.offered(signal.SIGSEGV)
    assert found is not None
    assert {(copy.layer, copy.start) for copy in found.copies if copy.role == "replica"} == kept.keys() - {(place.layer, place.start)}


@pytest.mark.parametrize("role", ["live", "previous"])
@pytest.mark.parametrize("state", [PARAM, "exp_avg"])
def test_a_copy_that_was_scribbled_over_is_not_offered(died: Make, role: str, state: str) -> None:
    one = died(3)
    place = one.place(role)
    one.write(place.states[state][0] + 5)
    before, after = one.offered(), one.offered(signal.SIGSEGV)
    assert before is not None
    assert after is not None
    kept = [copy for copy in before.copies if (copy.role, copy.layer, copy.start) != (role, place.layer, place.start)]
    assert list(after.copies) == kept
    assert len(kept) == len(before.copies) - 1


def test_buffers_that_were_scribbled_over_are_not_offered(died: Make) -> None:
    one = died(3)
    one.write(one.contents.buffers[2].offset)
    found = one.offered(signal.SIGSEGV)
    assert found is not None
    assert set(found.buffers) == {1}


@pytest.mark.parametrize("seed", range(30))
def test_scribbles_in_the_header_and_the_records_end_in_less_and_never_in_wrong(died: Make, seed: int) -> None:
    one, chance = died(3), random.Random(seed)
    used = os.fstat(one.fd).st_blocks * 512
    for _ in range(chance.choice([1, 5, 40])):
        at = chance.choice([chance.randrange(640), chance.randrange(640), chance.randrange(used)])
        one.write(at, chance.randbytes(chance.choice([1, 8, 64])))
    found = one.offered(signal.SIGSEGV)
    mapped = MappedSegment(os.dup(one.fd))
    for copy in found.copies if found is not None else ():
        contents = one.contents
        for state in (PARAM, "exp_avg"):
            for run in runs(contents, copy.step, state, copy.layer, copy.start, copy.stop):
                assert run.offset is not None
                if contents.step_of(one.place(copy.role)) == copy.step:
                    bytes_found = mapped.bytes_at(run.offset, 4 * (run.stop - run.start)).tobytes()
                    assert bytes_found == truth(state, copy.layer, copy.step, run.start, run.stop).tobytes()
    mapped.close()


def test_a_header_of_zeros_and_one_of_ones_offer_nothing(died: Make) -> None:
    for content in (bytes(PAGE), b"\xff" * PAGE):
        one = died(1)
        one.write(0, content)
        assert one.offered(signal.SIGSEGV) is None


# Runs


def directory(*places: Place) -> Contents:
    made = Directory(worker=7, number=1, places=places, states={"exp_avg": "same"}, scalars={4: {}, 5: {}})
    assert Directory.from_json(json.loads(json.dumps(made.to_json()))) == made
    return Contents(directory=made, live=5, previous=4, scalars=made.scalars, digests={})


def a_place(role: Any, start: int, stop: int, offset: int, step: int | None = None, *states: str) -> Place:
    return Place(role=role, layer=0, start=start, stop=stop, states=dict.fromkeys((PARAM, *states), (offset, 4)), step=step)


def test_runs_of_a_state_are_found_in_all_copies_of_its_step() -> None:
    contents = directory(
        a_place("gathered", 0, 256, 10_000),
        a_place("live", 0, 64, 20_000, None, "exp_avg"),
        a_place("previous", 0, 64, 30_000, None, "exp_avg"),
        a_place("live", 128, 192, 40_000, 4, "exp_avg"),  # a copy of the view before
    )
    assert runs(contents, 5, "exp_avg", 0, 0, 256) == [Run(0, 64, 20_000)]
    assert runs(contents, 4, "exp_avg", 0, 32, 160) == [Run(32, 64, 30_128), Run(128, 160, 40_000)]
    assert runs(contents, 5, PARAM, 0, 32, 128) == [Run(32, 64, 20_128), Run(64, 128, 10_256)]
    assert runs(contents, 3, "exp_avg", 0, 0, 256) == []
    assert runs(contents, 5, "exp_avg", 1, 0, 256) == []


def test_a_state_that_the_optimizer_has_not_made_is_zeros_but_not_where_there_are_only_parameters() -> None:
    contents = directory(a_place("live", 0, 64, 20_000), a_place("gathered", 0, 256, 10_000), a_place("gathered", 0, 256, 50_000, 5))
    assert runs(contents, 5, "exp_avg", 0, 0, 256) == [Run(0, 64, None)]
    assert runs(contents, 5, PARAM, 0, 64, 128)[0].offset in (10_256, 50_256)
    assert runs(contents, 4, PARAM, 0, 64, 128)[0].offset == 10_256


def test_a_mark_without_scalars_of_its_step_counts_for_nothing() -> None:
    contents = replace(directory(a_place("live", 0, 64, 20_000)), live=6)
    assert contents.complete == []
    assert contents.step_of(contents.directory.places[0]) == segment.NONE

"""Tests that a segment never says that a copy is complete which is not: what it says is checked after every store."""

from __future__ import annotations

import itertools
import os
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.layout.transfer import PARAM
from elastic.memory.digest import digest
from elastic.memory.raw import checksum
from elastic.memory.segment import HEADER_BYTES, NONE, MappedSegment, OwnSegment, create
from elastic.memory.tensors import use_segment
from elastic.recovery.offers import Contents, Place, runs
from elastic.worker.plain_state import from_plain
from tests.memory.recorded_segment import recorded
from tests.recovery.stored_worker import Worker, buffers, states_of, truth


class Checked:
    """Checks what a segment says. `complete` is the step that was complete at last, None before the first view."""

    def __init__(self) -> None:
        self.complete: int | None = None

    def __call__(self, copy: MappedSegment) -> None:
        contents = Contents.read(copy)
        if contents is None:
            assert self.complete is None
            return
        for place in contents.complete:
            self.check(copy, contents, place)
        for step, place in contents.buffers.items():
            found = copy.bytes_at(place.offset, place.size)
            assert (found == buffers(step)).all()
            assert (place.digest, place.checksum) == (digest(found.copy()), checksum(found))
        if self.complete is not None:
            self.check_replicas(contents)
            steps = {step for step in (contents.live, contents.previous) if step in (self.complete, self.complete - 1, self.complete + 1)}
            assert steps, (contents.live, contents.previous, self.complete)
            owned = {(place.layer, place.start) for place in contents.directory.places if place.role == "live"}
            whole = {contents.step_of(place) for place in contents.complete if (place.layer, place.start) in owned}
            assert steps & whole & contents.buffers.keys()
            assert contents.loop is not None
            offered = contents.offered(contents.complete, sums=False)
            assert {each.step for each in offered.copies} <= offered.scalars.keys()

    def check_replicas(self, contents: Contents) -> None:
        """A step that was begun to be applied has been complete everywhere, its replicas too; so is the one before until then."""
        applying = contents.previous if contents.live == NONE else contents.live
        usable = {applying, applying - 1} if contents.live != NONE and contents.previous == applying - 1 else {applying}
        complete = [(place, contents.step_of(place)) for place in contents.complete if "replica" in place.role]
        for kept in contents.directory.places:
            if kept.role == "replica" and kept.step is None:
                steps = {step for place, step in complete if (place.layer, place.start, place.stop) == (kept.layer, kept.start, kept.stop)}
                assert steps & usable, (kept, steps, contents.live, contents.previous)

    def check(self, copy: MappedSegment, contents: Contents, place: Place) -> None:
        step, layer = contents.step_of(place), place.layer
        assert step != NONE
        own = place.step is not None or place.role in ("live", "previous")
        scalars = contents.scalars if own else contents.replica_scalars
        assert from_plain(scalars[step][f"{layer}.w"]) == {"step": float(step)}
        digests = contents.digests_of(place)
        for state, (offset, itemsize) in place.states.items():
            found = copy.bytes_at(offset, (place.stop - place.start) * itemsize)
            assert found.tobytes() == truth(state, layer, step, place.start, place.stop).tobytes(), (place, step, state)
            if digests is not None and place.step is None:
                assert digests[state] == checksum(found)
        for state in states_of(layer, step):
            for run in runs(contents, step, state, layer, place.start, place.stop):
                assert run.offset is not None
                found = copy.bytes_at(run.offset, 4 * (run.stop - run.start))
                if state != PARAM or run.start >= place.start:
                    assert found.tobytes() == truth(state, layer, step, run.start, run.stop).tobytes()


ACTS = ("step", "step", "step without digests", "save", "saved", "view", "view, one step back")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(ACTS), max_size=9), st.integers(0, 1 << 30), st.booleans())
def test_whatever_is_said_to_be_complete_is_complete_after_every_store(acts: list[str], seed: int, still: bool) -> None:
    checked = Checked()
    with recorded(seed, checked) as both:
        try:
            segment = both.open()
            use_segment(segment)
            worker = Worker(segment, random.Random(seed), still)
            both.catch_up()
            checked.complete = -1
            for act in acts:
                worker.act(act)
                both.catch_up()
                checked.complete = worker.step
        finally:
            use_segment(None)
        assert both.cuts > 20


@settings(max_examples=4, deadline=None)
@given(st.lists(st.sampled_from(ACTS), min_size=2, max_size=7), st.integers(0, 1 << 30))
def test_no_bit_of_the_header_that_flips_makes_it_say_what_is_not_so(acts: list[str], seed: int) -> None:
    checked, told_less = Checked(), 0
    fd = create()
    mapped = MappedSegment(os.dup(fd))
    segment = OwnSegment(fd)
    use_segment(segment)
    try:
        worker = Worker(segment, random.Random(seed))
        for act in acts:
            worker.act(act)
        whole = Contents.read(mapped)
        assert whole is not None
        page = segment.header._page
        for place, bit in random.Random(seed).sample([*itertools.product(range(HEADER_BYTES), range(8))], 300):
            page[place] ^= 1 << bit
            checked(mapped)
            contents = Contents.read(mapped, loop=False)
            told_less += contents is None or len(contents.complete) < len(whole.complete)
            page[place] ^= 1 << bit
    finally:
        use_segment(None)
        mapped.close()
        os.close(fd)
    assert told_less

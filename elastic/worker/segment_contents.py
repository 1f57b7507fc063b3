"""Keeps this worker's segment truthful: says where its shards, its replicas of others', and the previous copies of both lie, and of which
step they are complete.

A mark is taken away before memory is written to, and set after it is complete, so that whoever reads the segment of a killed worker finds
only complete copies. Without a segment nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from elastic.engine.model import LayeredModel
from elastic.engine.reduction import Parts
from elastic.engine.salvage import Salvage
from elastic.engine.shard import Scalars, Shard, Updater
from elastic.engine.zero import ShardedOptimizer
from elastic.layout.transfer import PARAM, Role
from elastic.memory.digest import digest
from elastic.memory.raw import checksum
from elastic.memory.segment import NONE, SLOTS, OwnSegment
from elastic.memory.tensors import address
from elastic.plan.workload import Workload
from elastic.recovery import offers
from elastic.recovery.inventory import FinishedGrains, Inventory
from elastic.recovery.offers import ByCopy, Directory, Place, SumsPlace
from elastic.snapshot.held_copies import Held, StoredCopy, dtypes
from elastic.worker.plain_state import to_plain

_SETTLED_STEPS = 8
"""After so many steps of a view its memory is freed that was kept or prepared for later use: members often change again before that."""

CopyRun = tuple[Role, int, int, Mapping[str, torch.Tensor], int | None]
"""A copy: its role, layer, first element, memory by state, and the step of one that does not change."""


Digests = Mapping[tuple[int, int], Mapping[str, str]]
"""Digests of copies by layer and first element, for each state."""


class SegmentContents:
    """The contents of a worker's segment over all its views; `begin` is called in each view before its first step."""

    def __init__(self, worker: int, segment: OwnSegment | None, model: LayeredModel, optimizer: ShardedOptimizer) -> None:
        self._worker, self._segment, self._model, self._optimizer = worker, segment, model, optimizer
        self._number = 0
        self._own_places: tuple[Any, ...] = ()
        self._replica_places: tuple[Any, ...] = ()
        self._described: list[CopyRun] = []  # of the directory in force: this memory must not be used again before the next one is
        self._owned: Sequence[Shard] = ()
        self._kept: Sequence[Shard] = ()
        self._gathered: list[CopyRun] = []
        self._previous: Sequence[Held] = ()
        self._previous_replicas: Sequence[Held] = ()
        self._retained: Sequence[Held] = ()
        self._prepared: list[CopyRun] = []
        self._live_step = self._previous_step = self._replica_step = self._previous_replica_step = NONE
        self._scalars: dict[int, Scalars] = {}
        self._replica_scalars: dict[int, Scalars] = {}
        self._digests: dict[int, ByCopy] = {}
        self._buffers: dict[int, np.ndarray] = {}
        self._known_buffers: dict[int, tuple[int, str]] = {}
        self._loops = self._sums = 0
        self._grains = self._per_grain = 1
        self._steps = 0  # of the view

    @property
    def bytes(self) -> int:
        """The segment's memory in use, and what is kept for later use."""
        return 0 if self._segment is None else self._segment.used + self._segment.pooled + self._segment.prepared

    def begin(self, step: int, retained: Sequence[StoredCopy], digests: Digests, workload: Workload) -> None:
        """Describes the state with which a view begins: it is complete at `step`, has these digests, and no previous copies yet.

        `retained` are copies of that step which the worker held in the view before, and keeps until `retain_nothing`.
        """
        if self._segment is None:
            return
        self._steps, self._segment.keeps = 0, True
        self._owned = list(self._optimizer.owned.shards.values())
        self._kept = list(self._optimizer.kept.shards.values())
        gathered = [*(((layer, 0), flat) for layer, flat in self._model.flats.items()), *self._model.tied.items()]
        self._gathered = [("gathered", layer, start, {PARAM: memory}, None) for (layer, start), memory in gathered]
        self._previous, self._previous_replicas, self._prepared = (), (), []
        self._grains, self._per_grain = workload.grains, workload.micro_batches // workload.grains
        self._retained = [copy for copy in retained if isinstance(copy, Held)]
        self._live_step = self._replica_step = step
        self._previous_step = self._previous_replica_step = NONE
        self._scalars, self._replica_scalars = {step: plain(self._optimizer.owned)}, {step: plain(self._optimizer.kept)}
        self._digests = {step: by_copy(digests)}
        for copy in self._retained:
            for name, values in copy.scalars.items():
                self._scalars[step].setdefault(name, to_plain(dict(values)))
        self._describe()

    def starts_with(self, held: Sequence[Held] | None) -> None:
        """Does nothing: shards on the CPU lie in the segment themselves."""

    def retain_nothing(self) -> None:
        """Notes that the copies of the view before are about to be dropped."""
        if self._retained:
            self._retained = ()
            self._describe()

    def prepared(self, step: int, owned: Sequence[Shard], kept: Sequence[Shard], scalars: Scalars) -> None:
        """Notes copies of `step` that are complete, and with which the next view begins if it is committed; none of them changes before.

        If the hosts that they came from are lost once it is committed, they may be the only ones.
        """
        if self._segment is None:
            return
        places: list[tuple[Role, Shard]] = [*(("live", shard) for shard in owned), *(("replica", shard) for shard in kept)]
        self._prepared = [(role, shard.layer, shard.interval.start, shard.memory, step) for role, shard in places]
        known = self._scalars.setdefault(step, {})
        for name, values in scalars.items():
            known.setdefault(name, values)
        self._describe()

    def _own_runs(self) -> list[CopyRun]:
        live: list[CopyRun] = [("live", shard.layer, shard.interval.start, shard.memory, None) for shard in self._owned]
        return live + [("previous", held.layer, held.start, held.memory, None) for held in self._previous]

    def _replica_runs(self) -> list[CopyRun]:
        now: list[CopyRun] = [("replica", shard.layer, shard.interval.start, shard.memory, None) for shard in self._kept]
        return now + [("previous replica", held.layer, held.start, held.memory, None) for held in self._previous_replicas]

    def _describe(self) -> None:
        """Writes a directory, with the marks of what is complete; it comes into force as a whole."""
        assert self._segment is not None  # checked by every caller
        own, replicas = self._own_runs(), self._replica_runs()
        self._own_places, self._replica_places = addresses(own), addresses(replicas)
        retained: list[CopyRun] = [(held.role, held.layer, held.start, held.memory, held.step) for held in self._retained]
        runs = own + replicas + self._gathered + retained + self._prepared
        self._number += 1
        slot = self._number % SLOTS
        steps = {self._live_step, self._previous_step, *(step for *_, step in self._prepared if step is not None)} - {NONE}
        replica_steps = {self._replica_step, self._previous_replica_step} - {NONE}
        directory = Directory(
            worker=self._worker,
            number=self._number,
            places=tuple(place for run in runs if (place := self._place(*run)) is not None),
            states=self._states(runs),
            scalars={step: self._scalars[step] for step in steps},
            replica_scalars={step: self._replica_scalars[step] for step in replica_steps},
            digests={step: self._digests[step] for step in steps | replica_steps if step in self._digests},
        )
        header = self._segment.header
        header.empty_slot(offers.DIRECTORY, slot)  # the marks below are of this slot
        header.set_mark(offers.live_mark(slot), self._live_step)
        header.set_mark(offers.previous_mark(slot), self._previous_step)
        header.set_mark(offers.replica_mark(slot), self._replica_step)
        header.set_mark(offers.previous_replica_mark(slot), self._previous_replica_step)
        self._segment.write_record(offers.DIRECTORY, slot, self._number, directory.to_json())
        header.empty_slot(offers.DIRECTORY, 1 - slot)  # if the new one should be damaged, the old one must not count again
        self._described = runs

    def _states(self, runs: Sequence[CopyRun]) -> dict[str, str]:
        full = [
            Held(layer=layer, start=0, stop=0, step=0, role=role, memory=memory, scalars={})
            for role, layer, _, memory, _ in runs
            if role != "gathered"
        ]
        return dtypes(full, self._model.state_dtypes())

    def _place(self, role: Role, layer: int, start: int, memory: Mapping[str, torch.Tensor], step: int | None) -> Place | None:
        """Returns the place of a copy; None if a part of it lies outside the segment."""
        assert self._segment is not None  # checked by every caller
        states: dict[str, tuple[int, int]] = {}
        for state, tensor in memory.items():
            offset = self._segment.offset_of(address(tensor))
            if offset is None:
                return None
            states[state] = offset, tensor.element_size()
        stop = start + next(tensor.numel() for tensor in memory.values())
        return Place(role=role, layer=layer, start=start, stop=stop, states=states, step=step)

    def _set(self, mark: Callable[[int], int], step: int) -> None:
        assert self._segment is not None  # checked by every caller
        self._segment.header.set_mark(mark(self._number % SLOTS), step)

    def overwrites_previous(self) -> None:
        """Notes that the previous copies are about to be written to."""
        if self._segment is not None:
            self._previous_step = NONE
            self._set(offers.previous_mark, NONE)

    def has_previous(self, step: int, held: Sequence[Held]) -> None:
        """Notes that the previous copies are complete, as of `step`."""
        if self._segment is None:
            return
        self._previous, self._previous_step = held, step
        if addresses(self._own_runs()) == self._own_places:
            self._set(offers.previous_mark, step)
        else:
            self._describe()

    def updates(self) -> None:
        """Notes that the owned shards are about to be updated."""
        if self._segment is not None:
            self._live_step = NONE
            self._set(offers.live_mark, NONE)

    def updated(self, step: int) -> None:
        """Notes that the owned shards are complete, as of `step`."""
        if self._segment is None:
            return
        self._scalars = {known: values for known, values in self._scalars.items() if known == self._previous_step}
        self._scalars[step] = plain(self._optimizer.owned)
        self._live_step = step
        self._settle_memory()
        if addresses(self._own_runs()) != self._own_places:  # the optimizer has made new state
            self._describe()
            return
        self._write(offers.SCALARS, step, self._scalars[step])
        self._set(offers.live_mark, step)

    def _settle_memory(self) -> None:
        """Counts a step of this view. After some of them, memory that was kept for the next change of members is freed."""
        self._steps += 1
        if self._segment is not None and self._steps == _SETTLED_STEPS:
            self._segment.trim()

    def overwrites_previous_replicas(self) -> None:
        """Notes that the previous copies of replicas are about to be written to."""
        if self._segment is not None:
            self._previous_replica_step = NONE
            self._set(offers.previous_replica_mark, NONE)

    def has_previous_replicas(self, step: int, held: Sequence[Held]) -> None:
        """Notes that the previous copies of replicas are complete, as of `step`."""
        if self._segment is None:
            return
        self._previous_replicas, self._previous_replica_step = held, step
        if addresses(self._replica_runs()) == self._replica_places:
            self._set(offers.previous_replica_mark, step)
        else:
            self._describe()

    def replays(self) -> None:
        """Notes that the replicas are about to be updated, or that one of them is damaged."""
        if self._segment is not None:
            self._replica_step = NONE
            self._set(offers.replica_mark, NONE)

    def replayed(self, step: int) -> None:
        """Notes that the replicas are complete, as of `step`."""
        if self._segment is None:
            return
        scalars = {known: values for known, values in self._replica_scalars.items() if known == self._previous_replica_step}
        self._replica_scalars = {**scalars, step: plain(self._optimizer.kept)}
        self._replica_step = step
        if addresses(self._replica_runs()) != self._replica_places:  # the optimizer has made new state
            self._describe()
            return
        self._write(offers.REPLICA_SCALARS, step, self._replica_scalars[step])
        self._set(offers.replica_mark, step)

    def digested(self, step: int, digests: Digests) -> None:
        """Notes digests of owned shards as of `step`, or of replicas."""
        if self._segment is not None and digests:
            needed = {step, self._previous_step, self._replica_step, self._previous_replica_step}
            self._digests = {known: values for known, values in self._digests.items() if known in needed}
            self._digests[step] = {**self._digests.get(step, {}), **by_copy(digests)}
            self._write(offers.DIGESTS, step, self._digests[step])

    def has_buffers(self, step: int, packed: np.ndarray) -> None:
        """Stores the packed buffers that training changes, as of `step`; called before the shards are complete as of that step."""
        if self._segment is None:
            return
        slot, known = offers.slot_of(step), (step, digest(packed))
        if self._known_buffers.get(slot) == known:  # the step was taken again, or ended the view before
            return
        self._known_buffers[slot] = known
        self._segment.header.empty_slot(offers.BUFFERS, slot)
        memory = self._buffers.get(slot)
        if memory is None or memory.size != packed.size:
            memory = self._buffers[slot] = self._segment.allocate(packed.size)
        memory[:] = packed
        offset = self._segment.offset_of(memory.ctypes.data)
        place = {"offset": offset, "size": packed.size, "digest": known[1], "checksum": checksum(memory)}
        self._segment.write_record(offers.BUFFERS, slot, offers.number_of(step), place)

    def sums(self, salvage: Salvage | None) -> None:
        """Says where the gradient sums of the step under way lie, as far as they are in the segment; None: they are about to be dropped."""
        if self._segment is None or (salvage is None and not self._sums):
            return
        place = None if salvage is None or salvage.records else self._sums_place(salvage)
        if place is None:
            for slot in range(SLOTS) if self._sums else ():
                self._segment.header.empty_slot(offers.SUMS, slot)
            self._sums = 0
            return
        self._sums += 1
        self._segment.write_record(offers.SUMS, self._sums % SLOTS, self._sums, place.to_json())

    def _sums_place(self, salvage: Salvage) -> SumsPlace | None:
        nodes: dict[int, list[Any]] = {}
        summed: set[int] = set()
        grains = set(salvage.grains)
        for number, found in salvage.sums.items():
            covered: set[int] = set()
            nodes[number] = []
            for node, parts in found.items():
                if (offsets := self._offsets(parts)) is not None:
                    nodes[number].append([node.level, node.index, offsets])
                    covered.update(node.grains(self._grains))
            grains &= covered
            summed |= covered
        if not grains:
            return None
        finished = FinishedGrains(step=salvage.step, layers=salvage.layers, grains=tuple(sorted(grains)), summed=tuple(sorted(summed)))
        leaves = [leaf.to_json() for leaf in salvage.leaves if leaf.micro_batch // self._per_grain in grains]
        return SumsPlace(finished=finished, nodes=nodes, leaves=leaves)

    def _offsets(self, parts: Parts) -> list[int | None] | None:
        """Returns where the parts that are present lie in the segment; None if one of them lies elsewhere."""
        assert self._segment is not None  # checked by every caller
        found: list[int | None] = []
        block = range(0)
        shift = 0
        for part in parts:
            where = None if part is None else address(part)
            if where is not None and where not in block:  # the parts of a sum usually lie in one block
                block, shift = self._segment.block_at(where)
                if where not in block:
                    return None
            found.append(None if where is None else where + shift)
        return found

    def loop(self, inventory: Callable[[], Inventory]) -> None:
        """Stores an inventory without copies, for new workers that take over if all die."""
        if self._segment is not None:
            self._loops += 1
            self._segment.write_record(offers.LOOP, self._loops % SLOTS, self._loops, inventory().to_json())

    def _write(self, record: int, step: int, values: Mapping[str, Any]) -> None:
        assert self._segment is not None  # checked by every caller
        self._segment.write_record(record, offers.slot_of(step), offers.number_of(step), {"directory": self._number, "values": values})


def plain(updater: Updater) -> Scalars:
    """Returns the scalars of all shards as they are now, as JSON values."""
    known: dict[int, Any] = {}  # most parameters have the same values, the number of steps, in one dict
    found: Scalars = {}
    for shard in updater.shards.values():
        for name, values in updater.scalars(shard).items():
            if id(values) not in known:
                known[id(values)] = to_plain(dict(values))
            found[name] = known[id(values)]
    return found


def by_copy(digests: Digests) -> ByCopy:
    return {f"{layer}:{start}": dict(states) for (layer, start), states in digests.items()}


def addresses(runs: Sequence[CopyRun]) -> tuple[Any, ...]:
    return tuple(
        (role, layer, start, step, *((state, address(each)) for state, each in memory.items())) for role, layer, start, memory, step in runs
    )

"""One worker's part in a migration: new memory for its place in the proposed view, filled from its own copies and from transfers.

The copies that it holds are not written to: if the attempt fails, they are intact for the next one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import MessageKind, Tag
from elastic.engine.model import LayeredModel
from elastic.engine.shard import Scalars, Shard
from elastic.engine.tensor_links import tensor_links
from elastic.engine.view_state import ViewState
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import GateRefused
from elastic.layout.layout import Interval
from elastic.layout.regions import PARAM, SAME
from elastic.layout.runs import shared
from elastic.layout.transfer import Role, Transfer
from elastic.memory import device, raw
from elastic.memory.digest import digest
from elastic.memory.segment import MappedSegment
from elastic.memory.tensors import Landing, empty, lasting, zeros
from elastic.recovery import offers
from elastic.recovery.gate import check_received
from elastic.recovery.offers import Contents
from elastic.recovery.proposal import Proposal
from elastic.snapshot.held_copies import StoredCopy, UnreplayedCopy, runs
from elastic.snapshot.rest_digests import intact
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Memory to be filled with the run of a state that starts at `start`."""

    state: str
    layer: int
    start: int
    memory: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.memory.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The result of a migration here: the monotonic times at which links stood, all state had arrived, and was checked.

    `received_bytes` came over links, `copied_bytes` were copied from segments of this host.
    """

    installed: float
    moved: float
    checked: float
    received_bytes: int
    copied_bytes: int


class Migration:
    """Allocates the memory when constructed; `run` fills it.

    A copy that already has the needed form is taken over without copying: nothing writes to it before the first step of the new view is
    applied, and then the new view's previous copies and replicas have that state.
    """

    def __init__(
        self,
        worker: int,
        proposal: Proposal,
        held: Sequence[StoredCopy],
        scalars: Scalars,
        model: LayeredModel,
        optimizer: ShardedOptimizer,
        network: Endpoint,
        segments: Mapping[int, MappedSegment],
    ) -> None:
        self._segments = segments
        self._copied_bytes = 0
        self._worker, self._proposal, self._model, self._network = worker, proposal, model, network
        self._links = tensor_links(network)
        self._before = network.stats.transferred  # read now, since transfers arrive as soon as links stand
        layout = proposal.view.layout
        self._held = [copy for copy in held if copy.step == proposal.resume]
        if changed := next((copy for copy in self._held if copy.role == "kept" and not intact(copy)), None):
            run = f"{model.spec.layers[changed.layer].title}, run [{changed.start}, {changed.stop})"
            raise GateRefused(f"the copy of {run} that worker {worker} kept of step {changed.step} has changed since", check="contents")
        self._taken_over: set[int] = set()  # storages
        self._filled: set[int] = set()  # addresses of memory that was taken over
        vectors = self._vectors(layout.layers_of(worker))
        model.hold(layout.layers_of(worker), keep=False, reuse=vectors)
        copied = set(proposal.copied)
        sent = [(i, move) for i, move in enumerate(proposal.transfers) if i not in copied]
        self._outgoing = [(i, move) for i, move in sent if move.source == worker]
        self._incoming = [(i, move) for i, move in sent if move.destination == worker]
        self._copies = [move for i, move in enumerate(proposal.transfers) if i in copied and move.destination == worker]
        self._relayed = dict(proposal.relayed)
        needed = {move.source for move in self._copies} | {self._relayed[i] for i, _ in self._outgoing if i in self._relayed}
        if proposal.buffers is not None and worker in proposal.buffers.copied:
            needed.add(proposal.buffers.source)
        self._contents = {source: Contents.read(segment, loop=False) for source, segment in segments.items() if source in needed}
        owned, kept = [], []
        for layer in layout.layers:
            for interval in layer.intervals:
                if worker not in (interval.owner, *interval.replicas):
                    continue
                mine = interval.owner == worker
                run = model.run(layer.layer, interval.start, interval.stop) if mine else None
                (owned if mine else kept).append(self._shard(layer.layer, interval, run, scalars, optimizer))
        self.state = ViewState(step=proposal.resume, owned=owned, kept=kept)

    def _vectors(self, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Returns the flat vectors of layers whose parameters are held completely."""
        found = {}
        for copy in self._held:
            if (
                copy.role == "gathered"
                and copy.layer in layers
                and (copy.start, copy.stop) == (0, self._model.spec.layers[copy.layer].size)
            ):
                found[copy.layer] = copy.memory[PARAM]
                self._take_over(copy)
        return found

    @property
    def retained(self) -> list[StoredCopy]:
        """The copies of the resumed step that do not change when the new view takes its steps."""
        return [
            copy
            for copy in self._held
            if isinstance(copy, UnreplayedCopy) or not any(_storage(memory) in self._taken_over for memory in copy.memory.values())
        ]

    def _take_over(self, copy: StoredCopy) -> None:
        self._taken_over.update(_storage(memory) for memory in copy.memory.values())
        self._filled.update(memory.data_ptr() for memory in copy.memory.values())

    def _shard(self, layer: int, interval: Interval, run: torch.Tensor | None, scalars: Scalars, optimizer: ShardedOptimizer) -> Shard:
        """Returns the shard of an interval; `run` is its parameters' memory if it is owned here."""
        if self._proposal.resume < 0:  # an optimizer's initial state is equal on every worker, and is not sent
            return optimizer.initial(layer, interval, self._zeros(PARAM, layer, interval.elements) if run is None else run)
        memory = self._held_shard(layer, interval, "replica" if run is None else "live")
        if memory is None:
            states = self._states(layer) if run is None else self._states(layer) - {PARAM}
            memory = {state: self._zeros(state, layer, interval.elements) for state in sorted(states)}
        shard = Shard(layer=layer, interval=interval, memory=memory if run is None else {**memory, PARAM: run})
        shard.scalars = {p.name: scalars[p.name] for p, _, _ in shard.parameters(self._model.spec) if p.name in scalars}
        return shard

    def _held_shard(self, layer: int, interval: Interval, role: Role) -> dict[str, torch.Tensor] | None:
        """Returns the memory of an interval that this worker holds in the same role, by state; without parameters if it is owned."""
        for copy in self._held:
            fits = (copy.layer, copy.start, copy.stop) == (layer, interval.start, interval.stop)
            if fits and copy.role in (role, f"previous {role}") and copy.memory.keys() == self._states(layer):
                self._take_over(copy)
                return {state: memory for state, memory in copy.memory.items() if role == "replica" or state != PARAM}
        return None

    def _states(self, layer: int) -> set[str]:
        """Returns the states that a shard of a layer has at the resumed step."""
        return {state for state in [PARAM, *self._proposal.states] if self._model.spec.has(layer, state)}

    def _zeros(self, state: str, layer: int, elements: int) -> torch.Tensor:
        return lasting(elements, self._dtype(state, layer))

    def _dtype(self, state: str, layer: int) -> torch.dtype:
        return self._model.dtype(layer, state, self._proposal.states.get(state, SAME))

    @property
    def peers(self) -> set[int]:
        """The workers that this one sends state to or receives it from."""
        return {move.destination for _, move in self._outgoing} | {move.source for _, move in self._incoming} | self._buffer_peers

    @property
    def _buffer_peers(self) -> set[int]:
        buffers = self._proposal.buffers
        if buffers is None:
            return set()
        return (
            set(buffers.receivers) if buffers.sender == self._worker else {buffers.sender} if self._worker in buffers.receivers else set()
        )

    def run(self) -> Moved:
        """Sends transfers, receives and verifies others, and fills all memory. Links must stand.

        Raises:
            GateRefused: if something is missing or differs from the sender's copy.
        """
        installed = time.monotonic()
        sinks = {move: self._links.sink(empty(move.elements, self._dtype(move.state, move.layer))) for _, move in self._incoming}
        for index, move in self._incoming:
            sinks[move].post(move.source, self._tag(index))
        sent = [self._send(index, move) for index, move in self._outgoing]
        self._links.push()
        announced, received = {}, {}
        for index, move in self._incoming:
            received[move] = sinks[move].take()
            said = self._network.receive(move.source, self._tag(index, MessageKind.TRANSFER_DIGEST))
            announced[move] = said.tobytes().decode("ascii", "replace")
        self._move_buffers()
        targets = self._targets()
        filled = {id(target): self._copy_from_segments(target) for target in targets}
        moved = time.monotonic()
        check_received([move for _, move in self._incoming], {move: digest(memory) for move, memory in received.items()}, announced)
        for target in targets:
            self._fill(target, received, filled[id(target)])
        for shard in (*self.state.owned, *self.state.kept) if self._proposal.resume < 0 else ():
            shard.raise_masters()
        self._links.flush()  # `sent` must live until then
        del sent
        bytes_received = self._network.stats.transferred - self._before
        return Moved(
            installed=installed, moved=moved, checked=time.monotonic(), received_bytes=bytes_received, copied_bytes=self._copied_bytes
        )

    def _copy_from_segments(self, target: Destination) -> list[tuple[int, int]]:
        """Copies what other workers' segments have of a target, as the proposal says; returns the runs that are filled."""
        filled: list[tuple[int, int]] = []
        for move in self._copies:
            both = shared((move.start, move.stop), (target.start, target.stop))
            if (move.state, move.layer) != (target.state, target.layer) or not both:
                continue
            filled += self._copy_from(move.source, target, both)
        return filled

    def _copy_from(self, source: int, target: Destination, run: tuple[int, int]) -> list[tuple[int, int]]:
        """Copies what the segment of `source` has of a run of the target; returns the runs that are filled."""
        contents, filled = self._contents.get(source), []
        for found in () if contents is None else offers.runs(contents, self._proposal.resume, target.state, target.layer, *run):
            into = Landing(target.memory[found.start - target.start : found.stop - target.start])
            if found.offset is None:  # the optimizer has not made this state yet: it counts as zeros
                into.bytes[:] = 0
            else:
                into.bytes[:] = self._segments[source].bytes_at(found.offset, into.size)
            into.take()
            self._copied_bytes += into.size
            filled.append((found.start, found.stop))
        return filled

    def _move_buffers(self) -> None:
        """Sends or receives the buffers that training changes, as of the resumed step; they are stored, but not installed yet."""
        buffers, running, step = self._proposal.buffers, self._model.running, self._proposal.resume
        if buffers is None:
            return
        if self._worker in buffers.copied:
            contents = self._contents.get(buffers.source)
            place = None if contents is None else contents.buffers.get(step)
            if place is None:
                why = f"the buffers of step {step} are not in the segment of worker {buffers.source}, which has died"
                raise GateRefused(why, check="coverage")
            self._unpack_buffers(self._segments[buffers.source].bytes_at(place.offset, place.size))
        if not self._buffer_peers:
            return
        tag = Tag(MessageKind.BUFFERS, step + 1)
        if buffers.sender == self._worker:
            for worker in buffers.receivers:
                self._network.send(worker, tag, running.packed(step))
            return
        memory = raw.empty(running.bytes)
        self._network.post(buffers.sender, tag, memory)
        self._network.receive(buffers.sender, tag)
        self._unpack_buffers(memory)

    def _unpack_buffers(self, memory: np.ndarray) -> None:
        buffers = self._proposal.buffers
        if buffers is None or digest(memory) != buffers.digest:
            source = None if buffers is None else buffers.source
            raise GateRefused(f"the buffers that worker {self._worker} received differ from worker {source}'s", check="contents")
        self._model.running.unpack(self._proposal.resume, memory)

    def _tag(self, index: int, kind: MessageKind = MessageKind.TRANSFER) -> Tag:
        return Tag(kind, self._proposal.resume + 1, index)

    def _send(self, index: int, move: Transfer) -> torch.Tensor:
        """Begins to send a transfer. The returned memory must not change until the network is flushed."""
        dtype = self._dtype(move.state, move.layer)
        if index in self._relayed:
            memory = empty(move.elements, dtype)
            target = Destination(state=move.state, layer=move.layer, start=move.start, memory=memory)
            filled = self._copy_from(self._relayed[index], target, (move.start, move.stop))
            if sum(stop - start for start, stop in filled) != move.elements:
                raise GateRefused(
                    f"worker {self._worker} must send {move} of worker {self._relayed[index]}, which has died", check="coverage"
                )
            return self._sent(index, move, memory)
        found = runs(self._held, self._proposal.resume, move.state, move.layer, move.start, move.stop)
        if sum(stop - start for start, stop, _ in found) != move.elements:
            raise GateRefused(
                f"worker {self._worker} must send {move}, but does not hold it at step {self._proposal.resume}", check="coverage"
            )
        parts = [zeros(stop - start, dtype) if memory is None else device.placed(memory) for start, stop, memory in found]
        return self._sent(index, move, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _sent(self, index: int, move: Transfer, memory: torch.Tensor) -> torch.Tensor:
        self._links.send(move.destination, self._tag(index), memory)
        self._network.send(move.destination, self._tag(index, MessageKind.TRANSFER_DIGEST), digest(memory).encode())
        return memory

    def _targets(self) -> list[Destination]:
        model = self._model
        flats = [Destination(state=PARAM, layer=layer, start=0, memory=flat) for layer, flat in model.flats.items()]
        tied = [Destination(state=PARAM, layer=home, start=start, memory=memory) for (home, start), memory in model.tied.items()]
        shards = [
            Destination(state=state, layer=shard.layer, start=shard.interval.start, memory=memory)
            for shard, own in [*((s, True) for s in self.state.owned), *((s, False) for s in self.state.kept)]
            for state, memory in shard.memory.items()
            if state in (PARAM, *self._proposal.states) and not (own and state == PARAM)  # it lies in its layer's flat vector
        ]
        return [target for target in [*flats, *tied, *shards] if target.memory.data_ptr() not in self._filled]

    def _fill(self, target: Destination, received: Mapping[Transfer, torch.Tensor], filled: Sequence[tuple[int, int]]) -> None:
        """Fills a target with what is held and what was received; the runs `filled` are in place already."""
        found = runs(self._held, self._proposal.resume, target.state, target.layer, target.start, target.stop)
        found += [(start, stop, None) for start, stop in filled]
        for move, memory in received.items():
            both = shared((move.start, move.stop), (target.start, target.stop))
            if (move.state, move.layer) == (target.state, target.layer) and both:
                start, stop = both
                found.append((start, stop, memory[start - move.start : stop - move.start]))
        done = target.start
        for start, stop, memory in sorted(found, key=lambda run: run[:2]):
            if start > done:
                break
            if memory is not None:
                target.memory[start - target.start : stop - target.start] = memory
            done = max(done, stop)
        if done < target.stop:
            run = f"{target.state} of {self._model.spec.layers[target.layer].title}, run [{done}, {target.stop})"
            raise GateRefused(f"worker {self._worker} has not received {run}", check="coverage")


def _storage(memory: torch.Tensor) -> int:
    return memory.untyped_storage().data_ptr()


def links(worker: int, before: frozenset[int], after: frozenset[int], view: View) -> dict[str, int]:
    """Returns how many links were kept, dropped and made; only the lower-numbered of two members counts the link between them."""
    counted = {peer for peer in before | after if peer not in view.workers or peer > worker}
    return {name: len(found & counted) for name, found in (("kept", before & after), ("dropped", before - after), ("made", after - before))}

"""One worker's engine in one view: everything that depends on the members, built anew for each view."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.rate_meter import LinkRates
from elastic.comm.rounds import Payload, Rounds
from elastic.engine.data import Batch
from elastic.engine.decision import Apply, Wishes, added, decide, rows
from elastic.engine.digests import digest
from elastic.engine.exact import terms
from elastic.engine.executor import Executor
from elastic.engine.model import LayeredModel
from elastic.engine.norms import square_sums
from elastic.engine.pipe import EVALUATION
from elastic.engine.reducer import OwnedGradient
from elastic.engine.salvage import Resumption, Salvage
from elastic.engine.shard import Scalars, Shard
from elastic.engine.shared import SharedMemory
from elastic.engine.statistics import Arrays
from elastic.engine.tensor_links import tensor_links
from elastic.engine.view_state import Training, ViewState
from elastic.engine.whole_tensors import whole
from elastic.engine.zero import ShardedOptimizer, scaling
from elastic.errors import NonFinite
from elastic.layout.transfer import PARAM
from elastic.memory.segment import MappedSegment
from elastic.memory.tensors import bytes_of, contiguous
from elastic.recovery.inventory import Inventory
from elastic.recovery.salvage import Routes
from elastic.snapshot.comparison import unlike
from elastic.snapshot.held_copies import Held, StoredCopy, held
from elastic.snapshot.host_copies import HostCopies
from elastic.snapshot.previous import PreviousCopies
from elastic.snapshot.replication import Replicator
from elastic.snapshot.rest_digests import Rest, compared, period
from elastic.view import View
from elastic.worker.comparing import Comparing
from elastic.worker.device_contents import DeviceContents
from elastic.worker.segment_contents import SegmentContents


class Engine:
    """Takes steps with the other members of a view. The protocol of a step:

    forward/backward -> reduce-scatter -> READY round -> APPLY -> all-gather -> the step is yielded; replicate (overlaps the next step)
    """

    def __init__(
        self,
        worker: int,
        model: LayeredModel,
        view: View,
        network: Endpoint,
        optimizer: ShardedOptimizer,
        training: Training,
        state: ViewState,
        contents: SegmentContents,
        segments: Mapping[int, MappedSegment],
        routes: Routes = (),
    ) -> None:
        """`segments` are those of the other workers of this host; `routes` are those of the first step, if they are not the plan's."""
        self._shared = shared = SharedMemory(worker, view, segments)
        first = replace(view, plan=replace(view.plan, routes=routes)) if routes else view
        self._rerouted = state.step + 1 if routes else None
        self.view, self.worker, self.step = view, worker, state.step
        self._model, self._optimizer, self._network = model, optimizer, network
        self._links = tensor_links(network)
        self._clip_norms, self._enter, self._skips = training.clip_norms, training.enter, training.skips
        self._scale = training.numerics.scale
        optimizer.owned.bind(state.owned)
        self.executor = Executor(worker, model, first, self._links, training.numerics, training.loss, training.enter, shared)
        self.reducer, self._gatherer = self.executor.reducer, self.executor.gatherer
        self.rest = Rest(
            period(view),
            lambda step: step == state.step or compared(step),  # all may go back to what a view begins with
            owned_always=not view.fleet.replicas,
            still=model.spec.frozen,
        )
        self.comparing = Comparing(worker, view, self.rest, state.step)
        self._replicas_at = state.step  # the step that all replicas in this view have
        self._gatherer.arrived = self._gathered
        self.replicator = Replicator(worker, model.spec, self._links, optimizer, state.kept, state.step, self.rest, contents)
        self._contents = contents
        self.executor.noted = contents.sums
        on_device = isinstance(contents, DeviceContents)
        self.previous_copies = HostCopies(optimizer, contents) if on_device else PreviousCopies(optimizer, contents)
        self._rounds = Rounds(network, worker, view.workers, view.coordinator)
        self.kept = model.running.kept = None
        self._owned: list[OwnedGradient] = []
        self._told_running: Arrays = {}
        self.told: dict[int, Any] = {}
        self._rounds_between = 0
        star = set(view.workers) if worker == view.coordinator else {view.coordinator}
        self.peers = (self.executor.peers | self.replicator.peers | star) - {worker}

    def begin(self, retained: Sequence[StoredCopy] = (), before: Engine | None = None) -> None:
        """Notes that this engine's view is committed: from now on this worker's segment has its state, and the `retained` copies.

        The engine of the view before lets go of its memory, which can then be used again at once.
        """
        known = None if before is None else before.rest
        self._note_owned(known)
        self.replicator.note(known)
        if self.step in (running := self._model.running).steps:
            self._contents.has_buffers(self.step, running.packed(self.step))
        self._contents.starts_with(self.previous_copies.first(self.step))
        digests = {**self.rest.checksums_of("live", self.step), **self.rest.checksums_of("replica", self.step)}
        self._contents.begin(self.step, retained, digests, self.view.workload)
        if before is not None:
            before._release()

    def prepared(self, state: ViewState, scalars: Scalars) -> None:
        """Notes that the state of this view is complete, before the view is committed: from now on the segment has it too."""
        self._contents.starts_with(self.previous_copies.first(state.step))
        self._contents.prepared(state.step, state.owned, state.kept, scalars)

    def note_loop(self, inventory: Callable[[], Inventory]) -> None:
        """Stores how far the loop is, and its settings: an inventory without copies."""
        self._contents.loop(inventory)

    def retain_nothing(self) -> None:
        """Notes that the retained copies are about to be dropped."""
        self._contents.retain_nothing()

    @torch.inference_mode(False)
    def compute(self, step: int, batch: Batch, wishes: Callable[[], Wishes]) -> Apply:
        """Computes the step's gradients and takes part in its READY round; parameters stay those of the previous step.

        `wishes` is called when this worker is ready, so that a request to stop or to pause takes effect in the step that it arrives in.
        """
        if self._rerouted is not None and step != self._rerouted:
            self.executor.follow(self.view)
            self.reducer, self._rerouted = self.executor.reducer, None
        answer = self._attempt(step, batch, wishes)
        if answer.unlike:  # equal on all members, as is `again`
            raise self.comparing.resolve(self.step, self._replicas_at, self.gather)
        if answer.refusal is not None or answer.skipped is not None:  # also equal on all: is it the training, or a bit that flipped?
            self._compare(self.step)
        if answer.again:
            self.abandon()
            self.executor.generators.all_keyed = True
            answer = self._attempt(step, batch, wishes)
        return answer

    def _attempt(self, step: int, batch: Batch, wishes: Callable[[], Wishes]) -> Apply:
        self._model.watch.begin(step)
        with torch.enable_grad():  # the loop body may be in an evaluation without gradients
            leaves = self.executor.step(step, batch)
        self._model.watch.end(step)
        self._enter("reduce", step, -1)
        self._links.flush()  # the previous step's gradients may still be on the way to the replicas
        self._owned = self.reducer.collect()
        squares = terms(square_sums(self._model.spec, self._owned))
        self._check_rest()
        self._enter("ready", step, -1)
        self.previous_copies.settle()
        self._replay()
        said = {"leaves": rows(leaves), "drew": self.executor.drew, **asdict(wishes())}
        said |= {"copies": self.comparing.digests(self.step, self._replicas_at), "keeps": self._keepable()}
        decided, arrays = self._rounds.commit(
            2 * step,
            (said, {"squares": squares, **self._tell_running()}),
            lambda all_ready: (self._decide(step, all_ready), self._hear_running(all_ready)),
        )
        self._told_running = arrays or {}
        return Apply.from_json(decided)

    def _replay(self) -> None:
        """Waits until all updates of the newest step are here, and brings the replicas to that step."""
        self.replicator.confirm()
        self.replicator.replay(self.step)
        self._replicas_at = self.step

    def _tell_running(self) -> Arrays:
        """Returns what this worker sends of the buffers that training changes: statistics, and values for layers that it ran most."""
        running = self._model.running
        if not running.names:
            return {}
        plan, workload = self.view.plan, self.view.workload
        mine = [s for s in plan.stages if max(s.members, key=lambda w: len(plan.micro_batches_of(w, workload))) == self.worker]
        return {**running.statistics.encode(self.executor.records()), **running.told(layer for s in mine for layer in s.layers)}

    def _hear_running(self, ready: Mapping[int, Payload]) -> Arrays | None:
        """Merges the buffers' statistics and values of all members, to be sent to all."""
        running = self._model.running
        if not running.names:
            return None
        told = [arrays or {} for _, arrays in ready.values()]
        records = running.statistics.merged(map(running.statistics.decode, told), self.view.workload.micro_batches)
        values = {name: array for arrays in told for name, array in arrays.items() if name.startswith("buffer ")}
        return {**running.statistics.encode(records), **values}

    @torch.inference_mode(False)
    def update(self, answer: Apply) -> None:
        """Updates the owned shards. Parameters of other owners are in transition from here on; nothing is sent yet.

        Raises:
            NonFinite: on every worker, naming step and micro-batch; nothing of the step was applied anywhere.
        """
        if answer.refusal is not None:
            raise NonFinite(answer.refusal)
        self._enter("apply", answer.step, -1)
        self._gatherer.begin(answer.step)
        scale = scaling(answer.denominator * answer.scale, answer.clip)
        self.replicator.begin(answer.step, scale, skipped=answer.skipped is not None)
        if answer.keep:
            self.kept = self._model.running.kept = self.previous_copies.step
            self.previous_copies.keep(self.rest.given(self.previous_copies.held))
        self.previous_copies.take(self.step)
        self.rest.spared(self.previous_copies.held)
        self.rest.forget("live", "gathered")
        self._contents.updates()
        if answer.skipped is None:
            self._optimizer.step(self._owned, scale)
        else:
            self._owned = [_absent(gradient) for gradient in self._owned]  # replicas replay the skipped step too
        running, told = self._model.running, self._told_running
        if running.names:
            if answer.skipped is None:
                self._model.watch.untouched(answer.step)
                running.apply(answer.step, running.statistics.decode(told), told)
            else:
                running.skip(answer.step)
            self._contents.has_buffers(answer.step, running.packed(answer.step))
        self._contents.updated(answer.step)
        self.step = answer.step

    def _keepable(self) -> bool:
        """Returns whether it is time to keep the previous copy, and it is as it was when digested; READY shows if replicas are too."""
        step = self.previous_copies.step
        if step is None or step + 1 != self._replicas_at or not self.view.fleet.replicas:  # it was compared with READY of that step
            return False
        due = self.rest.keeps(step) or not self.previous_copies.kept
        return due and self.rest.unchanged(self.previous_copies.held)

    @torch.inference_mode(False)
    def publish(self) -> None:
        """Sends the results of the last update: parameters to the members of the stage, gradients to the holders of replicas."""
        self._enter("gather", self.step, -1)
        self._gatherer.send(self.step)  # first, since the other members' loops wait for it
        self.previous_copies.begin(self.step)
        self._note_owned()
        self._contents.digested(self.step, self.rest.checksums_of("live", self.step))
        self._enter("replicate", self.step, -1)
        self.replicator.send(self.step, self._owned)
        self.replicator.expect(self.step)
        self._links.push()  # the loop's body follows, and may take long
        if any(name.startswith("buffer ") for name in self._told_running):
            self.abandon()  # taken again, the step must change these buffers again
        else:
            self._owned = []
            self.executor.retire()

    def _note_owned(self, before: Rest | None = None) -> None:
        for shard in self._optimizer.owned.shards.values():
            self.rest.note("live", shard.layer, shard.interval.start, self.step, shard.memory, before)
            self._optimizer.owned.scalars(shard)  # copied now, and compared before the next update

    def _gathered(self, layer: int) -> None:
        for start, memory in self._gatherer.gathered(layer):
            self.rest.note("gathered", layer, start, self.step, {PARAM: memory})

    def _check_rest(self) -> None:
        """Raises MemoryDamaged if a copy's memory has changed; called before this worker sends READY."""
        self.comparing.check_scalars(self._optimizer.owned, self.step)
        repaired = self._model.running.repair(self.step) if self.rest.takes(self.step, 0) else []
        if self.rest.check() or self.rest.damaged or repaired:
            raise self.comparing.damage(repaired)

    def settle(self) -> None:
        """Waits until all parameters held here are those of the newest step."""
        self._gatherer.wait_all()

    def links(self) -> dict[int, LinkRates]:
        """Returns the observed speeds of the links to peers."""
        return self._network.seen()

    @property
    def owned(self) -> list[tuple[Shard, Scalars]]:
        """The shards that this worker owns, with their scalars, as they are now."""
        updater = self._optimizer.owned
        return [(shard, updater.scalars(shard)) for shard in updater.shards.values()]

    def copied(self) -> list[tuple[Shard, Scalars]]:
        """Returns a copy of `owned` that does not change until the next step begins, or while it is lent (`previous_copies.lend`).

        It is the next step's previous copy, made earlier: nothing is copied twice.
        """
        self.previous_copies.take(self.step)
        self.rest.spared(self.previous_copies.held)
        owned = self._optimizer.owned.shards
        found: list[tuple[Shard, Scalars]] = []
        for previous in self.previous_copies.held:
            shard = replace(owned[previous.layer, previous.start], memory=dict(previous.memory), scalars={}, pieces=[])
            found.append((shard, {name: dict(values) for name, values in previous.scalars.items()}))
        return found

    def abandon(self) -> None:
        """Drops the computed gradients."""
        self._owned = []
        self.executor.end()

    def salvages(self) -> tuple[Salvage, ...]:
        """Returns what the next view can use of the begun step and of the one before; nothing if damaged parameters may have been used."""
        return () if self.rest.damaged or self.back is not None else self.executor.salvages()

    def _release(self) -> None:
        """Lets go of this view's memory. The engine itself may live on until garbage is collected, since it is part of cycles."""
        self._gatherer.arrived = None
        self.abandon()
        self.rest.release()
        self.replicator.release()
        self.executor.reducer.release()
        self.previous_copies.release()
        self._shared.release()
        self._links.release()

    def resume(self, resumption: Resumption) -> None:
        """Resumes a step that was begun in the previous view, as the first one of this view."""
        self.executor.resume(resumption)

    def flush(self, step: int) -> None:
        """Runs an empty round: when it returns, all members hold step `step` and its replicas are complete."""
        self._gatherer.wait_all()
        self._check_rest()
        self._enter("ready", step, -1)
        self.previous_copies.settle()
        self._replay()
        self._rounds.commit(2 * step + 1, ({}, None), lambda _: ({}, None))
        self._compare(step)

    def _compare(self, step: int) -> None:
        """Compares all copies as of the newest step, which all members hold; raises what `resolve` returns if they differ."""
        told = self.gather({"worker": self.worker, "copies": self.comparing.digests(step, step)})
        if unlike({each["worker"]: each["copies"] for each in told}):
            raise self.comparing.resolve(step, step, self.gather)

    def held(self, lost: Collection[int]) -> list[StoredCopy]:
        """Returns the complete copies that this worker can send once workers `lost` are gone. It is the last call in this view."""
        self.previous_copies.settle()
        self.rest.check(("live", "gathered", "replica", "previous", "previous replica"), in_turn=False)
        self.replicator.give_up(self.rest.damaged)
        outdated = self._gatherer.settle()
        self.replicator.settle()
        owned = self._optimizer.owned
        gathered = [(layer, 0, flat) for layer, flat in self._model.flats.items()]
        gathered += [(home, start, memory) for (home, start), memory in self._model.tied.items()]
        found = [
            *(held(shard, self.step, "live", owned.scalars(shard)) for shard in owned.shards.values()),
            *self.previous_copies.held,
            *self.previous_copies.kept,
            *(
                Held(layer=layer, start=start, stop=start + m.numel(), step=step, role="gathered", memory={PARAM: m}, scalars={})
                for layer, start, m in gathered
                if layer not in outdated
                for step in self._gathered_at(layer)
            ),
            *self.replicator.held(lost),
        ]
        return [copy for copy in self.rest.given(found) if self.trusts(copy.step)]

    def _gathered_at(self, layer: int) -> list[int]:
        """Returns the steps whose parameters of a layer the members have: all steps, if nothing changes them."""
        known = {self.step, self.previous_copies.step, *(copy.step for copy in self.previous_copies.kept)}
        return sorted(step for step in known if step is not None) if layer in self._model.spec.frozen else [self.step]

    @property
    def back(self) -> int | None:
        """The newest step whose copies may be used, since later ones differ between workers; None if none do."""
        return self.comparing.back

    def trusts(self, step: int) -> bool:
        """Returns whether copies of a step may be used."""
        return self.back is None or step <= self.back

    def _decide(self, step: int, ready: Mapping[int, Payload]) -> dict[str, Any]:
        self.told = {worker: said["saved"] for worker, (said, _) in ready.items() if said["saved"] is not None}
        lr = float(self._optimizer.optimizer.param_groups[0].get("lr", 0.0))
        norm = self._clip_norms[step % len(self._clip_norms)]
        decided = decide(step, ready, self.view.workload, clip_norm=norm, lr=lr, skips=self._skips, scale=self._scale)
        differ = unlike({worker: said["copies"] for worker, (said, _) in ready.items()})
        return replace(decided, unlike=differ, keep=all(said["keeps"] for said, _ in ready.values())).to_json()

    def evaluate(self, micro_batches: int, batch: Any, share: Callable[[int], float] = lambda _: 1.0) -> tuple[float, float]:
        """Returns sum and weight of the losses of micro-batches `batch(i)`, added in order: equal on every layout and every member.

        A micro-batch weighs `share(i)` if its loss gives no weight. A round follows each chunk of micro-batches, which bounds the number
        of messages on the way.
        """
        total = weight = 0.0
        chunk = 4 * len(self.view.workers)
        for start in range(0, micro_batches, chunk):
            sequence = self._next_sequence()
            leaves = self.executor.evaluate(sequence, range(start, min(start + chunk, micro_batches)), batch, share)
            so_far = (total, weight)
            said, _ = self._rounds.commit(sequence, ({"leaves": rows(leaves)}, None), lambda ready, sums=so_far: added(sums, ready))
            total, weight = said["total"], said["weight"]
        return total, weight

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns every member's JSON value, in the order of places, to every member; all must call it."""
        collected, _ = self._rounds.commit(
            self._next_sequence(),
            (value, None),
            lambda all_values: ({"values": [all_values[worker][0] for worker in self.view.workers]}, None),
        )
        return collected["values"]

    def whole(self, state: str) -> dict[str, torch.Tensor]:
        """Returns one state of every trainable parameter that has it, by name, to every member; all must call it."""
        self._gatherer.wait_all()
        return whole(self._rounds, self._next_sequence, self._optimizer.owned.shards.values(), self._model.spec, state)

    def digest(self) -> str:
        """Returns the hex SHA-256 of all parameters in name order and of the buffers that training changes; all members must call it."""
        self._gatherer.wait_all()
        model, layout = self._model, self.view.layout
        homes = {name: model.layer_of(name) for name in model.names}
        holders = {name: self.view.coordinator if layer is None else layout.members(layer)[0] for name, layer in homes.items()}
        sizes = {name: model.size_of(name) for name in model.names}
        buffers = [bytes_of(contiguous(buffer)) for buffer in model.running.now().values()]  # every member has them
        return digest(self._rounds, self._next_sequence, self.worker, sizes, holders, model.bytes_of, buffers)

    def _next_sequence(self) -> int:
        """Returns the next number of a round that belongs to no step; equal on all members, since all call the same methods."""
        self._rounds_between += 1
        return EVALUATION | self._rounds_between


def _absent(gradient: OwnedGradient) -> OwnedGradient:
    """Returns the gradient with every parameter's part absent."""
    return replace(gradient, memory=gradient.memory.zero_(), parts=[None] * len(gradient.parts))

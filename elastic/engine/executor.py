"""Runs one worker's actions of a step: receives, computes layer by layer, sends, folds gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from elastic.engine.boundary import Crossing
from elastic.engine.data import Batch, model_input, on_device, tokens_in
from elastic.engine.gather import Gatherer
from elastic.engine.in_flight import InFlight
from elastic.engine.layer_times import Effort
from elastic.engine.model import LayeredModel, Vector
from elastic.engine.numerics import Numerics
from elastic.engine.pipe import Pipe
from elastic.engine.randomness import Generators
from elastic.engine.reducer import Reducer
from elastic.engine.salvage import Resumption, Salvage, kept
from elastic.engine.shared import SharedMemory
from elastic.engine.stage import LayerRunner, Loss, LossLeaf, LossRunner, enter
from elastic.engine.statistics import Records
from elastic.engine.tensor_links import TensorLinks
from elastic.memory.tensors import address
from elastic.plan.schedule import Action, build
from elastic.view import View

_LOADED_AT_ONCE = 4
_HELD_DONE = 4
"""How many micro-batches are held after their backward: what their neighbours need of them, if these have to compute them again."""

Enter = Callable[[str, int, int], None]
"""Called at the beginning of every phase of a step, with its name, the step, and the micro-batch or -1."""


class Executor:
    """Forward and backward of one worker in one view; its reducer sends gradients, its gatherer receives parameters."""

    def __init__(
        self,
        worker: int,
        model: LayeredModel,
        view: View,
        links: TensorLinks,
        numerics: Numerics,
        loss: Loss,
        enter: Enter,
        shared: SharedMemory,
    ) -> None:
        self._enter = enter
        self._links, self._network, self._shared = links, links.network, shared
        self._model, self._workload = model, view.workload
        self._follow(view)
        self.gatherer = Gatherer(worker, model, view, links, shared)
        self.generators = Generators()
        self.statistics = model.running.statistics
        self.noted: Callable[[Salvage | None], None] | None = None  # called with each grain that is finished, and with None at the end
        self._runners = [
            LayerRunner(index, model.layers[index], numerics, self.generators, model.running.statistics)
            for index in view.plan.stages[self.pipe.stage].layers
        ]
        self._loss = LossRunner(len(model.layers), loss, numerics, self.generators)
        self._vectors = {runner.index: [v for v in model.vectors if v.layer == runner.index] for runner in self._runners}
        self._parameters = {runner.index: list(runner.module.parameters()) for runner in self._runners}
        self._layers = view.plan.stages[self.pipe.stage].layers
        self._loads: list[int] = []
        self._loaded: dict[int, Any] = {}
        self._last_backward = -1
        self._step: int | None = None
        self._past: Salvage | None = None  # the step before, until this one has sums
        self._resumption: Resumption | None = None
        self._finished: set[int] = set()
        self._leaves: dict[int, LossLeaf] = {}
        self._live: dict[int, InFlight] = {}  # between forward and backward
        self._held: dict[int, InFlight] = {}  # of the view before, not yet used
        self._done: dict[int, InFlight] = {}  # the last ones that have gone backward
        self._unread: list[tuple[Callable[[int, int], object], int]] = []
        self._addresses: dict[int, Sequence[int]] = {}
        self._splits = {layer for layer in self._layers if view.workload.layers[layer].weight_s}
        self._seconds = sum(each.forward_s + each.backward_s for each in (view.workload.layers[layer] for layer in self._layers))
        self._taken_over: set[int] = set()
        self.effort = Effort()
        self.taken_over_s = 0.0  # seconds in layers for what other workers were to compute of the resumed step
        self.most_in_flight = 0
        self.drew = False
        self.micro_batches_run = 0

    def follow(self, view: View) -> None:
        """Follows other routes of the same stages from the next step on."""
        self.end()
        self._follow(view)

    def _follow(self, view: View) -> None:
        worker = self._network.worker
        self.pipe = Pipe(worker, view, self._links)
        self.reducer = Reducer(worker, self._model, view, self._links, self._shared)
        plan = view.plan
        self.actions: Sequence[Action] = build(view.workload, plan.stages, plan.routes, **plan.order).get(worker, ())
        self._route = view.plan.routes[self.pipe.stage]

    def records(self) -> Records:
        """Returns the running statistics of this worker's part of the step."""
        return self.statistics.of(range(self._workload.micro_batches), self._layers)

    @property
    def peers(self) -> set[int]:
        """The workers that this one needs links to, for steps and evaluations."""
        return self.pipe.peers | self.reducer.peers | self.gatherer.peers

    def step(self, step: int, batch: Batch) -> list[LossLeaf]:
        """Runs the micro-batches routed to this worker through its stage; when it returns, gradients are on their way to their owners.

        If a layer `drew` from a generator that was not keyed, the step must be computed again with all of them keyed.
        """
        actions = self._begin(step)
        for action in actions:
            computed_s = self.effort.computed_s
            if action.kind == "F":
                self._enter("forward", step, action.micro_batch)
                if (leaf := self._forward(step, action.micro_batch, batch)) is not None:
                    self._leaves[action.micro_batch] = leaf
            else:
                self._enter("backward", step, action.micro_batch)
                if action.kind != "W":
                    self._backward(step, action.micro_batch, split=action.kind == "I")
                if action.kind != "I":
                    self._complete(action.micro_batch)
            if action.micro_batch in self._taken_over:
                self.taken_over_s += self.effort.computed_s - computed_s
        for receive, micro_batch in self._unread:  # computed again by a neighbour, but held here
            receive(step, micro_batch)
        self.gatherer.wait_all()  # a worker without a grain has not waited yet
        self.drew |= self.generators.drawn()
        self.micro_batches_run += sum(action.kind == "F" for action in actions)
        return list(self._leaves.values())

    def resume(self, resumption: Resumption) -> None:
        """Uses the results of the next step that were computed in the view before."""
        self._resumption = resumption

    def _begin(self, step: int) -> Sequence[Action]:
        """Prepares a step and returns its actions."""
        if self._past is None:
            self._end()
        self._step, self.drew, self._taken_over = step, False, set()
        self._addresses = {layer: [address(each) for each in parameters] for layer, parameters in self._parameters.items()}
        self.generators.watch()
        self.reducer.begin(step)
        self.statistics.begin()
        resumed, self._resumption = self._resumption, None
        actions = self.actions
        if resumed is not None and resumed.step == step:
            actions = [action for action in actions if self._workload.grain_of(action.micro_batch) not in resumed.grains]
            self._taken_over = {a.micro_batch for a in actions if self._workload.grain_of(a.micro_batch) not in resumed.own}
            if resumed.salvage is not None:
                self._restore(resumed.salvage)
                self._hold(resumed.salvage, {action.micro_batch for action in actions})
        self._loads = [action.micro_batch for action in actions if action.kind == "F" and self._needs_data(action.micro_batch)]
        self._last_backward = next((action.micro_batch for action in reversed(actions) if action.kind in "BW"), -1)
        if self.actions and not actions:  # nothing is left to compute: send the restored sums
            for vector in itertools.chain.from_iterable(self._vectors.values()):
                self.reducer.contribute(vector)
        return actions

    def _restore(self, salvage: Salvage) -> None:
        own = self._network.worker
        routed = {grain: self._workload.micro_batches_of(grain) for grain, worker in enumerate(self._route) if worker == own}
        salvage = kept(salvage, routed, last=self.pipe.last)
        self.reducer.restore(salvage.sums)
        self._finished = {m for grain in salvage.grains for m in self._workload.micro_batches_of(grain)}
        self._leaves = {leaf.micro_batch: leaf for leaf in salvage.leaves}

    def _hold(self, salvage: Salvage, wanted: set[int]) -> None:
        """Keeps what can be used of these micro-batches in flight."""
        for micro_batch in wanted.intersection(salvage.in_flight):
            state = salvage.in_flight[micro_batch]
            grain = self._workload.grain_of(micro_batch)
            state.fit(
                self._layers,
                len(self._model.layers),
                lambda layer: self._addresses[layer] == salvage.addresses.get(layer),
                lambda layer, grain=grain: all(self.reducer.has_sum(vector, grain) for vector in self._vectors[layer]),
            )
            self._held[micro_batch] = state
        kept = {(m, layer) for m, state in self._held.items() for layer in (*state.runs, *range(state.below, self._layers.stop))}
        kept.update((m, layer) for m in self._finished for layer in self._layers)
        self.statistics.begin({place: found for place, found in salvage.records.items() if place in kept})

    def _needs_data(self, micro_batch: int) -> bool:
        """Whether a micro-batch has to be loaded, for the first layer or for the loss."""
        held = self._held.get(micro_batch) or InFlight.through(self._layers)
        return (self.pipe.first and held.reads_input) or (self.pipe.last and not held.begun and held.loss is None)

    def salvages(self) -> tuple[Salvage, ...]:
        """Returns the reusable results of the step under way, if it is given up now, and of the step before, which may be undone."""
        now = self._salvage() if self._resumption is None else self._resumption.salvage
        return tuple(each for each in (now, self._past) if each is not None)

    def _salvage(self) -> Salvage | None:
        if self._step is None or self.drew or self.generators.drawn() or self._model.running.changed():
            return None  # computed again, it would draw, or change buffers
        workload, sums = self._workload, self.reducer.sums()
        grains = frozenset(grain for grain in range(workload.grains) if self._finished.issuperset(workload.micro_batches_of(grain)))
        return Salvage(
            step=self._step,
            layers=self._layers,
            grains=grains,
            summed=frozenset(grain for nodes in sums.values() for node in nodes for grain in node.grains(workload.grains)),
            sums=sums,
            leaves=tuple(leaf for m, leaf in self._leaves.items() if workload.grain_of(m) in grains),
            records=self.statistics.of(range(workload.micro_batches), self._layers),
            begun=frozenset(map(workload.grain_of, {*self._held, *self._live})) - grains,
            in_flight={**self._held, **self._done, **self._live},
            addresses=self._addresses,
        )

    def _note(self, micro_batch: int) -> None:
        """Passes on what is finished of the step, if the micro-batch was the last one of its grain."""
        grain = self._workload.grain_of(micro_batch)
        if self.noted is not None and self._finished.issuperset(self._workload.micro_batches_of(grain)):
            self.noted(self._salvage())
            self.reducer.settle()

    def end(self) -> None:
        """Drops the results of a step."""
        self._end()
        self._resumption = None

    def retire(self) -> None:
        """Ends a step that was applied here. Its sums are kept until the next step has some: a member that has not applied it may die."""
        past = self._salvage()
        if past is None or not past.grains:
            self.end()
            return
        self._clear()
        self._past = replace(past, begun=frozenset(), in_flight={}, addresses={})
        self.reducer.retire()

    def _forget_past(self) -> None:
        if self._past is not None:
            self._past = None
            if self.noted is not None:
                self.noted(None)
            self.reducer.forget_past()

    def _end(self) -> None:
        self._past = None
        if self.noted is not None:
            self.noted(None)
        self.reducer.end()
        self._clear()

    def _clear(self) -> None:
        self._step, self._loaded = None, {}
        self._finished, self._leaves = set(), {}
        self._held, self._live, self._done, self._unread = {}, {}, {}, []

    def _forward(self, step: int, micro_batch: int, batch: Batch) -> LossLeaf | None:
        data = self._load(step, micro_batch, batch) if self._needs_data(micro_batch) else None
        reads = self._held[micro_batch].reads_input if micro_batch in self._held else True
        crossing = self._input(step, micro_batch, data) if reads else None
        if not (reads or self.pipe.first):
            self._unread.append((self.pipe.receive_activations, micro_batch))
        state = self._live[micro_batch] = self._held.pop(micro_batch, None) or InFlight.through(self._layers)
        self.most_in_flight = max(self.most_in_flight, len(self._live))
        self._prepare(step, micro_batch)
        for runner in self._runners:
            if runner.index in state.runs:
                crossing = state.outputs[runner.index].crossing
            elif runner.index < state.below and crossing is not None:
                self._network.check()
                self.gatherer.wait(runner.index)
                with self.effort.of(state.fresh):
                    run, crossing = runner.forward(step, micro_batch, crossing)
                state.went_forward(runner.index, run, crossing)
        if self.pipe.last and state.loss is None and not state.begun and crossing is not None:
            state.loss, state.leaf = self._loss.forward(step, micro_batch, crossing, data, tokens_in(data))
        if state.output is not None and not self.pipe.last:
            self.pipe.send_activations(step, micro_batch, state.output.crossing)
        return state.leaf

    def _backward(self, step: int, micro_batch: int, *, split: bool) -> None:
        """Computes the gradient of the stage's input, and sends it; with `split` it leaves those of the layers' matrices for later."""
        state = self._live[micro_batch]
        if state.begun:
            self._skip_backward(micro_batch, state)
        else:
            state.gradients = self._loss.backward(state.loss) if state.loss else self.pipe.receive_gradients(step, micro_batch)
            state.loss = None
        self._forget_past()
        if any(runner.recomputes for runner in self._runners):
            self._prepare(step, micro_batch)
        self.effort.expected_s += self._seconds * state.fresh
        for runner in reversed(self._runners):
            if runner.index >= state.below or state.gradients is None:
                continue
            self._network.check()
            with self.effort.of(state.fresh):
                gradients, left = runner.backward_in_parts(
                    step, micro_batch, state.runs[runner.index], state.gradients, split=split and runner.index in self._splits
                )
            if left is None:
                state.went_backward(runner.index, gradients, self._taken(runner.index))
            else:
                state.went_backward(runner.index, gradients, [])
                state.left[runner.index] = left
            if self.pipe.first:
                self._fold(micro_batch, state.found)
        if not self.pipe.first and state.gradients is not None:
            self.pipe.send_gradients(step, micro_batch, state.gradients)  # before folding: the stage below waits for it

    def _complete(self, micro_batch: int) -> None:
        """Computes what is left of a backward, and adds the gradients to the sums."""
        state = self._live[micro_batch]
        for layer in list(state.left):
            self._network.check()
            with self.effort.of(state.fresh):
                state.left[layer].compute()
            state.found += self._taken(layer)
            del state.left[layer]
        self._fold(micro_batch, state.found)
        self._done[micro_batch] = self._live.pop(micro_batch)
        if len(self._done) > _HELD_DONE:
            del self._done[next(iter(self._done))]
        self._finished.add(micro_batch)
        self._note(micro_batch)

    def _skip_backward(self, micro_batch: int, state: InFlight) -> None:
        """Prepares for the rest of a backward that the view before began: its layers are not computed again."""
        if not self.pipe.last:
            self._unread.append((self.pipe.receive_gradients, micro_batch))
        if micro_batch == self._last_backward:
            summed = [vector for layer in range(state.below, self._layers.stop) for vector in self._vectors[layer]]
            for vector in summed:
                if vector.layer not in state.left and all(vector is not there for there, _ in state.found):
                    self.reducer.contribute(vector)

    def _fold(self, micro_batch: int, found: list[tuple[Vector, list[torch.Tensor | None]]]) -> None:
        vectors = [vector for vector, _ in found]
        for vector, gradients in found:
            self.reducer.fold(vector, self._workload.grain_of(micro_batch), gradients)
        found.clear()  # before links are used, which may be lost: sums may have been added to these tensors
        for vector in vectors if micro_batch == self._last_backward else ():
            self.reducer.contribute(vector)

    def _prepare(self, step: int, micro_batch: int) -> None:
        self.generators.prepare(runner.key(step, micro_batch) for runner in [*self._runners, self._loss])

    def _load(self, step: int, micro_batch: int, batch: Batch) -> Any:
        """Loads a micro-batch; random numbers drawn by loading are not keyed.

        It loads the next few with it: in one batch, with warm caches, that takes a third of the time.
        """
        if micro_batch not in self._loaded:
            self._links.push()  # loading may take long
            first = self._loads.index(micro_batch)
            self.drew |= self.generators.drawn()
            for ahead in self._loads[first : first + _LOADED_AT_ONCE]:
                self._enter("forward", step, ahead)  # so that a micro-batch whose loading kills the worker is identified
                self._loaded[ahead] = batch(step, ahead)
            self._enter("forward", step, micro_batch)
            self.generators.watch()
        return self._loaded.pop(micro_batch)

    def _taken(self, layer: int) -> list[tuple[Vector, list[torch.Tensor | None]]]:
        return [(vector, self._take_gradients(vector)) for vector in self._vectors[layer]]

    def _take_gradients(self, vector: Vector) -> list[torch.Tensor | None]:
        gradients = []
        for spec in vector.parameters:
            parameter = self._model.parameter(spec.name)
            gradients.append(parameter.grad.to_dense() if parameter.grad is not None and parameter.grad.is_sparse else parameter.grad)
            parameter.grad = None
        return gradients

    def _input(self, step: int, micro_batch: int, data: Any) -> Crossing:
        if self.pipe.first:
            return enter(model_input(data), f"micro-batch {micro_batch} of step {step}")
        return self.pipe.receive_activations(step, micro_batch)

    def evaluate(
        self, step: int, micro_batches: range, batch: Callable[[int], Any], share: Callable[[int], float] = lambda _: 1.0
    ) -> list[LossLeaf]:
        """Runs the forward of the micro-batches `batch(i)` that are dealt to this worker. `step`, marked EVALUATION, names the messages.

        A micro-batch weighs `share(i)` if its loss gives no weight.
        """
        leaves: list[LossLeaf] = []
        self.gatherer.wait_all()
        for micro_batch in micro_batches:
            if not self.pipe.takes(step, micro_batch):
                continue
            data = on_device(batch(micro_batch)) if self.pipe.first or self.pipe.last else None
            crossing = self._input(step, micro_batch, data)
            for runner in self._runners:
                crossing = runner.evaluate(step, micro_batch, crossing)
            if self.pipe.last:
                leaves.append(self._loss.evaluate(step, micro_batch, crossing, data, tokens_in(data), share(micro_batch)))
            else:
                self.pipe.send_activations(step, micro_batch, crossing)
        return leaves

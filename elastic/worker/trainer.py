"""The `Trainer` that a train function uses: turns a model, a loss, an optimizer and data into steps that are equal on every layout."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from elastic.comm import rate_meter
from elastic.comm.network import Network
from elastic.engine import after_step as after
from elastic.engine import profile
from elastic.engine.after_step import AfterStep
from elastic.engine.cutting.check import check
from elastic.engine.cutting.layers import Layers, uncut
from elastic.engine.data import batches, check_repeats, placing, stream_in
from elastic.engine.decision import Apply
from elastic.engine.deferred.building import Builder
from elastic.engine.loss_scale import LossScale
from elastic.engine.model import LayeredModel, split
from elastic.engine.numerics import Numerics
from elastic.engine.partial import refuse_partial
from elastic.engine.peak import peak
from elastic.engine.placement import place_model, place_state
from elastic.engine.probe import probe
from elastic.engine.profile_apart import measure_apart
from elastic.engine.stage import Loss
from elastic.engine.streaming import Position
from elastic.engine.torch_settings import Modes
from elastic.engine.view_state import Training, ViewState, initial_state
from elastic.engine.warm_up import warm_up
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import CheckpointDamaged, MismatchError, TrainerError
from elastic.host import facts as host
from elastic.layout.regions import MASTER, PARAM, TRAINED
from elastic.memory import device
from elastic.plan.workload import LayerCost
from elastic.recovery.salvage import Routes
from elastic.script import sources
from elastic.settings import fingerprint
from elastic.view import View
from elastic.worker import changed_model
from elastic.worker import job as jobs
from elastic.worker.arguments import bind_scheduler, check_choices, checkpointing_of, cut_batch, group_values, one_optimizer
from elastic.worker.checkpointing import Checkpoints
from elastic.worker.deferral import compact_state, model_of
from elastic.worker.device_contents import DeviceContents
from elastic.worker.devices import describe
from elastic.worker.engine import Engine
from elastic.worker.evaluation import EvaluationData, evaluated
from elastic.worker.extra_files import extra_files
from elastic.worker.history import History
from elastic.worker.inplace_changes import InPlace
from elastic.worker.layer_attributes import Attributes
from elastic.worker.loading.ahead import ahead
from elastic.worker.loading.given import check_length, given
from elastic.worker.metrics import Numbers
from elastic.worker.naming import Names, naming_of
from elastic.worker.own_statistics import own_statistics
from elastic.worker.recovery_client import RecoveryClient
from elastic.worker.refusals import check_model, check_process
from elastic.worker.report import Report
from elastic.worker.resume_checks import TrainingRecord
from elastic.worker.runtime import WorkerRuntime
from elastic.worker.segment_contents import SegmentContents
from elastic.worker.steps import Steps

_log = logging.getLogger(__name__)

_CHANGED = (
    "code behind the last loop has changed the model's parameters. A worker that joins later does not have values which that code has kept "
    f"in variables, and the job ends with an error if workers then have different models. {changed_model.ADVICE}"
)

_MEASURED = len(fields(LayerCost)) - 1
"""Fields of a layer's costs in front of the bytes of what is not trained."""


class Trainer:
    """Trains a layered model on all workers of the running job; every worker builds the same one.

    Args:
        model: an `nn.Sequential`, or a list of layers in order; or a model of transformers, which is cut as by `elastic.layers`. Any other
            module is one layer. Or a function without arguments that builds a module, or a list of functions that each build a layer: then
            no worker has the whole model in memory. Functions run on torch's `meta` device; initial values follow from seed, layer and name
            (`torch.manual_seed` has no effect), and each worker computes those of its own layers. The optimizer is a function then. A model
            of transformers that the function returns is cut, too.
        loss: `loss(output, micro_batch)` returns the micro-batch's mean loss, or `(sum, weight)`.
        optimizer: a fresh `torch.optim.Optimizer` over the model's parameters, or a function that makes one of them.
        data: a map-style dataset; an iterable one, which every worker reads in order; a DataLoader, whose dataset, collate_fn, shuffle= and
            num_workers are taken; or a function `batch(step, micro_batch)`. Of a tuple or list, the model gets the first element.
        batch_size: samples of a step, of all workers together.
        micro_batch_size: samples of a micro-batch; it must divide `batch_size`.
        scheduler: a scheduler of that optimizer, or a function that makes one from it; stepped once per step. `ReduceLROnPlateau` is not:
            the loop body calls `scheduler.step(metric)` on every worker with the same metric (`evaluate` returns the same on all). The
            scheduler's state is saved, and sent to workers that join.
        clip_norm: the largest L2 norm of the whole gradient.
        seed: keys the order of data, dropout and every other use of torch's, NumPy's and Python's generators inside layers.
        on_nonfinite: "raise" NonFinite if a loss or gradient is not finite, or the weights of a step's losses add up to 0; or "skip" that
            step: it counts, changes only the scheduler, and is named in `report.skipped`, the log and `result.skipped`.
        exact: refuse whatever makes bits depend on the layout (such as buffers that a forward changes; BatchNorm's are exact).
        grains: number of parts of the batch that are summed separately; by default the largest divisor of the micro-batches up to 16.
        autocast: run layers and loss under `torch.autocast` in this dtype; parameters, gradients and optimizer state keep theirs.
        loss_scale: multiply losses by this power of two before the backward, and divide gradients by it after, so that those in float16 do
            not vanish; "dynamic" begins at 65536, is halved after a step whose gradient is not finite (which is skipped), and doubled after
            2,000 finite ones, as by `torch.amp.GradScaler`. It is sent to workers that join, and saved.
        master_weights: keep a float32 master of each float16 and bfloat16 parameter: the optimizer updates masters, and a parameter is its
            master's rounding. Gradients are summed in the parameter's dtype, and divided (by the loss scale too) and clipped in float32.
            Masters are state like the optimizer's: spread over workers, copied, moved and saved with it. Other parameters have none.
        checkpoint_activations: keep only layers' inputs and recompute in backward: all layers (True), or those with `f(index, layer)` true.
        collate: joins samples of a dataset, as a DataLoader's `collate_fn`.
        checkpoint: a directory that all hosts share, or a URL for fsspec, such as `s3://bucket/run`. The training resumes from the newest
            good checkpoint in it, if there is one, and saves the state after its last step.
        every: also save after each `every` steps, while training continues.
        keep: the number of newest checkpoints to keep; all by default.
        checkpoint_files: extra files of a checkpoint by name, such as a tokenizer's: content (bytes or text), or a `pathlib.Path`.
            The `config.json` of a Hugging Face model is always written.
        names: the parameters' names in checkpoints: the module that the layers were taken from, whose names are used; or a mapping or a
            function of names such as `3.attn.weight`. By default the names in the model's own `state_dict`.
        weights: a Hugging Face directory, or a directory of our checkpoints, with the initial values of a model that is given by a
            function, under the names that `names` says. Each worker reads those of its own layers, and converts them to the model's
            dtype; `statistics()` says how many bytes it read. Only values are taken: to go on with a training, give `checkpoint`. Every
            host needs the files, also while workers may join.

    Raises:
        TrainerError: if any of these cannot be trained; the message names the remedy.
        CheckpointError: if there are checkpoints and none is good, or the newest is of another model; or if `weights` do not fit.
    """

    _updates = 1  # that are made with a batch
    _norms: tuple[float | None, ...] = ()  # to clip these updates to, if not all to the same

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | Builder | Sequence[Builder],
        loss: Loss,
        optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer],
        data: Any,
        *,
        batch_size: int,
        micro_batch_size: int,
        scheduler: Any = None,
        clip_norm: float | None = None,
        seed: int = 0,
        on_nonfinite: str = "raise",
        exact: bool = True,
        grains: int | None = None,
        autocast: torch.dtype | None = None,
        loss_scale: float | str | None = None,
        master_weights: bool = False,
        checkpoint_activations: bool | Callable[[int, nn.Module], bool] = False,
        collate: Callable[[list[Any]], Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int | None = None,
        keep: int | None = None,
        checkpoint_files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
        names: Names | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        self._job = jobs.current_job()
        if self._job.trains:
            raise TrainerError(
                "train_fn makes a second Trainer, but a job has only one, whose state is sent to workers that join: train each model with "
                "its own call of elastic.run, or give one Trainer both as one model, with a parameter group each"
            )
        check_process()
        for each in model if isinstance(model, list | tuple) else [model]:
            if isinstance(each, nn.Module):
                check_model(each)
        self._modes = Modes(self._job.threads)
        micro_batches, grains = cut_batch(batch_size, micro_batch_size, grains)
        check_choices(clip_norm, on_nonfinite)
        scale = LossScale.of(loss_scale)
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        what = given(data, batch_size, collate)
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        loads = ahead(batches(what.data, **sizes, seed=seed, collate=what.collate, shuffles=what.shuffles), what.processes)
        self._loads, self._batch, self._stream = loads, placing(loads), stream_in(loads)
        self._exact = exact
        self._collate, self._data = what.collate, what.data
        self._samples = len(what.data) if isinstance(what.data, Sized) else 0
        built, initial = model_of(model, optimizer, seed, weights, names, lambda: self._batch(0, 0), warn=self._job.profile)
        place_model(split(built)[0])
        self._model = LayeredModel(built, initial=initial)
        parameters = [parameter for parameter in self._model.root.parameters() if parameter.requires_grad]
        if not parameters:
            raise TrainerError("the model has no trainable parameter")
        instance = one_optimizer(optimizer, parameters)
        place_state(instance)
        if initial is not None:
            compact_state(instance)
        self._scheduler = bind_scheduler(scheduler, instance)
        self._probed = probe(instance, masters=master_weights)
        self._model = LayeredModel(built, cut=self._probed.cut, masters=master_weights, exact=exact, initial=initial)
        self._model.running.statistics.watch()
        self._optimizer = ShardedOptimizer(instance, self._model, self._probed)
        self._checkpoints: Checkpoints | None = None
        self._naming = naming_of(self._model.root, names)
        if checkpoint is not None:
            samples = self._samples or None
            record = TrainingRecord(
                optimizer=type(instance).__name__,
                scheduler="" if self._scheduler is None else type(self._scheduler).__name__,
                settings={**sizes, "seed": seed, "samples": samples},
                group_values=group_values(instance),
            )
            files = extra_files(names if isinstance(names, nn.Module) else uncut(built), checkpoint_files or {})
            self._checkpoints = Checkpoints(self._job, checkpoint, every, self._model, self._optimizer, record, keep, files, self._naming)
        elif every is not None:
            raise TrainerError(f"every={every} needs a directory to save to: give checkpoint= too")
        numerics = Numerics(seed=seed, autocast=autocast, checkpoint=checkpointing_of(checkpoint_activations), scale=scale)
        self._network = Network(
            self._job.worker,
            secret=self._job.secret,
            host=self._job.host,
            directory=self._job.links,
            interface=self._job.interface,
            tls=self._job.tls,
        )
        self._job.listen_on(self._network)
        self._network.waits = self._job.waits
        self._training = Training(
            numerics=numerics,
            loss=loss,
            clip_norms=self._norms or (clip_norm,),
            enter=self._modes.watched(self._job.enter),
            skips=on_nonfinite == "skip",
        )
        contents = SegmentContents if device.on_host() else DeviceContents
        self._contents = contents(self._job.worker, self._job.segment, self._model, self._optimizer)
        self._name_gpu()
        announcement = self._announcement()
        if isinstance(built, Layers) and self._job.profile and initial is None:  # else no worker may have room for the whole model
            check(self._model, built, loss, numerics, self._batch(0, 0))
        if self._job.joins:
            warm_up(self._model, loss, numerics, lambda: self._batch(0, 0))
        if self._checkpoints is not None:
            self._checkpoints.began_with(announcement["digest"])
        view = self._job.announce({**announcement, "micro_batches": micro_batches, "grains": grains})
        self._member = RecoveryClient(self._job, self._network, self._model, self._optimizer, self._build, self._checkpoints)
        root = self._model.root
        attributes = Attributes(root)
        if scale is not None and scale.dynamic:
            attributes.include("the loss scale", vars(scale), ("value", "finite"))
        history = History(self._optimizer, self._scheduler, attributes, InPlace(root, instance))
        if self._stream is not None and self._stream.resumable:
            history.registered.add((Position(self._stream, lambda: (history.step + 1) // self._updates),), root)
        history.check(saved=checkpoint is not None)
        refuse_partial(root)
        self._runtime = WorkerRuntime(self._job, self._member, history, self._job.loading(self._batch), self._step_scheduler)
        self._history = history
        self._numbers = Numbers()
        self._steps = Steps(self._job, self._runtime, history, self._checkpoints, batch_size=batch_size, seed=seed)
        self._job.behind = self._returned
        if view is None:
            if self._checkpoints is not None:
                self._checkpoints.join()
            self._runtime.join()
        else:
            try:
                state = None if self._checkpoints is None else self._checkpoints.begin(view, history, self._runtime)
            except CheckpointDamaged as error:
                self._runtime.found_without_state(view, error)
                return
            engine = self._build(view, state or initial_state(self._job.worker, self._model, self._optimizer, view))
            self._runtime.found(engine, lambda: self._network.install(view.epoch, view.attempt, view.members, engine.peers))

    def _name_gpu(self) -> None:
        """Names this worker's GPU if it uses CUDA."""
        if self._job.gpu is None and torch.cuda.is_initialized():
            self._job.use_gpu(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")

    def _peak_flops(self) -> float:
        """Returns the most operations a second of this worker's device, of products in the type that the model computes in."""
        computes = {getattr(torch, name) for name in TRAINED}  # other parameters are packed weights, which products do not take
        largest = max((each for each in self._model.root.parameters() if each.dtype in computes), key=torch.Tensor.numel)
        return peak(self._training.numerics.autocast or largest.dtype, self._job.settings.workers_per_device)

    def _measured(self) -> profile.LayerProfile:
        """Returns the measured layers: in processor time, which others affect little, or in wall-clock time if a GPU computes.

        Raises TrainerError if data that must be exact are others each time that they are loaded.
        """
        if self._exact:
            check_repeats(self._loads)
        clock = time.thread_time if self._job.gpu is None and device.on_host() else device.clock
        measure = profile.measure if self._model.initial is None else measure_apart
        rows = measure(self._model, self._training.loss, self._training.numerics, self._batch(0, 0), clock)
        frozen = map(self._model.frozen_bytes, range(len(rows)))
        return [[*row, *[0.0] * (_MEASURED - len(row)), size] if size else row for row, size in zip(rows, frozen, strict=True)]

    def _announcement(self) -> dict[str, Any]:
        """Returns this worker's announcement, for the other workers and the planner; its settings must be equal on all workers."""
        training, instance = self._training, self._optimizer.optimizer
        measures = self._job.profile
        return {
            "address": self._network.address,
            "fingerprint": fingerprint(describe()),
            "code": sources.to_json(sources.note_imported()),
            "model": {**self._model.spec.to_json(), **self._model.built_alike()},
            "digest": self._model.digest(),
            "profile": self._measured() if measures else None,
            "peak_flops": self._peak_flops() if measures else 0.0,
            "link": rate_meter.within_host() if measures else None,
            "state_bytes": self._probed.state_bytes,
            "whole": host.anonymous_bytes(),
            "base": max(0, host.anonymous_bytes() - (self._model.built_bytes if device.on_host() else 0)),
            "segment": self._job.segment is not None,
            "device": device.current().type,
            "device_memory": device.usable_bytes(self._model.built_bytes),
            "checkpoint": None if self._checkpoints is None else self._checkpoints.origin,
            "settings": {
                "batch_size": self.batch_size,
                "micro_batch_size": self.micro_batch_size,
                "seed": self.seed,
                "samples": None if self._stream is None else self._stream.digest(),
                "clip_norm": training.clip_norms[0] if len(training.clip_norms) == 1 else training.clip_norms,
                "autocast": str(training.numerics.autocast),
                "loss_scale": str(training.numerics.scale),
                "optimizer": type(instance).__name__,
                "groups": group_values(instance),
                "scheduler": type(self._scheduler).__name__,
                "checkpoint": self._checkpoints is not None,
                "torch": self._modes.first,
                "names": self._naming.digest,
            },
        }

    def _build(self, view: View, state: ViewState, routes: Routes = ()) -> Engine:
        return Engine(
            self._job.worker,
            self._model,
            view,
            self._network,
            self._optimizer,
            self._training,
            state,
            self._contents,
            self._job.segments,
            routes,
        )

    @property
    def leader(self) -> bool:
        """Whether this worker should print, log and save for the job; true on exactly one worker."""
        return self._job.leader

    @property
    def step(self) -> int:
        """The next step to take: the number of steps taken so far."""
        return self._history.step + 1

    @property
    def layout(self) -> str:
        """The layers of each stage and its number of workers, such as `[0-4]x2 [5-9]x2`."""
        return self._engine.view.plan.summary

    @property
    def schedule(self) -> str:
        """This worker's action list, such as `0F0 0F1 0B0 0B1`: stage, forward or backward, micro-batch."""
        return " ".join(map(str, self._engine.executor.actions))

    def run(self, steps: int) -> Iterator[Report]:
        """Takes steps until `steps` have been taken in all, and yields each one once, on every worker.

        As in a plain loop, the parameters are those of the yielded step, and step k + 1 is computed only when the loop asks for it, with
        the settings that the loop body has made. The decision on a step is final: a step that is taken again after a loss has the same
        settings and the same bits, and is not yielded again. Leaving the loop early does not change the parameters; leaving it in its last
        body is the same as running to its end.
        """
        if isinstance(self._data, Sized):
            check_length(self._data, self._samples)
        yield from self._steps.take(steps)

    def save(self) -> None:
        """Saves the state after the newest step, and returns when that is done or was given up; `result.saves` has the outcome.

        Every worker must call it, at the same place: last in a loop body, since later changes of the body are not saved; or after a loop
        that was left early, whose state is otherwise saved when train_fn returns. A loop that ran to its end has saved its state.

        Raises:
            TrainerError: without `checkpoint=`, or before the first step.
        """
        self._steps.save()

    @property
    def loss_scale(self) -> float:
        """The factor by which losses are multiplied in the next step; 1.0 without `loss_scale=`."""
        scale = self._training.numerics.scale
        return 1.0 if scale is None else scale.value

    def _step_scheduler(self, answer: Apply) -> None:
        if self._training.numerics.scale is not None:
            self._training.numerics.scale.after(skipped=answer.overflowed)
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()

    @property
    def _engine(self) -> Engine:
        return self._runtime.engine

    def evaluate(self, dataset: Any, *, micro_batches: int | None = None) -> float:
        """Returns the mean loss over a map-style dataset in order (or its first `micro_batches`). Every worker must call it.

        The layers run in evaluation mode and without gradients. The last micro-batch may be smaller; it is weighted by its number of
        samples, or by its weight if the loss returns `(sum, weight)`. Random numbers of layers and samples follow from the seed and the
        place in the dataset: they are equal each time, on every layout.

        Raises:
            TrainerError: for data that is empty or has no random access.
        """
        data = EvaluationData.of(dataset, self.micro_batch_size, micro_batches, self._collate, self.seed)
        total, weight = self._steps.together(lambda: evaluated(self._model.root, data, self._engine.evaluate))
        if not weight:
            raise TrainerError(f"there is nothing to evaluate: the weights of the loss of all {data.count} micro-batches are 0")
        return total / weight

    def log(self, path: str | os.PathLike[str], **values: Any) -> None:
        """Appends `{"step": ..., **values}` to a file as a line of JSON, exactly once for each call, even if workers die.

        Every worker calls it in the loop body, with the same values if they must be exact: the job's agent writes the first that arrives.
        Under `if report.leader` a line is lost if the leader dies in the body. Lines of an earlier job, for steps that this one takes
        again, are replaced.

        Raises:
            TrainerError: outside a loop body, or for values without a JSON form.
        """
        if not self._runtime.amid:
            raise TrainerError("log() is called outside a loop body, but a line belongs to a step: call it in the body")
        self._job.send(self._numbers.record(path, self._runtime.handed, values))

    def after_step(self, f: AfterStep) -> AfterStep:
        """Registers `f(parameter, state)` to be called after every update, as a part of the step; can be used as a decorator.

        It runs on every owner after the optimizer's update, without gradients, once for each run of a trained parameter that is owned
        there (the whole tensor, for optimizers whose tensors are not cut). `parameter` is a flat tensor, to be changed in place; `state` is
        a dict for that run, whose `name` is the parameter's. What f keeps in the dict is state like the optimizer's: tensors of the
        parameter's shape are spread over workers, copied, moved and saved with it, and so are numbers. f runs again if its step does.

        Every worker registers the same functions, before the first step.

        Raises:
            TrainerError: if f does not treat each element separately, or draws random numbers; or if steps have been taken here.
        """
        if self._history.decided:
            raise TrainerError(f"{after.name_of(f)} is given to after_step after a step: give it before the first one, on every worker")
        for dtype in dict.fromkeys(self._model.dtype(vector.home, MASTER) for vector in self._model.vectors):
            after.check(f, dtype, self._model.spec.cut)
        self._optimizer.after.append(f)
        self._history.after.append(after.name_of(f))
        return f

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Registers objects that the loop body changes: counters, early stopping, samplers, metrics.

        Each has `state_dict()` and `load_state_dict()`, of numbers, strings, lists, dicts and small tensors or arrays. A worker that joins
        gets the states that match its first step, checkpoints contain them, and the next job loads them. They must be equal on every
        worker, which is checked in each step. States are loaded when objects are registered, and again when the loop begins. A step that is
        taken again is not yielded again, so objects are not reset.

        Every worker registers the same objects in the same order, before the first step.

        Raises:
            TrainerError: naming an object that cannot be stored; or if steps have been taken here.
        """
        if self._history.decided:
            names = ", ".join(type(each).__name__ for each in objects)
            raise TrainerError(f"{names} is registered after a step: register it before the first one, on every worker")
        self._history.registered.add(objects, self._model.root)

    def average(self, decay: float) -> None:
        """Keeps an exponential moving average of trained parameters: `average = decay * average + (1 - decay) * parameter` in each step.

        It begins with the parameters after the first step; `state_dict("average")` returns it. Every worker calls it before the first step.
        """
        if not 0.0 <= decay < 1.0:
            raise TrainerError(f"average(decay={decay}): the decay must be at least 0 and below 1")
        self.after_step(after.average(decay))

    def state_dict(self, state: str | None = None) -> dict[str, torch.Tensor]:
        """Returns the whole model's state_dict on every worker, layers of other workers included. Every worker must call it.

        With `state`, such as "average" or "exp_avg", that state replaces each trained parameter that has it. Tensors are copies.
        """
        self._check_alike()
        while True:
            found: list[dict[str, torch.Tensor]] = []

            self._steps.together(lambda found=found: self._collected(state, found), ends_together=False)
            told = self._steps.together(lambda found=found: self._engine.gather({"has": bool(found)}))
            if all(each["has"] for each in told):
                break
        if state is not None and not any(found[1:]):
            raise TrainerError(f"no parameter has a state {state!r}: neither the optimizer nor after_step keeps one of that name")
        whole = {name: tensor for each in found for name, tensor in each.items()}
        return self._model.state_dict(whole)

    def _collected(self, state: str | None, found: list[dict[str, torch.Tensor]]) -> bool:
        names = [PARAM] if state is None else [PARAM, state, after.PREFIX + state]
        found[:] = [self._engine.whole(name) for name in names]
        return True

    def digest(self) -> str:
        """Returns the hex SHA-256 of all parameters (in name order) and changing buffers. Every worker must call it, and gets it."""
        self._check_alike()
        return self._steps.together(lambda: self._engine.digest())

    def _check_alike(self) -> None:
        """Raises MismatchError if code behind the last loop has given workers different models."""
        told = self._steps.together(lambda: self._engine.gather({"worker": self._job.worker, **self._told()}))
        if (difference := changed_model.unlike({each["worker"]: each for each in told})) is not None:
            raise MismatchError(difference)

    def _told(self) -> changed_model.Told:
        """Returns what the other workers, or the agent, must know of this one's model behind its last loop."""
        changed = self._history.changed_behind[0]
        layers = self._engine.view.layout.layers_of(self._job.worker)
        since = None if self._steps.first is None else self._steps.first // self._updates
        return {"since": since, "model": changed_model.checksums(self._model, layers) if changed else None}

    def _returned(self, value: Any) -> None:
        self._steps.left(value)
        if self._job.leader and self._history.changed_behind[1]:
            _log.warning(_CHANGED)
        self._job.model = self._told()

    def statistics(self) -> list[dict[str, Any]] | None:
        """Returns statistics of each worker on the leader, None on the others. Every worker must call it."""
        found = self._steps.together(lambda: self._engine.gather(self._own_statistics()))
        return found if self.leader else None

    def _own_statistics(self) -> dict[str, Any]:
        return own_statistics(self._job.worker, self._engine, self._model, self._optimizer, self._checkpoints)

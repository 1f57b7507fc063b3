"""`Trainer`: what a train function uses. It turns a model, a loss, an optimizer and data into steps that are the same on every layout."""

from __future__ import annotations

import functools
import os
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from elastic.comm import gauge
from elastic.comm.network import Network
from elastic.engine import after, profile, randomness
from elastic.engine.after import AfterStep
from elastic.engine.data import batches, refuse_unseekable
from elastic.engine.decision import Apply
from elastic.engine.model import LayeredModel
from elastic.engine.modes import Modes
from elastic.engine.numerics import Numerics
from elastic.engine.partial import refuse_partial
from elastic.engine.probe import probe
from elastic.engine.stage import Loss
from elastic.engine.view_state import State, Training, initial_state
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import CheckpointDamaged, TrainerError
from elastic.host import facts as host
from elastic.layout.transfer import PARAM
from elastic.plan.workload import default_grains
from elastic.script import sources
from elastic.settings import fingerprint
from elastic.view import View
from elastic.worker import job as jobs
from elastic.worker.attributes import Attributes
from elastic.worker.beside import files_beside
from elastic.worker.checkpointing import Checkpoints
from elastic.worker.engine import Engine
from elastic.worker.history import History
from elastic.worker.inplace import InPlace
from elastic.worker.member import Member
from elastic.worker.metrics import Numbers
from elastic.worker.naming import Names, naming_of
from elastic.worker.resume_checks import TrainingRecord
from elastic.worker.survivor import Survivor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One committed step. `loss` is its mean, `lr` the first group's rate that it was taken with, `grad_norm` the norm before clipping.

    `tokens_per_second` is 0 where the model's input is not integer ids of shape (samples, tokens). `leader` is true on one worker.
    What is written where it is, is lost for a step in whose loop body the leader dies: `trainer.log` writes each step once.
    `stopped` says that the job was asked to stop and this step is its last, `skipped` why the step was passed over (`on_nonfinite=`).
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    tokens_per_second: float
    epoch: int
    workers: int
    layout: str
    leader: bool
    stopped: bool = False
    skipped: str | None = None


def told_to_the_job(run: Callable[[Trainer, int], Iterator[Report]]) -> Callable[[Trainer, int], Iterator[Report]]:
    """The job hears of an exception that ends the steps, also where a loop swallows it."""

    @functools.wraps(run)
    def told(self: Trainer, steps: int) -> Iterator[Report]:
        reports = run(self, steps)
        try:
            for report in reports:
                self._job.heard()
                yield report
        except GeneratorExit:
            raise
        except BaseException as error:
            self._job.raised(error)
            raise
        finally:
            reports.close()  # type: ignore[attr-defined]

    return told


class Trainer:
    """Trains a layered model on all workers of the running job; every worker builds the same one.

    Args:
        model: an `nn.Sequential`, or a list of layers in order; any other module is one layer.
        loss: `loss(output, micro_batch)` gives the micro-batch's mean loss, or `(sum, weight)`.
        optimizer: a fresh `torch.optim.Optimizer` over the model's parameters, or a function that makes one of them.
        data: a map-style dataset, or a function `batch(step, micro_batch)`. Of a tuple or list, the model gets the first element.
        batch_size, micro_batch_size: samples per step and per micro-batch; the second must divide the first.
        scheduler: a scheduler of that optimizer, or a function that makes one of it; stepped once per step. `ReduceLROnPlateau` is not:
            the loop's body calls `scheduler.step(metric)`, when it has one, on every worker, with the same metric (`evaluate` gives all
            the same). Its state is saved, and goes to workers that join.
        clip_norm: the largest L2 norm of the whole gradient.
        seed: keys the order of data, dropout and every other use of torch's, NumPy's and Python's generators inside layers.
        on_nonfinite: "raise" NonFinite where a loss or gradient is not finite, or the weights of a step's losses add up to nothing; or
            "skip" that step: it counts, changes nothing but the scheduler, and is named in `report.skipped`, the log and `result.skipped`.
        exact: refuse what would make bits depend on the layout (such as buffers that a forward changes, but for BatchNorm, which is exact).
        grains: parts of the batch that are summed on their own; by default the largest divisor of the micro-batches up to 16.
        autocast: run layers and loss under `torch.autocast` in this dtype; parameters, gradients and optimizer state keep theirs.
        checkpoint_activations: keep only layers' inputs and run them again in backward: all (True), or those for which `f(index, layer)`.
        collate: joins samples of a dataset, as a DataLoader's `collate_fn`.
        checkpoint: a directory that all hosts share, or a URL for fsspec, such as `s3://bucket/run`. The training goes on from the newest
            good checkpoint in it, if there is one, and saves the state behind its last step.
        every: saves after each so many steps as well, while training goes on.
        keep: how many of the newest checkpoints stay; all by default.
        checkpoint_files: files that lie beside the weights, by name, such as a tokenizer's: content (bytes or text), or a `pathlib.Path`.
            A model of Hugging Face has its `config.json` written anyway.
        names: what parameters are called in checkpoints: the module that the layers were taken from, whose names they then have; or a
            mapping or a function of names such as `3.attn.weight`. By default what the model's own `state_dict` calls them.

    Raises:
        TrainerError: if any of these cannot be trained; the message says what to do.
        CheckpointError: if there are checkpoints and none is good, or the newest is of another model.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
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
        checkpoint_activations: bool | Callable[[int, nn.Module], bool] = False,
        collate: Callable[[list[Any]], Any] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int | None = None,
        keep: int | None = None,
        checkpoint_files: Mapping[str, bytes | str | os.PathLike[str]] | None = None,
        names: Names | None = None,
    ) -> None:
        self._job = jobs.current()
        if self._job.trains:
            raise TrainerError(
                "train_fn makes a second Trainer, and a job has one, whose state workers that join go on from: train one model after the "
                "other with a call of elastic.run each, or give one Trainer both as one model, with a parameter group each"
            )
        self._modes = Modes(self._job.threads)
        micro_batches, grains = _cut_batch(batch_size, micro_batch_size, grains)
        _check_clip(clip_norm)
        if on_nonfinite not in ("raise", "skip"):
            raise TrainerError(f'on_nonfinite={on_nonfinite!r}: "raise" ends the job with such a step, "skip" passes over it')
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        self._batch = batches(data, batch_size=batch_size, micro_batch_size=micro_batch_size, seed=seed, collate=collate)
        self._collate = collate
        self._model = LayeredModel(model)
        parameters = [parameter for parameter in self._model.root.parameters() if parameter.requires_grad]
        if not parameters:
            raise TrainerError("the model has no trainable parameter")
        instance = _one_optimizer(optimizer, parameters)
        self._scheduler = _bind_scheduler(scheduler, instance)
        self._probed = probe(instance)
        self._model = LayeredModel(model, cut=self._probed.cut, exact=exact)
        self._model.running.statistics.watch()
        self._optimizer = ShardedOptimizer(instance, self._model, self._probed)
        self._checkpoints: Checkpoints | None = None
        self._naming = naming_of(self._model.root, names)
        if checkpoint is not None:
            record = TrainingRecord(
                optimizer=type(instance).__name__,
                scheduler="" if self._scheduler is None else type(self._scheduler).__name__,
                settings={
                    "batch_size": batch_size,
                    "micro_batch_size": micro_batch_size,
                    "seed": seed,
                    "samples": len(data) if isinstance(data, Sized) else None,
                },
                group_values=_group_values(instance),
            )
            files = files_beside(names if isinstance(names, nn.Module) else model, checkpoint_files or {})
            self._checkpoints = Checkpoints(self._job, checkpoint, every, self._model, self._optimizer, record, keep, files, self._naming)
        elif every is not None:
            raise TrainerError(f"every={every} says when to save, and checkpoint= where: give both")
        numerics = Numerics(seed=seed, autocast=autocast, checkpoint=_checkpointing(checkpoint_activations))
        self._network = Network(self._job.worker, secret=self._job.secret, host=self._job.host, directory=self._job.links)
        self._job.listen_on(self._network)
        self._training = Training(
            numerics=numerics,
            loss=loss,
            clip_norm=clip_norm,
            enter=self._modes.watched(self._job.enter),
            skips=on_nonfinite == "skip",
        )
        announcement = self._announcement()
        if self._checkpoints is not None:
            self._checkpoints.began_with(announcement["digest"])
        view = self._job.announce({**announcement, "micro_batches": micro_batches, "grains": grains})
        self._member = Member(self._job, self._network, self._model, self._optimizer, self._build, self._checkpoints)
        root = self._model.root
        history = History(self._optimizer, self._scheduler, Attributes(root), InPlace(root, instance))
        history.check(saved=checkpoint is not None)
        refuse_partial(root)
        self._survivor = Survivor(self._job, self._member, history, self._batch, self._step_scheduler)
        self._history, self._saved, self._saved_with = history, -1, ""
        self._numbers = Numbers()
        self._unfinished: int | None = None  # the loop of so many steps was left behind its last one, and its end is to come
        self._job.behind = self._left
        if view is None:
            if self._checkpoints is not None:
                self._checkpoints.join()
            self._survivor.join()
        else:
            try:
                state = None if self._checkpoints is None else self._checkpoints.begin(view, history, self._survivor)
            except CheckpointDamaged as error:
                self._survivor.found_without_state(view, error)
                return
            engine = self._build(view, state or initial_state(self._job.worker, self._model, self._optimizer, view))
            self._survivor.found(engine, lambda: self._network.install(view.epoch, view.attempt, view.members, engine.peers))

    def _announcement(self) -> dict[str, Any]:
        """What the others, and the planner, need to know of this worker; its settings must be those of all."""
        training, instance = self._training, self._optimizer.optimizer
        measures, parameters = self._job.profile, list(self._model.root.parameters())
        return {
            "address": self._network.address,
            "fingerprint": fingerprint(),
            "code": sources.to_json(sources.note_imported()),
            "model": self._model.spec.to_json(),
            "digest": self._model.digest(),
            "profile": profile.measure(self._model, training.loss, training.numerics, self._batch(0, 0)) if measures else None,
            "link": gauge.within_host() if measures else None,
            "state_bytes": self._probed.state_bytes,
            "base": max(0, host.anonymous_bytes() - _bytes(parameters)),
            "checkpoint": None if self._checkpoints is None else self._checkpoints.origin,
            "settings": {
                "batch_size": self.batch_size,
                "micro_batch_size": self.micro_batch_size,
                "seed": self.seed,
                "clip_norm": training.clip_norm,
                "autocast": str(training.numerics.autocast),
                "optimizer": type(instance).__name__,
                "groups": _group_values(instance),
                "scheduler": type(self._scheduler).__name__,
                "checkpoint": self._checkpoints is not None,
                "torch": self._modes.first,
                "names": self._naming.digest,
            },
        }

    def _build(self, view: View, state: State) -> Engine:
        return Engine(self._job.worker, self._model, view, self._network, self._optimizer, self._training, state)

    @property
    def leader(self) -> bool:
        """Whether this worker is the one to print, log and save; true on exactly one."""
        return self._job.leader

    @property
    def step(self) -> int:
        """The next step to take: the number of steps taken so far."""
        return self._history.step + 1

    @property
    def layout(self) -> str:
        """Such as `[0-4]x2 [5-9]x2`: the layers of each stage, and its number of workers."""
        return self._engine.view.plan.summary

    @property
    def schedule(self) -> str:
        """This worker's action list, such as `0F0 0F1 0B0 0B1`: stage, forward or backward, micro-batch."""
        return " ".join(map(str, self._engine.executor.actions))

    @told_to_the_job
    def run(self, steps: int) -> Iterator[Report]:
        """Takes steps until `steps` have been taken in all, and yields each one once, on every worker.

        As in a plain loop, the parameters are those of the yielded step, and step k + 1 is computed only when the loop asks for it: what
        the loop body sets acts on it. What is decided of a step holds for ever: where it has to be taken again after a loss it has the
        settings that it had, comes to the same bits and is not yielded again. Leaving the loop early leaves the parameters as they are;
        leaving it behind its last step is the same as running to its end.
        """
        self._finish()
        survivor = self._survivor
        survivor.handed_out()
        while True:
            survivor.catch_up()
            if survivor.step > steps:  # this worker has joined behind this loop, in a later one
                survivor.at("end", steps - 1)
                return
            self._history.registered.begin(warns=self.leader)
            decided = survivor.decision
            if survivor.unseen is not None:
                if survivor.settled():
                    yield from self._hand_out(survivor.handing_out(), steps)
            elif survivor.step >= steps or (decided is not None and decided.stop):
                if survivor.flush():
                    self._close(steps)
                    return
            elif survivor.pausing:
                if survivor.rest():
                    survivor.pause()
            else:
                self._take_step(final=survivor.step + 1 >= steps)

    def _take_step(self, *, final: bool) -> None:
        """Computes the next step and applies it; where members are lost meanwhile there may be another step to take first."""
        survivor, checkpoints = self._survivor, self._checkpoints
        message, due = None, False
        if checkpoints is not None:
            message, due = checkpoints.message(survivor.engine), checkpoints.due(self._history.step) and self._saved != self._history.step
            self._check_saved()
        answer = survivor.compute(message, save=due, final=final)
        if answer is None:
            return
        engine = survivor.engine
        if checkpoints is not None:
            checkpoints.heard(engine)
            if answer.save:
                survivor.saving()
                checkpoints.save(self._history.step, survivor, self._history)
        if survivor.engine is engine:  # else members were lost while a save began, and the step has to be computed again
            survivor.apply(answer)

    def save(self) -> None:
        """Saves the state behind the newest step, and returns when that is done or was given up, which `result.saves` tells.

        Every worker calls it, at the same place: as the last thing in a loop body, since what the body sets afterwards is not in it; or
        behind a loop that was left early, which is else saved when train_fn returns. Behind a loop that came to its end it is already.

        Raises:
            TrainerError: without `checkpoint=`, or before the first step.
        """
        if self._checkpoints is None:
            raise TrainerError("trainer.save() has no place to save to: give the Trainer checkpoint=")
        self._finish()
        survivor = self._survivor
        if survivor.amid:
            survivor.complete()
            self._save_now()
            self._saved_with = self._history.digest()
        elif survivor.begins:
            raise TrainerError("trainer.save() is called before the first step of this job: call it in a loop body, or behind a loop")

    def _save_now(self) -> None:
        step = self._history.step
        if self._checkpoints is not None and self._saved != step:
            self._checkpoints.save_last(step, self._survivor, self._history)
            self._saved = step

    def _check_saved(self) -> None:
        """Says so where a loop body has set something behind its `save`."""
        saved_with, self._saved_with = self._saved_with, ""
        if saved_with and self._saved == self._history.step and saved_with != self._history.digest():
            warnings.warn(
                f"the loop body of step {self._saved} has changed settings behind trainer.save(), and the checkpoint has those from "
                "before: let save() be the last thing in the body",
                stacklevel=2,
            )

    def _left(self, value: Any) -> None:
        """Behind `train_fn`, which returned `value`: where a loop was left early, its last step is saved as at the end of one.

        That takes all workers, so it is not done where the loop is left: nothing that is raised there would be heard of.
        """
        early = self._checkpoints is not None and self._survivor.amid and self._saved != self._history.step
        if self.leader and (early or self._unfinished is not None):  # whoever leads at the end, if this worker dies, may return nothing
            self._job.send({"type": "returned", "value": value})
        if self._unfinished is not None:
            self._finish()
        elif early:
            self._survivor.leaves = True
            self._survivor.complete()
            self._save_now()

    def _finish(self) -> None:
        """Takes part in the end of a loop that was left behind its last step: the others may have run to it, and wait there."""
        steps, self._unfinished = self._unfinished, None
        if steps is not None and self._survivor.amid:
            for _ in self.run(steps):
                pass

    def _together(self, collective: Callable[[], T], *, ends_together: bool = True) -> T:
        self._finish()
        return self._survivor.together(collective, ends_together=ends_together)

    def _close(self, steps: int) -> None:
        """Behind the last step: its state is saved, if this job has taken it."""
        step = self._history.step
        if step < steps and self._survivor.decision is not None:
            self._save_now()
        self._survivor.at("end", min(step, steps - 1))

    @property
    def _engine(self) -> Engine:
        return self._survivor.engine

    def _hand_out(self, answer: Apply, steps: int) -> Iterator[Report]:
        randomness.seed_all(self.seed, "loop", answer.step)  # so that the loop's own draws do not depend on the layout
        if answer.skipped is not None:  # every worker says so, as any may die; the agent counts it once
            self._job.send({"type": "skipped", "step": answer.step, "reason": answer.skipped})
        try:
            yield self._report(answer)
        except GeneratorExit:
            if self._survivor.amid and (answer.stop or answer.step + 1 >= steps):
                self._unfinished = steps
            raise
        self._survivor.handed_out()

    def _step_scheduler(self, answer: Apply) -> None:
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()

    def _report(self, answer: Apply) -> Report:
        seconds = self._history.seconds_of(answer.step)
        view = self._engine.view
        return Report(
            step=answer.step,
            loss=answer.loss,
            lr=answer.lr,
            grad_norm=answer.norm,
            samples_per_second=self.batch_size / seconds,
            tokens_per_second=answer.tokens / seconds,
            epoch=view.epoch,
            workers=len(view.members),
            layout=view.plan.summary,
            leader=self.leader,
            stopped=answer.stop,
            skipped=answer.skipped,
        )

    def evaluate(self, dataset: Any, *, micro_batches: int | None = None) -> float:
        """The mean loss over a map-style dataset in order (or its first `micro_batches`), without training. Every worker must call it.

        The layers run in evaluation mode and without gradients. The last micro-batch may be smaller; it weighs as much as its samples,
        or as its weight where the loss gives `(sum, weight)`. What layers and samples draw follows from the seed and their place in the
        dataset: the same each time, on every layout.

        Raises:
            TrainerError: for data that cannot be sought in, or that is empty.
        """
        refuse_unseekable(dataset)
        size = self.micro_batch_size
        count = -(-len(dataset) // size) if micro_batches is None else min(micro_batches, -(-len(dataset) // size))
        if count < 1:
            raise TrainerError("there is nothing to evaluate: the dataset is empty")
        collate = self._collate or torch.utils.data.default_collate
        samples = lambda i: range(i * size, min((i + 1) * size, len(dataset)))  # noqa: E731

        def load(micro_batch: int) -> Any:
            drawn = []
            for sample in samples(micro_batch):
                randomness.seed_all(self.seed, "evaluate", "sample", sample)
                drawn.append(dataset[sample])
            return collate(drawn)

        total, weight = self._together(lambda: self._evaluated(count, load, lambda i: len(samples(i)) / size))
        if not weight:
            raise TrainerError(f"there is nothing to evaluate: the weights of the loss of all {count} micro-batches are 0")
        return total / weight

    def _evaluated(self, count: int, load: Callable[[int], Any], share: Callable[[int], float]) -> tuple[float, float]:
        training = [(module, module.training) for module in self._model.root.modules()]
        self._model.root.eval()
        try:
            with randomness.kept():  # what the loop draws behind it does not depend on the layers that are here
                return self._engine.evaluate(count, load, share)
        finally:  # before anything else is done, such as a step that has to be taken again
            for module, mode in training:
                module.training = mode

    def log(self, path: str | os.PathLike[str], **values: Any) -> None:
        """Appends `{"step": ..., **values}` to a file, as a line of JSON: each step's once, whoever dies.

        Every worker calls it in the loop body, with the same values where they are to be exact: the first that arrives is written, by the
        job's agent. Under `if report.leader` a step is lost where the leader dies in its body. Lines of an earlier job, for steps that this
        one takes again, are replaced.

        Raises:
            TrainerError: outside of a loop body, or for values that are no JSON.
        """
        if not self._survivor.amid:
            raise TrainerError("trainer.log() is called outside of a loop body, and a line belongs to a step: call it in the body")
        self._job.send(self._numbers.record(path, self._survivor.handed, values))

    def after_step(self, f: AfterStep) -> AfterStep:
        """Has `f(parameter, state)` called behind every update, as a part of the step; can be used as a decorator.

        It runs on every owner behind the optimizer's update, without gradients, once for each run of a trained parameter that is owned
        there (the whole tensor, for optimizers whose tensors are not cut): a flat tensor, to be changed in place, and a dict of its own,
        whose `name` is the parameter's. What f keeps in that dict is state like the optimizer's: tensors of the parameter's shape are
        spread over workers, copied, moved and saved with it, numbers go along. Where a step is taken again, f is too.

        Every worker gives the same functions, before the first step.

        Raises:
            TrainerError: if f does not treat each element on its own, or draws random numbers; or if steps have been taken here.
        """
        if self._history.decided:
            raise TrainerError(f"{after.name_of(f)} is given to after_step behind a step: give it before the first one, on every worker")
        after.check(f, self._model.dtype(self._model.vectors[0].home), self._model.spec.cut)
        self._optimizer.after.append(f)
        self._history.after.append(after.name_of(f))
        return f

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Keeps objects of the loop's own, which its body changes: counters, early stopping, samplers, metrics.

        Each has `state_dict()` and `load_state_dict()`, of numbers, strings, lists, dicts and small tensors or arrays. A worker that joins
        gets their states to match the next step that it is given, checkpoints have them, and the next job goes on with them; they must be
        the same on every worker, which is checked in each step. They are loaded when they are registered, and again when the loop begins.
        A step that is taken again is not given to the loop again, so they are not put back.

        Every worker gives the same objects in the same order, before the first step.

        Raises:
            TrainerError: for what cannot be kept, naming it; or if steps have been taken here.
        """
        if self._history.decided:
            names = ", ".join(type(each).__name__ for each in objects)
            raise TrainerError(f"{names} is registered behind a step: register it before the first one, on every worker")
        self._history.registered.add(objects, self._model.root)

    def average(self, decay: float) -> None:
        """Keeps an exponential moving average of trained parameters: `average = decay * average + (1 - decay) * parameter` in each step.

        It begins with the parameters behind the first step; `state_dict("average")` gives it. Every worker calls it before the first step.
        """
        if not 0.0 <= decay < 1.0:
            raise TrainerError(f"average(decay={decay}): the decay is at least 0 and below 1")
        self.after_step(after.average(decay))

    def state_dict(self, state: str | None = None) -> dict[str, torch.Tensor]:
        """The whole model's state_dict, on every worker, which must all call it: also of layers that are not here.

        With `state`, such as "average" or "exp_avg", that state of each trained parameter stands in its place, where it has it.
        Tensors are copies.
        """
        while True:
            found: list[dict[str, torch.Tensor]] = []

            self._together(lambda found=found: self._collected(state, found), ends_together=False)
            told = self._together(lambda found=found: self._engine.gather({"has": bool(found)}))
            if all(each["has"] for each in told):
                break
        if state is not None and not any(found[1:]):
            raise TrainerError(f"no parameter has a state {state!r}: the optimizer keeps none of that name, and nor does after_step")
        whole = {name: tensor for each in found for name, tensor in each.items()}
        return self._model.state_dict(whole)

    def _collected(self, state: str | None, found: list[dict[str, torch.Tensor]]) -> bool:
        names = [PARAM] if state is None else [PARAM, state, after.PREFIX + state]
        found[:] = [self._engine.whole(name) for name in names]
        return True

    def digest(self) -> str | None:
        """Hex SHA-256 over the bytes of all parameters in name order, on the leader; None on the others. Every worker must call it."""
        digest = self._together(lambda: self._engine.digest())
        return digest if self.leader else None

    def statistics(self) -> list[dict[str, Any]] | None:
        """What each worker holds and has done, on the leader; None on the others. Every worker must call it."""
        found = self._together(lambda: self._engine.gather(self._own_statistics()))
        return found if self.leader else None

    def _own_statistics(self) -> dict[str, Any]:
        engine, worker = self._engine, self._job.worker
        owned = engine.view.layout.owned(worker)
        held = sum(flat.numel() * flat.element_size() for flat in [*self._model.flats.values(), *self._model.tied.values()])
        return {
            "worker": worker,
            "stage": engine.executor.pipe.stage,
            "layers": list(engine.view.layout.layers_of(worker)),
            "parameter_bytes": held,
            "owned_parameter_bytes": sum(interval.elements * self._model.dtype(layer).itemsize for layer, interval in owned),
            "optimizer_bytes": self._optimizer.state_bytes,
            "spare_bytes": engine.spares.bytes,
            "save_stalls": [] if self._checkpoints is None else self._checkpoints.stalls,
            "replica_bytes": engine.replicator.state_bytes,
            "replica_update_bytes": engine.replicator.update_bytes,
            "micro_batches": {str(engine.executor.pipe.stage): engine.executor.micro_batches_run},
            "micro_batches_in_flight": engine.executor.most_in_flight,
            "activation_bytes": engine.executor.most_in_flight
            * sum(engine.view.workload.layers[layer].activation_bytes for layer in engine.view.layout.layers_of(worker)),
            "gradient_buffer_bytes": engine.reducer.meter.peak + engine.reducer.total_bytes,
            "received_gradient_bytes": engine.reducer.received_bytes,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _cut_batch(batch_size: int, micro_batch_size: int, grains: int | None) -> tuple[int, int]:
    if batch_size < 1 or micro_batch_size < 1:
        raise TrainerError(f"batch_size ({batch_size}) and micro_batch_size ({micro_batch_size}) must be at least 1")
    micro_batches, rest = divmod(batch_size, micro_batch_size)
    if rest:
        raise TrainerError(
            f"a batch of {batch_size} samples cannot be cut into micro-batches of {micro_batch_size}: choose a multiple of it, such as "
            f"{max(1, micro_batches) * micro_batch_size} or {(micro_batches + 1) * micro_batch_size}"
        )
    if grains is None:
        return micro_batches, default_grains(micro_batches)
    if grains < 1 or micro_batches % grains:
        raise TrainerError(
            f"{micro_batches} micro-batches cannot be cut into {grains} grains of equal size: choose a divisor of {micro_batches}, "
            f"such as {default_grains(micro_batches)}"
        )
    return micro_batches, grains


def _group_values(optimizer: Optimizer) -> list[dict[str, str]]:
    """Each parameter group's settings, as text."""
    return [{name: repr(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_clip(clip_norm: float | None) -> None:
    if clip_norm is not None and not clip_norm > 0:
        raise TrainerError(f"clip_norm is {clip_norm}; it must be above 0, or None for no clipping")


def _one_optimizer(given: Any, parameters: list[nn.Parameter]) -> Optimizer:
    made = given if isinstance(given, Optimizer) or not callable(given) else given(parameters)
    if isinstance(made, Optimizer):
        return made
    if isinstance(made, list | tuple | dict):
        raise TrainerError(
            f"optimizer is a {type(made).__name__}, and a Trainer has one optimizer: give one with several parameter groups, which may "
            "have settings of their own (one optimizer of its own for each part of the model, as GANs have, is not supported)"
        )
    raise TrainerError(f"optimizer is a {type(made).__name__}: give a torch.optim.Optimizer, or a function that makes one of parameters")


def _bind_scheduler(scheduler: Any, optimizer: Optimizer) -> Any:
    if scheduler is None:
        return None
    bound = scheduler if hasattr(scheduler, "optimizer") else scheduler(optimizer)
    if getattr(bound, "optimizer", optimizer) is not optimizer:
        raise TrainerError("the scheduler belongs to another optimizer: make it of the one that is given to the Trainer")
    return bound


def _checkpointing(choice: bool | Callable[[int, nn.Module], bool]) -> Callable[[int, nn.Module], bool] | None:
    if choice is True:
        return lambda index, layer: True
    return choice if callable(choice) else None


__all__ = ["Report", "Trainer"]

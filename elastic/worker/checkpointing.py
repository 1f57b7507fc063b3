"""A Trainer's checkpoints: the one it begins from, periodic saves, and reloading when part of the state is lost from all memories."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Container, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from elastic.checkpoint.commit import new_token
from elastic.checkpoint.directory import collect, newest
from elastic.checkpoint.objects import open_store
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.retention import KeepChosen, KeepLast, RetentionPolicy, retire
from elastic.checkpoint.saver import Prepare, Saver, newest_epoch
from elastic.checkpoint.state import PARAM, Contents, Group, Spec
from elastic.checkpoint.store import Store
from elastic.engine.model import LayeredModel
from elastic.engine.shard import Scalars, Shard
from elastic.engine.view_state import ViewState
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import CheckpointDamaged, CheckpointError, TrainerError
from elastic.memory.tensors import copy
from elastic.recovery.checkpoint_fallback import Checkpoint
from elastic.view import View
from elastic.worker.directory_owner import DEAD_S, EXTRA, DirectoryOwner
from elastic.worker.engine import Engine
from elastic.worker.fallback import Restored
from elastic.worker.groups import plain_scheduler, readable_group
from elastic.worker.history import History
from elastic.worker.job import Job
from elastic.worker.loopsettings import Settings
from elastic.worker.naming import Naming, naming_of
from elastic.worker.plain_state import from_plain, to_plain
from elastic.worker.rate_limited import Rarely
from elastic.worker.restore import RestoredRun, form, numbers, persistent_buffers, restored_state, runs
from elastic.worker.resume_checks import TrainingRecord, changed_values, check_same_training, matched_groups
from elastic.worker.runtime import WorkerRuntime
from elastic.worker.savable_state import check_savable, empty_states
from elastic.worker.saving import Share, StatesToSave, base_of, contents_of, digest_of, merged, states_of, unchanged

_log = logging.getLogger(__name__)
_ROUND_S = 0.5

Exchange: TypeAlias = Callable[[Callable[[], list[Any]]], list[Any] | None]
"""Runs a collective; returns its result, or None if members were lost and the others do not run it again."""
_LAST_TRIES = 10


class Checkpoints:
    """One worker's checkpoints: founders begin from the newest good one in `directory`; the state is saved after each `every` steps.

    `every` None: only the end of the training is saved. `keep`: the number of newest ones to keep, None for all. `record` identifies the
    training. `files` are extra files. `naming` maps parameters to their names in checkpoints. Raises TrainerError, CheckpointError.

    `stalls` has two values for each save except the last: the seconds that it stopped this worker, and the part of them that copied its
    shards; the next step uses that copy as its previous copy.
    """

    def __init__(
        self,
        job: Job,
        directory: str | os.PathLike[str],
        every: int | None,
        model: LayeredModel,
        optimizer: ShardedOptimizer,
        record: TrainingRecord,
        keep: int | None = None,
        files: Mapping[str, bytes] | None = None,
        naming: Naming | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise TrainerError(f"every={every}: the number of steps between saves must be at least 1")
        self._job, self._model, self._optimizer, self._record = job, model, optimizer, record
        self._files, self._naming = files or {}, naming or naming_of(model.root)
        self._policies: list[RetentionPolicy] = [] if keep is None else [KeepLast(keep)]
        self._overtaken = Rarely()  # saves left out since the previous one had not finished
        self._store, self._every = open_store(directory), every
        self._owner = DirectoryOwner(self._store, job.secret)
        self._source: ElasticSource | None = newest(self._store)
        self._saver: Saver | None = None
        self._base: int | None = None
        self._epoch = 0
        self._known: str | None = None
        self._states: StatesToSave = {}
        self._buffers = [name for name, _ in persistent_buffers(model.root)]
        self.unreadable: set[str] = set()
        self.stalls: list[tuple[float, float]] = []
        check_savable(model, optimizer.probed.scalars, job.worker)

    @property
    def origin(self) -> str | None:
        """Names the checkpoint that founders begin from, None if there is none."""
        return None if self._source is None else f"{self._source.name} {self._source.manifest.order}"

    def began_with(self, digest: str) -> None:
        """Records the digest of the initial parameters that this worker's script made; called before `begin`."""
        self._record = replace(self._record, initial=digest)

    def join(self) -> None:
        """Joins a running job: the other workers have the state, so no checkpoint is read."""
        self._owner.join()
        self._begun(founder=False)

    def begin(self, view: View, history: History, runtime: WorkerRuntime) -> ViewState | None:
        """Reads the state that this founder begins with; None if there is no checkpoint yet.

        Raises:
            CheckpointDamaged: this worker's part of the newest checkpoint cannot be read: all members have to begin with an older one.
            CheckpointError: the newest checkpoint does not fit this training.
        """
        if self._store.private and len(view.workers) > 1:
            raise CheckpointError(
                f"{self._store.where('')}: this storage is private to a process, but the job has {len(view.workers)} workers: give a "
                "directory that all workers share"
            )
        source, self._source = self._source, None
        if source is None:
            self._begun(founder=True)
            return None
        with closing(source):
            self._naming.inward(source)
            self._check_training(source, warn=self._job.worker == view.coordinator)
            self._begun(founder=True)
            restored = self._read(view, source)
        settings = Settings(groups=restored.groups, scheduler=restored.scheduler, attributes=restored.attributes)
        history.begin(restored.state.step, settings)
        runtime.begin(restored.objects, source.name)
        return restored.state

    def newest(self) -> Checkpoint | None:
        """Returns the newest good checkpoint of this job, None if there is none: for members that have lost their state.

        Checkpoints that this worker could not read are skipped.
        """
        try:
            source = newest(self._store, only=self._is_own)
        except CheckpointError as error:
            warnings.warn(str(error), stacklevel=2)
            return None
        if source is None:
            return None
        with closing(source):
            return Checkpoint(order=source.manifest.order, name=source.name)

    def restore(self, view: View, checkpoint: Checkpoint) -> Restored:
        """Reads this worker's part in `view`. Raises CheckpointDamaged (and adds to `unreadable`), CheckpointError if it does not fit."""
        with closing(ElasticSource(self._store, checkpoint.name)) as source:
            if source.manifest.order != checkpoint.order:
                raise CheckpointError(f"{checkpoint.name} differs on worker {self._job.worker}: all hosts must share the directory")
            self._naming.inward(source)
            return self._read(view, source)

    def _read(self, view: View, source: ElasticSource) -> Restored:
        try:
            return self._restored(view, source)
        except CheckpointDamaged:
            self.unreadable.add(source.name)
            raise

    def _restored(self, view: View, source: ElasticSource) -> Restored:
        contents = source.contents
        if contents.step is None:
            raise CheckpointError(f"{source.name}: it does not record the step at which it was saved")
        extra = contents.extra.get(EXTRA, {})
        saved = [from_plain(group) for group in extra["groups"]] if "groups" in extra else [dict(g.settings) for g in contents.groups]
        sources = self._groups_of(source)
        groups: list[dict[str, Any]] = [{} if index is None else saved[index] for index in sources]
        scheduler = None if extra.get("scheduler") is None else from_plain(extra["scheduler"])
        order = [index for index in sources if index is not None]
        if scheduler is not None and self._record.scheduler and order != sorted(order):
            raise CheckpointError(
                f"{source.name} has its parameter groups in another order, but a scheduler identifies groups by position: give them in the "
                "checkpoint's order"
            )
        probed = self._optimizer.probed
        state = restored_state(self._job.worker, self._model, view, source, contents.step - 1, probed.scalars, probed.dtypes)
        attributes = {name: from_plain(value) for name, value in extra.get("attributes", {}).items()}
        return Restored(state=state, groups=groups, scheduler=scheduler, attributes=attributes, objects=extra.get("objects"))

    def _groups_of(self, source: ElasticSource) -> list[int | None]:
        """Returns the index of the checkpoint's group for each parameter group of the optimizer, None for a group without one."""
        groups = source.listed.groups
        names = self._optimizer.names()
        return matched_groups(source.name, [group.names for group in groups], names, self._model.frozen) if groups else [None] * len(names)

    def _check_training(self, source: ElasticSource, *, warn: bool) -> None:
        """Refuses another training's checkpoint, and warns (on one worker) of differences that are allowed."""
        saved = _record_of(source)
        same_trained = source.listed.frozen == frozenset(self._model.frozen)  # else the digests differ anyway
        own = self._record if same_trained else replace(self._record, initial=saved.initial)
        told = check_same_training(source.name, saved, own) + changed_values(source.name, saved, own, self._groups_of(source))
        for sentence in told if warn else ():
            warnings.warn(sentence, stacklevel=4)
        self._record = replace(self._record, initial=saved.initial or self._record.initial)
        self._owner.began_from(source.manifest.order)

    def _begun(self, *, founder: bool) -> None:
        if self._source is not None and not founder:
            self._source.close()
            self._source = None
        self._saver = Saver(self._store, self._job.worker, retain=self._retain, allowed=self._owner.may_save, tell=self._tell)
        self._base = newest_epoch(self._store) if founder else None
        if founder and self._job.leader:
            self._owner.claim()

    def _tell(self, step: int, reason: str | None) -> None:
        self._job.send({"type": "save", "step": step, "reason": reason})

    def _is_own(self, source: ElasticSource) -> bool:
        return source.name not in self.unreadable and self._owner.is_own(source)

    def _retain(self, store: Store) -> None:
        if self._policies:
            retire(store, self._policies)
        collect(store, older_than_s=DEAD_S, now=time.time())

    def keep_too(self, chosen: Callable[[], Container[int]]) -> None:
        """Keeps the checkpoints of steps that `chosen` returns, besides the newest ones. Another thread calls it."""
        if self._policies:
            self._policies.append(KeepChosen(chosen))

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of `step` steps that can be read."""
        try:
            source = newest(self._store, only=lambda source: source.manifest.step == step)
        except (CheckpointError, OSError):
            return False
        if source is not None:
            source.close()
        return source is not None

    def saved(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the parameters and buffers of the checkpoint of `step` steps, by the model's names, in host memory.

        Raises:
            CheckpointError: there is no such checkpoint, or it cannot be read here, or is damaged.
        """
        source = newest(self._store, only=lambda source: source.manifest.step == step)
        if source is None:
            raise CheckpointError(
                f"{self._store.where('')}: there is no checkpoint of {step} steps that can be read: it was removed or damaged, or its save "
                "has failed. The job's own state, as it is after the last step, is another checkpoint"
            )
        with closing(source):
            self._naming.inward(source)
            specs = {name: states[PARAM] for name, states in source.contents.tensors.items() if PARAM in states}
            return {name: source.read(name, PARAM, 0, spec.elements).view(spec.shape) for name, spec in specs.items()}

    def message(self, engine: Engine) -> Any:
        """Returns the receipt to send to the coordinator with the next READY round."""
        assert self._saver is not None
        if engine.view.epoch != self._epoch:
            self._saver.drop(left=engine.view.workers)
        return self._saver.receipt()

    def heard(self, engine: Engine) -> None:
        """Takes the receipts that the coordinator received in a READY round."""
        if self._saver is not None and engine.told:
            self._saver.take(engine.told, engine.view.workers)

    def due(self, step: int) -> bool:
        """Returns whether the state after `step` must be saved while training continues."""
        return self._saver is not None and self._every is not None and step >= 0 and (step + 1) % self._every == 0

    def save(self, step: int, runtime: WorkerRuntime, history: History) -> None:
        """Saves the state after `step` while training continues: it is exact on all workers, and none has applied the next step."""
        if self._saver is None:
            return
        began = time.perf_counter()
        shards = runtime.engine.copied()
        copying = time.perf_counter() - began
        if self._start(step, runtime, history, shards, runtime.attempt):
            self.stalls.append((time.perf_counter() - began, copying))

    def save_last(self, step: int, runtime: WorkerRuntime, history: History) -> None:
        """Returns when the state is saved, or saving failed. If members are lost during a save, the others save again.

        Members may learn of a loss at different places, so the number of exchanges depends only on values that all have received.
        """
        assert self._saver is not None
        for _ in range(_LAST_TRIES):
            self._finish(runtime)
            engine = runtime.engine
            started = self._start(step, runtime, history, None, runtime.together)
            self._finish(runtime)
            own = {"saved": self._saver.saved == step + 1, "steady": started and runtime.engine is engine}
            told = runtime.together(lambda own=own: runtime.engine.gather(own))
            if any(each["saved"] for each in told) or all(each["steady"] for each in told):
                return
        _log.warning("the state after %d steps is not saved: the members changed again and again", step + 1)

    def _start(
        self, step: int, runtime: WorkerRuntime, history: History, shards: list[tuple[Shard, Scalars]] | None, exchange: Exchange
    ) -> bool:
        """Begins a save; `shards` is a copy of the owned shards, None if they no longer change. Returns False if the save is left out."""
        saver, engine = self._saver, runtime.engine
        assert saver is not None
        given = engine.owned if shards is None else shards
        told = self._shares(step, runtime, history, states_of(given, self._model.spec), exchange)
        if told is None:
            if self._job.leader:
                _log.warning("the state after %d steps is not saved%s: the members changed", step + 1, " yet" if shards is None else "")
            return False
        coordinator = told[engine.view.workers.index(engine.view.coordinator)]
        if any(each.busy for each in told):
            if self._job.leader:
                if (silent := self._overtaken.due()) is not None:
                    more = f" (and {silent} more since the last such line: a save takes longer than `every` steps)" if silent else ""
                    _log.warning("the state after %d steps is not saved: the previous save has not finished%s", step + 1, more)
                self._tell(step + 1, "the previous save had not finished")
            if not coordinator.busy:
                saver.drop()  # the coordinator has no save, so the others must not wait for its directory
            return False
        self._epoch, self._base = engine.view.epoch, base_of(told)
        role = "live" if shards is None else "previous"
        saver.start(
            self._prepare(step, engine, given, history, amid=runtime.amid),
            step=step + 1,
            epoch=self._base + engine.view.epoch,
            token=coordinator.token,
            members=engine.view.workers,
            layout={"summary": engine.view.plan.summary},
            release=_nothing if shards is None else engine.previous_copies.lend(),
            verify=unchanged(given, engine.rest.checksums_of(role, step), self._job.worker, self._model.spec),
        )
        return True

    def _shares(self, step: int, runtime: WorkerRuntime, history: History, states: StatesToSave, exchange: Exchange) -> list[Share] | None:
        """Exchanges shares between all members, and the states to save. Returns the shares, None if the members changed.

        The states themselves are exchanged only if they differ from those of the last exchange.
        """
        assert self._saver is not None
        engine = runtime.engine
        share = Share(
            view=engine.view.epoch,
            states=digest_of(states),
            known=self._known,
            busy=self._saver.busy,
            token=new_token(self._owner.own.tag),
            base=self._base,
            hint=newest_epoch(self._store) if self._base is None else self._base,
        )
        given = exchange(lambda: runtime.engine.gather(share.to_json()))
        if given is None:
            return None
        told = [Share.from_json(each) for each in given]
        views = {each.view for each in told}
        known = digest_of([each.states for each in told])
        if any(each.known != known for each in told):  # decided by values that all have, so survivors call the same collectives
            all_states = exchange(lambda: runtime.engine.gather({"view": share.view, "states": states}))
            if all_states is None:
                self._known = None
                return None
            views |= {each["view"] for each in all_states}
            self._known, self._states = known, merged(each["states"] for each in all_states)
        if runtime.engine is not engine or history.step != step or views != {engine.view.epoch}:
            self._known = None
            return None
        return told

    def _prepare(self, step: int, engine: Engine, shards: list[tuple[Shard, Scalars]], history: History, *, amid: bool) -> Prepare:
        """Returns the function with which the saving thread prepares contents and runs; values besides shards are captured now.

        `amid`: inside a loop body, or after a loop was left in it, the present states of registered objects are saved.
        """
        view, model, names, files = engine.view, self._model, self._optimizer.names, self._files
        states = {**empty_states(model.spec), **self._states}
        copies = view.coordinator == self._job.worker  # the others need only names, shapes and dtypes
        running = model.running.at(step) if model.running.names else {}
        named = [name for name in self._buffers if not model.is_placed(name)]
        buffers = {name: running[name] if name in running else model.root.get_buffer(name).detach() for name in named}
        if copies:
            buffers = {name: copy(buffer) for name, buffer in buffers.items()}
        rest = {**{name: model.parameter(name).detach() for name in model.frozen if not model.is_placed(name)}, **buffers}
        forms = {name: form(tensor) for name, tensor in rest.items()}
        kept = history.settings()
        groups = kept.groups
        extra = {
            "groups": [to_plain(group) for group in groups],
            "scheduler": None if kept.scheduler is None else plain_scheduler(kept.scheduler),
            "attributes": {name: to_plain(value) for name, value in kept.attributes.items()},
            "settings": dict(self._record.settings),
            "record": self._record.to_json(),
            "job": self._owner.own.job,
        }
        if (objects := history.registered.read() if amid else history.registered.states) is not None:
            extra["objects"] = objects

        def prepare() -> tuple[Contents, list[RestoredRun]]:
            contents = contents_of(
                {p.name: p.shape for layer in model.spec.layers for p in layer.parameters},
                states,
                scalars={name: values for _, scalars in shards for name, values in numbers(scalars, model.spec.cut).items()},
                rest={name: Spec(shape=shape, dtype=dtype) for name, (shape, dtype) in forms.items()},
                groups=[Group(names=each, settings=readable_group(group)) for each, group in zip(names(), groups, strict=True)],
                frozen=model.frozen,
                buffers=frozenset(self._buffers),
                step=step + 1,
                extra={EXTRA: extra},
                files=files,
            )
            own = [run for shard in shards for run in runs(*shard, model.spec)]
            if copies:
                own += [RestoredRun(name, PARAM, 0, tensor.reshape(-1)) for name, tensor in rest.items()]
            return self._naming.outward(contents, own)

        return prepare

    def _finish(self, runtime: WorkerRuntime) -> None:
        """Waits for the running save, or gives it up if the members changed; all members call it."""
        saver = self._saver
        assert saver is not None
        waiting = True
        while waiting:
            own = {
                "view": runtime.engine.view.epoch,
                "coordinates": self._job.worker == runtime.engine.view.coordinator,
                "over": saver.wait(_ROUND_S),
                "saved": saver.receipt(),
                "busy": saver.busy,
                "worker": self._job.worker,
            }
            told = runtime.together(lambda own=own: runtime.engine.gather(own))
            saved = {each["worker"]: each["saved"] for each in told if each["saved"] is not None}
            saver.take(saved, runtime.engine.view.workers)
            lost = any(each["receipt"] is None for each in saved.values())  # a member's part failed: the others must not wait for it
            given_up = lost or not any(each["busy"] for each in told if each["coordinates"])
            changed = len({each["view"] for each in told}) > 1
            waiting = not given_up and not changed and not all(each["over"] for each in told)
        saver.drop(left=runtime.engine.view.workers)
        saver.finish()


def _record_of(source: ElasticSource) -> TrainingRecord:
    extra = source.manifest.contents.extra.get(EXTRA, {})
    return TrainingRecord.from_json({"settings": extra.get("settings", {}), **extra.get("record", {})})


def _nothing() -> None:
    """Releases nothing: the saved memory does not change."""

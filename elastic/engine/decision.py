"""Decides how a step ends, from the READY messages of all members. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.comm.rounds import Payload
from elastic.engine.loss_scale import LossScale
from elastic.engine.norms import clip_factor, norm
from elastic.engine.reduction import tree_sum
from elastic.engine.stage import LossLeaf
from elastic.errors import TrainerError
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """The coordinator's decision once all members are ready: how to finish step `step`. It also commits the step before.

    `lr` is the first group's learning rate. `stop` ends the job after the step, `pause` stops for a change of members, `save` begins a save
    of the step before. `differ`: the members' settings differ, so the step must not be applied; `unlike`: digests of copies of the
    state that must be equal differ, so nobody may go on with them; `keep`: they do not, and all keep their previous copies to go back to.
    `refusal` is the reason why no member may
    apply the step; `skipped` the reason why all skip it: the step counts and changes nothing. `again`: all must compute the step again with
    every generator keyed. `scale`: the gradients were computed with losses times this; `overflowed`: they are not finite, and a smaller one
    is tried in the next step. `stray`: which workers have another sample than the others, in words; `alike`: all that have
    one; `unproven`: all of these came later, and none was ever compared with one that has been there since the job began.
    """

    step: int
    loss: float
    denominator: float
    norm: float
    clip: float
    tokens: int
    stop: bool
    pause: bool
    again: bool
    lr: float = 0.0
    save: bool = False
    differ: bool = False
    unlike: bool = False
    keep: bool = False
    refusal: str | None = None
    skipped: str | None = None
    scale: float = 1.0
    overflowed: bool = False
    stray: str | None = None
    alike: tuple[int, ...] = ()
    unproven: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields by name; all are numbers and strings, or a list of them."""
        return {name: getattr(self, name) for name in self.__slots__} | {"alike": [*self.alike]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Apply:
        """The inverse of `to_json`."""
        return cls(**{**fields, "alike": tuple(fields["alike"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Requests of one member with its READY: to stop or pause after the step, or to `save` the one before it, which `no_save` forbids.

    `saved` is any JSON for the coordinator. `settings` is a digest that must be equal on all members. `sample`: whether this
    member has been there since the job began, or was compared with one that is known to be right, and a checksum of what all
    members must compute alike, which some may leave out.
    """

    settings: str = ""
    stop: bool = False
    pause: bool = False
    save: bool = False
    no_save: bool = False
    saved: Any = None
    sample: tuple[bool, str] | None = None


def decide(
    step: int,
    ready: Mapping[int, Payload],
    workload: Workload,
    *,
    clip_norm: float | None,
    lr: float,
    skips: bool,
    scale: LossScale | None = None,
) -> Apply:
    """Decides how a step ends, from the READY message of every member."""
    factor, overflowed = (1.0 if scale is None else scale.value), False
    leaves = _in_order([row for said, _ in ready.values() for row in said["leaves"]], workload.micro_batches)
    bad = next((leaf for leaf in leaves if not math.isfinite(leaf.value)), None)
    samples = {worker: said["sample"] for worker, (said, _) in ready.items() if said["sample"] is not None}
    denominator = tree_sum([leaf.weight for leaf in leaves], workload.grains)
    refusal = None
    skipped = None
    squares = [arrays["squares"] for _, arrays in ready.values() if arrays]
    total = norm(squares) / (denominator * factor) if denominator > 0 else math.nan
    if bad is not None:
        refusal = f"the loss of step {step}, micro-batch {bad.micro_batch} is {bad.value}: nothing of this step was applied"
    elif not denominator > 0:
        refusal = f"the weights of the loss of step {step} add up to {denominator}: nothing of this step was applied"
    elif not math.isfinite(total) and scale is not None and scale.can_shrink:
        skipped, overflowed = f"the gradient of step {step} is not finite with the loss scale {factor:g}, which is halved", True
    elif not math.isfinite(total):
        refusal = f"the gradient of step {step} is not finite, though its loss is: nothing of this step was applied"
    if refusal is not None and skips:
        refusal, skipped = None, refusal
    return Apply(
        step=step,
        loss=tree_sum([leaf.value for leaf in leaves], workload.grains) / denominator if denominator > 0 else math.nan,
        denominator=denominator,
        norm=total,
        clip=clip_factor(total, clip_norm),
        tokens=sum(leaf.tokens for leaf in leaves),
        stop=any(said["stop"] for said, _ in ready.values()),
        pause=any(said["pause"] for said, _ in ready.values()),
        lr=lr,
        again=any(said["drew"] for said, _ in ready.values()),
        differ=len({said["settings"] for said, _ in ready.values()}) > 1,
        save=any(said["save"] for said, _ in ready.values()) and not any(said["no_save"] for said, _ in ready.values()),
        refusal=refusal,
        skipped=skipped,
        scale=factor,
        overflowed=overflowed,
        stray=_stray(samples),
        alike=tuple(sorted(samples)),
        unproven=bool(samples) and not any(proven for proven, _ in samples.values()),
    )


def _stray(samples: Mapping[int, tuple[bool, str]]) -> str | None:
    """Returns the workers with another sample than most of those that are known to be right, or than most of all if none is.

    If two samples are as frequent, that of the worker with the lowest number counts: nothing shows who is right.
    """
    proven = [found for _, (known, found) in sorted(samples.items()) if known] or [found for _, (_, found) in sorted(samples.items())]
    usual = max(dict.fromkeys(proven), key=proven.count, default=None)
    strays = sorted(worker for worker, (_, found) in samples.items() if found != usual)
    return f"worker{'s' * (len(strays) > 1)} {', '.join(map(str, strays))}" if strays else None


def rows(leaves: Sequence[LossLeaf]) -> list[list[Any]]:
    return [[leaf.micro_batch, leaf.value, leaf.weight, leaf.tokens] for leaf in leaves]


def added(sums: tuple[float, float], ready: Mapping[int, Payload]) -> Payload:
    total, weight = sums
    for _, value, share, _ in sorted(row for said, _ in ready.values() for row in said["leaves"]):
        total, weight = total + value, weight + share
    return {"total": total, "weight": weight}, None


def _in_order(rows: list[list[Any]], micro_batches: int) -> list[LossLeaf]:
    leaves = sorted((LossLeaf(micro_batch=m, value=v, weight=w, tokens=t) for m, v, w, t in rows), key=lambda leaf: leaf.micro_batch)
    if [leaf.micro_batch for leaf in leaves] != list(range(micro_batches)):
        raise TrainerError(f"losses of micro-batches {[leaf.micro_batch for leaf in leaves]} arrived, instead of 0 to {micro_batches - 1}")
    return leaves

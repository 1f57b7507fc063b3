"""Sorts what `job.prepare` was given, in any order: models, optimizers, schedulers and data; and returns it in the same form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from elastic.errors import TrainerError


@dataclass(slots=True, kw_only=True)
class Sorted:
    """The arguments by role. `form` has them in the order in which they are returned; lists of them are kept as lists."""

    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    data: Any = None
    form: list[Any] = field(default_factory=list)

    def returned(self, replaced: Callable[[Any], Any]) -> tuple[Any, ...]:
        """Returns the arguments as they were given, each replaced."""
        return tuple(type(each)(map(replaced, each)) if _is_group(each) else replaced(each) for each in self.form)


def _is_scheduler(value: Any) -> bool:
    return isinstance(getattr(value, "optimizer", None), Optimizer) and callable(getattr(value, "step", None))


def _is_group(value: Any) -> bool:
    """Returns whether this is a list or tuple of models, of optimizers or of schedulers. Other lists may be data."""
    if type(value) not in (list, tuple) or not value:
        return False
    return any(all(map(check, value)) for check in (_is_model, _is_optimizer, _is_scheduler))


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer)


def sort(given: Sequence[Any], model: Any, optimizer: Any, data: Any, scheduler: Any) -> Sorted:
    """Sorts positional arguments by what they are, and adds those that are named.

    Raises:
        TrainerError: naming what is missing, given twice, or of the wrong kind.
    """
    found, others = Sorted(form=list(given)), []
    for each in (item for value in given for item in (value if _is_group(value) else [value])):
        if _is_model(each):
            found.models.append(each)
        elif _is_optimizer(each):
            found.optimizers.append(each)
        elif _is_scheduler(each):
            found.schedulers.append(each)
        else:
            others.append(each)
    for value, role, kinds in ((model, "model", found.models), (optimizer, "optimizer", found.optimizers)):
        if value is not None:
            kinds.extend(_named(value, role))
            found.form.append(value)
    others += [] if data is None else [data]
    found.form += [] if data is None else [data]
    if scheduler is not None:
        found.schedulers += scheduler if type(scheduler) in (list, tuple) else [scheduler]
        found.form.append(scheduler)
    _check(found, others)
    found.data = others[0]
    return found


def _named(value: Any, role: str) -> list[Any]:
    values = list(value) if type(value) in (list, tuple) else [value]
    check, advice = {
        "model": (_is_model, "give the nn.Module that the loop's body calls, or a list of several"),
        "optimizer": (_is_optimizer, "give a torch.optim.Optimizer over the model's parameters, or a list of several"),
    }[role]
    if wrong := [each for each in values or [value] if not check(each)]:
        raise TrainerError(f"the {role} is a {type(wrong[0]).__name__}: {advice}")
    return values


def _check(found: Sorted, others: Sequence[Any]) -> None:
    kinds = ", ".join(type(each).__name__ for each in found.form)
    call = f"job.prepare was given ({kinds})"
    if not found.models:
        raise TrainerError(f"{call}, of which none is a model: give the nn.Module that the loop's body calls")
    if not found.optimizers:
        raise TrainerError(f"{call}, of which none is an optimizer: give a torch.optim.Optimizer over the model's parameters")
    if len(others) != 1:
        what = "has no data" if not others else f"may have {len(others)} data sets ({', '.join(type(each).__name__ for each in others)})"
        raise TrainerError(
            f"{call}, and {what}: give one dataset, DataLoader or function batch(step, micro_batch), besides models, optimizers and "
            "schedulers. Data for evaluation needs no prepare: read it by a loop of your own where loader.report is not None"
        )

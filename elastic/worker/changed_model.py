"""What code behind the last loop has made of the model, compared between workers.

A worker that joined later may lack a variable that this code uses, such as the best weights so far, and so have put other values into the
model than others. After the last step nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elastic.memory.raw import checksum_of

if TYPE_CHECKING:
    from elastic.engine.model import LayeredModel

Told = dict[str, Any]
"""`since`: the first step that a worker has had, None if it had none. `model`: a checksum of each layer that it holds, by index, as its
code has changed it; None if it has changed nothing."""


def checksums(model: LayeredModel, layers: Iterable[int]) -> dict[str, str]:
    """Returns checksums of the parameters of these layers, and of those that several layers share."""
    held = set(layers)
    names: dict[str, list[str]] = {}
    for name in model.names:
        layer = model.layer_of(name)
        if layer is None or layer in held:
            names.setdefault("shared" if layer is None else str(layer), []).append(name)
    return {layer: checksum_of(map(model.bytes_of, each)) for layer, each in names.items()}


def unlike(told: Mapping[int, Told], leader: int | None = None) -> str | None:
    """Returns what is wrong with the models of these workers; None if they are alike.

    The `leader`, if it is given, may have changed its own alone: to save it in another form, say.
    """
    changed = [worker for worker, each in told.items() if each["model"] is not None]
    if not changed or changed == [leader]:
        return None
    rest = [worker for worker in told if worker not in changed]
    if rest:
        return _said(f"{_listed(changed, told)} changed the model, and {_listed(rest, told)} did not")
    for layer in sorted({layer for each in told.values() for layer in each["model"]}):
        groups: dict[str, list[int]] = {}
        for worker, each in told.items():
            if layer in each["model"]:
                groups.setdefault(each["model"][layer], []).append(worker)
        if len(groups) > 1:
            first, second, *_ = sorted(groups.values(), key=len)
            return _said(f"{_listed(first, told)} gave it other values than {_listed(second, told)}")
    return None


def unproven(told: Mapping[int, Told]) -> str | None:
    """Returns a warning if workers have changed the model of which none has been there since the first step."""
    changed = [worker for worker, each in told.items() if each["model"] is not None]
    if not changed or any(told[worker]["since"] == 0 for worker in changed):
        return None
    return (
        f"code behind the last loop has changed the model on {_listed(changed, told)}. If it uses a variable that the loop sets, such as "
        f"the best weights so far, these lack what it had before, and nothing shows whether the values are right. {ADVICE}"
    )


ADVICE = (
    "Keep the best weights by best = loader.keep_best() before the loop, best.update(value) and best.load(), or other values in an object "
    "given to loader.register_for_checkpointing"
)


def _said(what: str) -> str:
    return (
        f"workers have different models behind the last loop: {what}. The code there uses a variable that the loop sets, such as the best "
        f"weights so far, and a worker that joins does not have its earlier values. {ADVICE}. The job's own state, and its newest "
        "checkpoint, are those of the last step"
    )


def _listed(workers: Sequence[int], told: Mapping[int, Told]) -> str:
    named = [f"{worker}{_since(told[worker]['since'])}" for worker in workers]
    return f"worker{'s' if len(named) > 1 else ''} {', '.join(named)}"


def _since(step: int | None) -> str:
    if step is None:
        return " (there since after the last step)"
    return f" (there since step {step})" if step else ""

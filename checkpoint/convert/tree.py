"""A training checkpoint as nested dicts, as torch users save it: where model and optimizer are in it, and what else it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from elastic.checkpoint.stored import is_tensor
from elastic.errors import CheckpointError

Path = tuple[str | int, ...]

MODELS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net")
OPTIMIZERS = ("optimizer", "optim", "optimizer_state_dict", "optimizer_state", "optim_state_dict", "optimizer_states", "optimizer_0")
STEPS = ("step", "global_step", "steps", "iteration", "iter")
SPELLING = "spelling"
"""The key among the extra values that says which keys model and optimizer had."""


def element(tree: Any, path: Sequence[str | int]) -> Any:
    """What is at a path; CheckpointError if nothing is."""
    for key in path:
        try:
            tree = tree[key]
        except (LookupError, TypeError) as error:
            raise CheckpointError(f"there is nothing at {'.'.join(map(str, path))}") from error
    return tree


def place(tree: Any, path: Sequence[str | int], value: Any) -> None:
    """Puts a value at a path and makes dicts and lists on the way, as torch's DCP does."""
    at = tree
    for key, following in pairwise(path):
        fresh: Any = [] if isinstance(following, int) else {}
        if isinstance(at, list):
            index = _extend(at, key)
            at[index] = fresh if at[index] is None else at[index]
            at = at[index]
        else:
            at = at.setdefault(key, fresh)
        if not isinstance(at, dict | list):
            raise CheckpointError(f"{'.'.join(map(str, path))} is inside of a value")
    if isinstance(at, list):
        at[_extend(at, path[-1])] = value
    else:
        at[path[-1]] = value


def _extend(items: list[Any], index: Any) -> int:
    if not isinstance(index, int) or not 0 <= index < 1 << 20:
        raise CheckpointError(f"a list has the index {index!r}")
    items.extend([None] * (index + 1 - len(items)))
    return index


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where model and optimizer are; None if there is none. `flattened`: the optimizer's keys are `state.NAME.STATE`."""

    model: Path | None
    optimizer: Path | None
    flattened: bool = False


def _looks_like_model(value: Any) -> bool:
    return isinstance(value, Mapping) and any(is_tensor(item) for item in value.values())


def _optimizer_form(value: Any) -> bool | None:
    """True: flattened keys; False: nested ones; None: no optimizer."""
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("param_groups"), list) and isinstance(value.get("state", {}), Mapping):
        return False
    keys = [key for key in value if isinstance(key, str)]
    if any(key.startswith("param_groups.") for key in keys) and all(not k.startswith("state.") or k.count(".") > 1 for k in keys):
        return True
    return None


def _candidates(tree: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[Path, Any]]:
    for key, value in tree.items():
        if key in names:
            yield (key,), value
        elif isinstance(value, Mapping):
            yield from (((key, inner), item) for inner, item in value.items() if inner in names)


def _only(found: Sequence[Path], what: str) -> Path | None:
    if len(found) > 1:
        raise CheckpointError(
            f"there are several {what}: {', '.join('.'.join(map(str, path)) for path in found)}; drop all but one by a rule"
        )
    return found[0] if found else None


def find(tree: Mapping[str, Any]) -> Found:
    """Model and optimizer in a tree. Raises CheckpointError where there are several of one kind."""
    optimizers: list[tuple[Path, bool]] = []
    for path, value in [((), tree), *_candidates(tree, OPTIMIZERS)]:
        items = [((*path, index), item) for index, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
        optimizers += [(at, form) for at, item in items if (form := _optimizer_form(item)) is not None]
    optimizer = _only([path for path, _ in optimizers], "optimizers")
    models = [path for path, value in _candidates(tree, MODELS) if _looks_like_model(value)]
    if not models and any(is_tensor(value) for key, value in tree.items() if not (optimizer == () and str(key).startswith("state."))):
        models = [()]
    return Found(model=_only(models, "models"), optimizer=optimizer, flattened=bool(optimizers and optimizers[0][1]))


def _without(tree: Any, paths: Sequence[Path]) -> Any:
    heads = {path[0] for path in paths if len(path) == 1}
    if isinstance(tree, list):
        rest = [item for index, item in enumerate(tree) if index not in heads]
        return rest or None
    kept = {}
    for key, value in tree.items():
        inner = [path[1:] for path in paths if len(path) > 1 and path[0] == key]
        value = _without(value, inner) if inner else value
        if key not in heads and not (inner and not value):
            kept[key] = value
    return kept


def rest(tree: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """What is neither model nor optimizer."""
    kept = _without(tree, [path for path in (found.model, found.optimizer) if path])
    if found.model == ():
        kept = {key: value for key, value in kept.items() if not is_tensor(value)}
    if found.optimizer == ():
        kept = {
            key: value
            for key, value in kept.items()
            if not str(key).startswith(("state.", "param_groups.")) and key not in ("state", "param_groups")
        }
    return kept


def without(value: Any, drops: Callable[[str], bool], where: str = "") -> Any:
    """A value of nested dicts without the entries whose path, with dots, is to be left out."""
    if isinstance(value, list):
        return [without(item, drops, f"{where}{index}.") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {key: without(item, drops, f"{where}{key}.") for key, item in value.items() if not drops(f"{where}{key}")}


def step_of(extra: Mapping[str, Any]) -> int | None:
    """The number of steps taken, if a usual key says it."""
    for where in (extra, extra.get("train_state"), extra.get("trainer_state")):
        if isinstance(where, Mapping):
            for key in STEPS:
                if type(where.get(key)) is int:
                    return where[key]
    return None

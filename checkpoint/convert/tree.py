"""Finds model, optimizer and other values in a training checkpoint of nested dicts, as torch users save it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from elastic.checkpoint.stored import is_tensor
from elastic.errors import CheckpointError

Path = tuple[str | int, ...]

MODELS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net")
OPTIMIZERS = ("optimizer", "optim", "optimizer_state_dict", "optimizer_state", "optim_state_dict", "optimizer_states", "optimizer_0")
STEPS = ("step", "global_step", "global_steps", "steps", "iteration", "iter")
SPELLING = "spelling"
"""The key among the extra values for the keys that model and optimizer had."""


def element(tree: Any, path: Sequence[str | int]) -> Any:
    """Returns the value at a path. Raises CheckpointError if there is none."""
    for key in path:
        try:
            tree = tree[key]
        except (LookupError, TypeError) as error:
            raise CheckpointError(f"there is nothing at {'.'.join(map(str, path))}") from error
    return tree


def place(tree: Any, path: Sequence[str | int], value: Any) -> None:
    """Puts a value at a path, and makes dicts and lists on the way, as torch's DCP does."""
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
            raise CheckpointError(f"{'.'.join(map(str, path))} is inside another value")
    if isinstance(at, list):
        at[_extend(at, path[-1])] = value
    else:
        at[path[-1]] = value


def _extend(items: list[Any], index: Any) -> int:
    if not isinstance(index, int) or not 0 <= index < 1 << 20:
        raise CheckpointError(f"a list has the invalid index {index!r}")
    items.extend([None] * (index + 1 - len(items)))
    return index


Drops = Callable[[str], bool]
"""Returns whether a rule leaves out the value at a path, written with dots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeParts:
    """The paths of model and optimizer; None if there is none. `flattened`: the optimizer's keys are `state.NAME.STATE`.

    left: optimizers that are left out. loose: models, if there are several and that is not an error; their tensors are named by path.
    """

    model: Path | None
    optimizer: Path | None
    flattened: bool = False
    left: tuple[Path, ...] = ()
    loose: tuple[Path, ...] = ()


def dotted(path: Sequence[str | int]) -> str:
    """Returns a path as rules name it, with dots."""
    return ".".join(map(str, path))


def _keep_all(_path: str) -> bool:
    """Drops nothing: the default for `Drops`."""
    return False


def _looks_like_model(value: Any) -> bool:
    return isinstance(value, Mapping) and any(is_tensor(item) for item in value.values())


def _optimizer_form(value: Any) -> bool | None:
    """Returns True for flattened keys, False for nested ones, None if the value is not an optimizer."""
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


def _several(found: Sequence[Path], what: str) -> str:
    names = [dotted(path) for path in found]
    advice = f"drop = ['{re.escape(names[-1])}']"
    return f"there are several {what}: {', '.join(names)}; drop all but one by a rule, such as {advice}"


def find(tree: Mapping[str, Any], drops: Drops = _keep_all, unread: list[str] | None = None) -> TreeParts:
    """Finds model and optimizer in a tree, without what rules drop; the name `optimizer` drops every optimizer.

    Raises CheckpointError if there are several of one kind; with `unread`, the message is added there instead.
    """
    kept = lambda path: not any(drops(dotted(path[: end + 1])) for end in range(len(path)))  # noqa: E731
    optimizers: list[tuple[Path, bool]] = []
    for path, value in [((), tree), *_candidates(tree, OPTIMIZERS)]:
        items = [((*path, index), item) for index, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
        optimizers += [(at, form) for at, item in items if (form := _optimizer_form(item)) is not None and kept(at)]
    left: tuple[Path, ...] = ()
    if drops("optimizer") or len(optimizers) > 1:
        left = tuple(path for path, _ in optimizers)
        if not drops("optimizer"):
            _say(_several(left, "optimizers"), unread)
        optimizers = []
    models = [path for path, value in _candidates(tree, MODELS) if _looks_like_model(value) and kept(path)]
    rooted = () in left or any(path == () for path, _ in optimizers)
    if not models and any(is_tensor(value) for key, value in tree.items() if not (rooted and str(key).startswith("state."))):
        models = [()]
    loose: tuple[Path, ...] = ()
    if len(models) > 1:
        _say(_several(models, "models"), unread)
        loose, models = tuple(models), []
    optimizer, flattened = optimizers[0] if optimizers else (None, False)
    return TreeParts(model=models[0] if models else None, optimizer=optimizer, flattened=flattened, left=left, loose=loose)


def _say(text: str, unread: list[str] | None) -> None:
    if unread is None:
        raise CheckpointError(text)
    unread.append(text)


def spelled(path: Path | None, drops: Drops) -> list[str | int] | None:
    """Returns a path after rules have dropped values: later items of lists have moved up."""
    if path is None:
        return None
    before = [index for index in range(path[-1]) if drops(dotted((*path[:-1], index)))] if path and isinstance(path[-1], int) else []
    return [*path[:-1], path[-1] - len(before)] if before else list(path)


def rest(tree: Mapping[str, Any], found: TreeParts, drops: Drops = _keep_all) -> dict[str, Any]:
    """Returns everything except model and optimizer, without what rules drop."""
    taken = {path for path in (found.model, found.optimizer, *found.left, *found.loose) if path}
    kept = _rest({key: tree[key] for key in tree}, (), taken, drops)
    if found.model == ():
        kept = {key: value for key, value in kept.items() if not is_tensor(value)}
    if found.optimizer == () or () in found.left:
        kept = {
            key: value
            for key, value in kept.items()
            if not str(key).startswith(("state.", "param_groups.")) and key not in ("state", "param_groups")
        }
    return kept


def _rest(value: Any, path: Path, taken: set[Path], drops: Drops) -> Any:
    """Returns a container without taken or dropped values, and without containers that held only taken values."""
    if not isinstance(value, dict | list):
        return value
    kept = []
    for key, item in enumerate(value) if isinstance(value, list) else value.items():
        at = (*path, key)
        if at in taken or drops(dotted(at)):
            continue
        inner = _rest(item, at, taken, drops)
        if not any(one[: len(at)] == at for one in taken) or inner:
            kept.append((key, inner))
    return [item for _, item in kept] if isinstance(value, list) else dict(kept)


def take_out(tree: Any, path: Path) -> None:
    """Removes the value at a path, and dicts that become empty; items of lists become None, so that others keep their places."""
    inner = tree[path[0]]
    if len(path) > 1:
        take_out(inner, path[1:])
    if len(path) == 1 or (isinstance(inner, dict) and not inner):
        if isinstance(tree, list):
            tree[path[0]] = None
        else:
            del tree[path[0]]


def tensors_in(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Returns every tensor of nested dicts and lists, by path."""
    if is_tensor(value):
        return [(path, value)]
    if not isinstance(value, dict | list):
        return []
    entries = enumerate(value) if isinstance(value, list) else value.items()
    return [found for key, item in entries for found in tensors_in(item, (*path, key))]


def step_of(extra: Mapping[str, Any]) -> int | None:
    """Returns the number of steps taken, if it is under one of the usual keys."""
    for where in (extra, extra.get("train_state"), extra.get("trainer_state")):
        if isinstance(where, Mapping):
            for key in STEPS:
                if type(where.get(key)) is int:
                    return where[key]
    return None

"""Interprets a tree of nested dicts from any format as a source, and makes the tree that a target writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from elastic.checkpoint.convert.jsonable import decode, encoded
from elastic.checkpoint.convert.optimizer import SCALARS, Optimizer, read_optimizer, scalar_tensor, setting
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.tree import SPELLING, TreeParts, dotted, element, find, place, rest, spelled, step_of, take_out, tensors_in
from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.state import PARAM, Contents, Source, Spec
from elastic.checkpoint.stored import Files, ReadableTensor, Strided, is_tensor
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """A source with tensors in files."""

    format: str
    contents: Contents
    tensors: Mapping[tuple[str, str], ReadableTensor]
    files: Files
    check: Callable[[], str]

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Reads a run, flat."""
        return checked(self.tensors, name, state, start, stop).run(start, stop)

    def verify(self) -> str:
        """Reads everything, and returns what was checked, in words."""
        return self.check()

    def watch(self, on_read: Callable[[int], None]) -> None:
        """Calls `on_read` with the bytes of each read from now on."""
        self.files.on_read = on_read

    def close(self) -> None:
        """Closes the files."""
        self.files.close()


def checked(tensors: Mapping[tuple[str, str], ReadableTensor], name: str, state: str, start: int, stop: int) -> ReadableTensor:
    """Returns the tensor. Raises CheckpointError if it does not exist, or the run is not in it."""
    found = tensors.get((name, state))
    if found is None:
        raise CheckpointError(f"there is no {state} of {name}")
    if not 0 <= start <= stop <= found.spec.elements:
        raise CheckpointError(f"{state} of {name} has {found.spec.elements} elements; {start} to {stop} were requested")
    return found


def ties_of(model: Mapping[str, ReadableTensor]) -> dict[str, str]:
    """Returns the names of tensors at the same place of the same file as an earlier tensor, with that one's name."""
    seen: dict[Any, str] = {}
    ties = {}
    for name, value in model.items():
        if isinstance(value, Strided) and value.spec.elements:
            place = (value.path, value.offset, value.spec, value.strides, value.conjugate, value.negative)
            first = seen.setdefault(place, name)
            if first != name:
                ties[name] = first
    return ties


def interpret(
    tree: Mapping[str, Any], *, rules: Rules, found: TreeParts | None = None
) -> tuple[Contents, dict[tuple[str, str], ReadableTensor]]:
    """Returns a tree's contents and tensors, without what the rules drop. Raises CheckpointError with a value that cannot be kept.

    With `rules.lenient`, such values are listed in `Contents.unread` instead.
    """
    unread: list[str] | None = [] if rules.lenient else None
    try:
        found = find(tree, rules.drops, unread) if found is None else found
        return _interpret(tree, rules, found, unread)
    except RecursionError as error:
        raise CheckpointError("a value of the checkpoint contains itself, or is nested too deeply") from error


def _interpret(
    tree: Mapping[str, Any], rules: Rules, found: TreeParts, unread: list[str] | None
) -> tuple[Contents, dict[tuple[str, str], ReadableTensor]]:
    inside = {} if found.model is None else element(tree, found.model)
    if found.model == () and (found.optimizer == () or () in found.left):
        inside = {key: value for key, value in inside.items() if not str(key).startswith(("state.", "param_groups"))}
    prefix = "".join(f"{part}." for part in found.model or ())
    drops = lambda name: rules.drops(name) or rules.drops(prefix + name)  # noqa: E731
    everything = {str(name): value for name, value in inside.items() if is_tensor(value)}
    model = {name: value for name, value in everything.items() if not drops(name)}
    others = rest(tree, found, rules.drops)
    model |= _moved(tree, found, others, rules, model)
    ties = ties_of(model)
    params = {name: value for name, value in model.items() if name not in ties}
    optimizer = Optimizer()
    if found.optimizer is not None and not any(rules.drops(what) for what in ("optimizer", dotted(found.optimizer))):
        known = _trainable({name: value for name, value in everything.items() if name not in ties_of(everything)})
        state = element(tree, found.optimizer)
        try:
            optimizer = read_optimizer(state, flattened=found.flattened, model=known, order=rules.order, drops=drops)
            _untie(optimizer, ties, params)
        except CheckpointError as error:
            if unread is None:
                raise
            optimizer = Optimizer()
            unread.append(f"{dotted(found.optimizer) or 'optimizer'}: {error}")
    extra = encoded(others, "", unread)
    if found.model:
        others = {str(key): value for key, value in inside.items() if not is_tensor(value) and not drops(str(key))}
        for key, value in encoded(others, "", unread).items():
            place(extra, (*found.model, key), value)
    extra[SPELLING] = {"model": spelled(found.model, rules.drops), "optimizer": spelled(found.optimizer, rules.drops)}
    contents = _contents(params, _trainable(params), optimizer, ties, extra)
    return replace(contents, unread=tuple(unread or ())), _tensors(params, optimizer)


def _moved(
    tree: Mapping[str, Any], found: TreeParts, others: dict[str, Any], rules: Rules, model: Mapping[str, ReadableTensor]
) -> dict[str, ReadableTensor]:
    """Returns tensors outside the model that become part of it, by path: those of several models, and those that a rename names.

    The renamed ones are removed from `others`. A rename must begin with the tensor's top key, so that a pattern that matches any name
    does not move, for example, a generator's state.
    """
    loose = {dotted(path): value for at in found.loose for path, value in tensors_in(element(tree, at), at)}
    renamed: dict[str, ReadableTensor] = {}
    for path, value in tensors_in(others):
        name, key = dotted(path), str(path[0])
        rule = next((rule for rule in rules.renames if rule.apply(name) is not None), None)
        if rule is not None and rule.pattern.startswith((key, re.escape(key))):
            renamed[name] = value
            take_out(others, path)
    if twice := sorted(set(renamed) & set(model)):
        raise CheckpointError(f"a rule moves {twice[0]} into the model, which has a tensor of this name already")
    return {name: value for name, value in loose.items() if not rules.drops(name)} | renamed


def _trainable(params: Mapping[str, ReadableTensor]) -> dict[str, Spec]:
    return {name: value.spec for name, value in params.items() if dtype_of(value.spec.dtype).is_floating_point}


def _untie(optimizer: Optimizer, ties: Mapping[str, str], params: Mapping[str, ReadableTensor]) -> None:
    for name in [*optimizer.tensors, *(name for group in optimizer.groups for name in group.names)]:
        if name in ties:
            raise CheckpointError(f"the optimizer has states of {name}, which is tied to {ties[name]}")
        if params and name not in params:
            raise CheckpointError(f"the optimizer has a parameter {name}, which the model does not have; rename one of them by a rule")


def _tensors(params: Mapping[str, ReadableTensor], optimizer: Optimizer) -> dict[tuple[str, str], ReadableTensor]:
    tensors = {(name, PARAM): value for name, value in params.items()}
    return tensors | {(name, state): value for name, states in optimizer.tensors.items() for state, value in states.items()}


def _contents(
    params: Mapping[str, ReadableTensor], trainable: Mapping[str, Spec], optimizer: Optimizer, ties: dict[str, str], extra: dict[str, Any]
) -> Contents:
    names = list(dict.fromkeys([*params, *optimizer.tensors]))
    tensors = {name: ({PARAM: params[name].spec} if name in params else {}) for name in names}
    for name, states in optimizer.tensors.items():
        tensors[name] |= {state: value.spec for state, value in states.items()}
    grouped = {name for group in optimizer.groups for name in group.names}
    return Contents(
        tensors=tensors,
        scalars=optimizer.scalars,
        groups=tuple(optimizer.groups),
        ties=ties,
        frozen=frozenset(name for name in trainable if grouped and name not in grouped),
        buffers=frozenset(name for name in params if name not in trainable),
        step=step_of(extra),
        extra=extra,
    )


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of the source that is to be written."""

    name: str
    state: str
    spec: Spec


def tree_of(source: Source, *, model: str, optimizer: str, numbered: bool) -> tuple[dict[str, Any], tuple[str | int, ...]]:
    """Returns the tree to write, and the optimizer's path in it. `numbered`: parameters have numbers, as in optimizers' own state dicts."""
    contents = source.contents
    spelling = contents.extra.get(SPELLING) or {}
    at, opt = spelling.get("model") or [model], spelling.get("optimizer") or [optimizer]
    if spelling and spelling.get("model") == [] and spelling.get("optimizer") is None:
        at = []
    tree: dict[str, Any] = {}
    params = {name: Leaf(name, PARAM, states[PARAM]) for name, states in contents.tensors.items() if PARAM in states}
    params |= {name: params[target] for name, target in contents.ties.items()}
    if at:
        place(tree, at, params)
    else:
        tree |= params
    if contents.groups:
        place(tree, opt, _optimizer(contents, numbered))
    for key, value in contents.extra.items():
        if key != SPELLING:
            _merge(tree, key, decode(value))
    if contents.step is not None and step_of(contents.extra) is None:
        tree.setdefault("step", contents.step)
    return tree, tuple(opt)


def _merge(tree: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(tree.get(key), dict) and isinstance(value, dict):
        for inner, item in value.items():
            _merge(tree[key], inner, item)
    elif key in tree:
        raise CheckpointError(f"the extra value {key!r} has the same key as the model, the optimizer or another value")
    else:
        tree[key] = value


def _optimizer(contents: Contents, numbered: bool) -> dict[str, Any]:
    names = [name for group in contents.groups for name in group.names]
    stray = sorted((set(contents.scalars) | {name for name, states in contents.tensors.items() if set(states) - {PARAM}}) - set(names))
    if stray:
        raise CheckpointError(f"{stray[0]} has optimizer states but is in no group: torch's optimizers cannot hold them")
    keys: dict[str, Any] = {name: index if numbered else name for index, name in enumerate(names)}
    states: dict[Any, dict[str, Any]] = {}
    for name in names:
        values: dict[str, Any] = {}
        for state, value in contents.scalars.get(name, {}).items():
            values[state] = scalar_tensor(value) if state in SCALARS and isinstance(value, float) else value
        values |= {state: Leaf(name, state, spec) for state, spec in contents.tensors.get(name, {}).items() if state != PARAM}
        if values:
            states[keys[name]] = values
    groups = []
    for group in contents.groups:
        settings = {key: setting(key, value) for key, value in group.settings.items()}
        named = {"param_names": list(group.names)} if numbered else {}
        groups.append({**settings, "params": [keys[name] for name in group.names], **named})
    return {"state": states, "param_groups": groups}

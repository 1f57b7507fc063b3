"""The public API as text: `python -m tests.packaging.public_api` writes it to `public_api.txt`, with which a test compares it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import elastic
from elastic.worker.plain.best import Best
from elastic.worker.plain.loader import Loader

_OF_THE_LOADER = (
    "average batch_size dataset digest epochs after_step keep_best log register_for_checkpointing report save state_dict statistics"
)
_FOR_USERS = {
    "Job": ("leader", "prepare", "clip_grad_norm_", "weighted"),
    "Loader": tuple(_OF_THE_LOADER.split()),
    "Best": ("update", "load"),
}
"""Classes that users are given, and do not make: the members that they may use, besides plain attributes."""
_GIVEN = (Loader, Best)
"""Of these, those that `elastic` does not export."""
PINNED = Path(__file__).with_name("public_api.txt")


def described() -> str:
    """Every name of `elastic`, with parameters of functions and methods, fields of dataclasses, and exit codes of errors."""
    lines = [line for name in sorted(elastic.__all__) for line in _lines(name, getattr(elastic, name))]
    lines += [line for value in _GIVEN for line in _lines(value.__name__, value)]
    return "\n".join([*lines, *_errors()]) + "\n"


def _lines(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"class {name}"
        yield from _members(value, _FOR_USERS.get(name))
    elif callable(value):
        yield f"def {name}{_signature(value)}"
    elif inspect.ismodule(value):
        yield f"module {name}"
    else:
        yield f"{name}: {type(value).__name__}"


def _members(owner: type, used: tuple[str, ...] | None) -> Iterator[str]:
    if is_dataclass(owner):
        for each in fields(owner):
            yield f"    {each.name}: {each.type}"
    elif used is None and "__init__" in vars(owner):
        yield f"    def __init__{_signature(vars(owner)['__init__'])}"
    for name in sorted(used or (name for name in dir(owner) if not name.startswith("_"))):
        value = inspect.getattr_static(owner, name)
        if isinstance(value, property):
            yield f"    property {name}"
        elif inspect.isfunction(value):
            yield f"    def {name}{_signature(value)}"


def _signature(function: Any) -> str:
    """Names, kinds and defaults of parameters; annotations may become more precise."""
    found = inspect.signature(function)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _errors() -> Iterator[str]:
    for name, value in vars(elastic.errors).items():
        if inspect.isclass(value) and value.__module__ == elastic.errors.__name__:
            code = f", exit code {value.exit_code}" if issubclass(value, elastic.errors.ElasticError) else ""
            yield f"error {name}({', '.join(base.__name__ for base in value.__bases__)}){code}"


if __name__ == "__main__":
    PINNED.write_text(described())

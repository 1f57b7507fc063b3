"""Types of values that cross a layer boundary: dicts and tuples with names keep theirs, such as the `ModelOutput` of transformers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.errors import TrainerError


@dataclass(frozen=True, slots=True)
class Named:
    """A dict of a class of its own, or a tuple with named fields: the class, and its fields' structures by name."""

    cls: type
    fields: dict[str, Any]

    def build(self, fields: Mapping[str, Any]) -> Any:
        """A value of the class with these fields."""
        return self.cls(**fields)

    @property
    def path(self) -> str:
        """Where the class is found by another process: `module:qualified.name`."""
        return f"{self.cls.__module__}:{self.cls.__qualname__}"


def named_fields(value: Any) -> dict[str, Any] | None:
    """The fields of a value whose class is to be kept; None for all others."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, dict) and type(value) is not dict and all(isinstance(name, str) for name in value):
        return dict(value)
    return None


def found_class(path: str) -> type:
    """The class that `Named.path` names.

    Raises:
        TrainerError: if there is none, or it is neither a dict nor a tuple with named fields.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise TrainerError(
            f"a {path} came over a layer boundary, and this worker cannot import that class ({error}): "
            "define it at the top level of a module"
        ) from error
    if not (isinstance(found, type) and (issubclass(found, dict) or (issubclass(found, tuple) and hasattr(found, "_fields")))):
        raise TrainerError(f"a {path} came over a layer boundary, which is neither a dict nor a tuple with named fields")
    return found


def takes_keywords(call: Callable[..., Any], names: Mapping[str, Any]) -> bool:
    """Whether `call(**values)` is meant for a dict of these names, as in `model(**batch)`.

    So it is if the names are those of parameters, and no parameter that has no default would be missing. A module whose one parameter
    is a dict, or that takes anything, gets the dict itself.
    """
    if not names or not all(isinstance(name, str) for name in names):
        return False
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return False
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = by_name.keys() & names.keys()
    return bool(known) and needed <= names.keys() and (anything or names.keys() <= by_name.keys())

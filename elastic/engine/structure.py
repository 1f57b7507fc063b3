"""Classes of values that cross a layer boundary: subclasses of dict and named tuples are rebuilt, such as `ModelOutput` of transformers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.errors import TrainerError


@dataclass(frozen=True, slots=True)
class Named:
    """A subclass of dict, or a tuple with named fields: the class, and the structure of each field by name."""

    cls: type
    fields: dict[str, Any]

    def build(self, fields: Mapping[str, Any]) -> Any:
        """Returns an instance of the class with these fields."""
        return self.cls(**fields)

    @property
    def path(self) -> str:
        """The import path by which another process finds the class: `module:qualified.name`."""
        return f"{self.cls.__module__}:{self.cls.__qualname__}"


def named_fields(value: Any) -> dict[str, Any] | None:
    """Returns the fields of a value whose class must be kept; None for any other value."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, dict) and type(value) is not dict and all(isinstance(name, str) for name in value):
        return dict(value)
    return None


def found_class(path: str) -> type:
    """Returns the class at a `Named.path`.

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
    """Returns whether a dict with these names is to be passed as keyword arguments, as in `model(**batch)`.

    It is if at least one name is a parameter's, the call accepts all names, and every parameter without a default is among them. Otherwise
    the module gets the dict itself, for example if its one parameter is a dict or it takes only `**kwargs`.
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

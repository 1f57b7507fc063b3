"""The source code of the user's modules. A job runs the code that it began with, even if the files are edited while it runs.

When a job starts, each worker announces the digests of the user's modules that it has imported. The fork server then reads these files, and
workers that it forks later import them from its memory (`frozen`). Any other module that they import is compared when they announce.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_INSTALLED = ("/site-packages/", "/dist-packages/")
_OURS = f"{Path(__file__).parents[1]}/"
_STANDARD = f"{sysconfig.get_path('stdlib')}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A module's file. `package`: it is the `__init__.py` of a package."""

    path: str
    digest: str
    package: bool


_imported: dict[str, SourceFile] = {}
_frozen: dict[str, tuple[SourceFile, bytes]] = {}
_others: dict[str, ModuleType] = {}  # modules that are not the user's: examining thousands of them each time is slow


def note_imported() -> dict[str, SourceFile]:
    """Returns the user's imported modules by name, each with its file's digest at the first call of this function after the import."""
    for name, module in list(sys.modules.items()):
        if name in _imported or _others.get(name) is module:
            continue
        path = own_file(module)
        if path is None:
            _others[name] = module
        else:
            with suppress(OSError):
                content = _frozen[name][1] if name in _frozen else Path(path).read_bytes()
                _imported[name] = SourceFile(path=path, digest=_digest(content), package=hasattr(module, "__path__"))
    return dict(_imported)


def to_json(sources: Mapping[str, SourceFile]) -> dict[str, list[Any]]:
    """Returns the sources as JSON: `{name: [path, digest, package]}`."""
    return {name: [source.path, source.digest, source.package] for name, source in sources.items()}


def freeze(modules: Mapping[str, Sequence[Any]]) -> None:
    """Keeps these modules (as `to_json` returns them) in memory, except those whose files no longer have the digest."""
    for name, (path, digest, package) in modules.items():
        with suppress(OSError):
            content = Path(path).read_bytes()
            if _digest(content) == digest:
                _frozen[name] = SourceFile(path=path, digest=digest, package=package), content
    _find_frozen()


def contents() -> dict[str, tuple[str, str, bool, bytes]]:
    """Returns the user's imported modules with their sources, for `keep` in another process: path, digest, package and content by name.

    Those whose files have changed since the import are left out.
    """
    found = {}
    for name, source in note_imported().items():
        with suppress(OSError):
            content = _frozen[name][1] if name in _frozen else Path(source.path).read_bytes()
            if _digest(content) == source.digest:
                found[name] = (source.path, source.digest, source.package, content)
    return found


def keep(modules: Mapping[str, tuple[str, str, bool, bytes]]) -> None:
    """Keeps modules in memory, as `contents` returns them: this process imports them from there."""
    for name, (path, digest, package, content) in modules.items():
        _frozen[name] = SourceFile(path=path, digest=digest, package=package), content
    _find_frozen()


def frozen(name: str) -> ModuleSpec | None:
    """Returns the spec to import a kept module, None if it is not kept."""
    if name not in _frozen:
        return None
    source, content = _frozen[name]
    places = [str(Path(source.path).parent)] if source.package else None
    loader = _FrozenLoader(name, source.path, content)
    return importlib.util.spec_from_file_location(name, source.path, loader=loader, submodule_search_locations=places)


def changed(here: Mapping[str, Sequence[Any]], there: Mapping[str, Sequence[Any]]) -> str | None:
    """Returns the file of a module that two workers have imported with different contents, None if there is none."""
    return next((here[name][0] for name in here if name in there and here[name][1] != there[name][1]), None)


def file_digest(path: str) -> str | None:
    """Returns the digest of a file's content, as `SourceFile` has it; None if it cannot be read."""
    with suppress(OSError):
        return _digest(Path(path).read_bytes())
    return None


def own_file(module: ModuleType | None) -> str | None:
    """Returns the file of a user's module; None if the module is installed, Python's or this package's."""
    path = getattr(module, "__file__", None)
    return path if isinstance(path, str) and not path.endswith((".so", ".pyc")) and is_own(path) else None


def is_own(path: str) -> bool:
    """Whether a source file is the user's: not installed, Python's, this package's, or made up, as `<string>` is."""
    return "/" in path and not any(part in path for part in _INSTALLED) and not path.startswith((_OURS, _STANDARD))


def is_ours(path: str) -> bool:
    """Whether a source file is one of this package."""
    return path.startswith(_OURS)


def _find_frozen() -> None:
    if _frozen and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return frozen(fullname)


class _FrozenLoader(SourceFileLoader):
    """Compiles the given content, and ignores the file and its bytecode cache."""

    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._content, self.path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

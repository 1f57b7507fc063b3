"""Names a train function so that another process can import it, and imports it there.

A name is `module:qualified.name`, or `path.py:qualified.name` for a function of the script itself; a script without `.py` is named by its
absolute path. `path.py:__main__` is the script as a whole, which runs as Python runs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from elastic.errors import TrainFunctionError
from elastic.script.sources import frozen, own_file

MAIN_MODULE = "__mp_main__"
"""The name that multiprocessing gives to an imported script: children that a worker spawns find the script's functions under it."""

WHOLE = "__main__"
"""What is named of a script that runs as a whole."""

_PARSERS, _WRONG = ("argparse", "click", "typer"), 2  # what they exit with for wrong arguments

_ADVICE = "workers are other processes and import it by name: define it with `def` at the top level of a module or script file"


def name_of(train_fn: Callable[..., Any] | str, argument_count: int = 0) -> str:
    """Returns the name under which a worker finds `train_fn`.

    Raises TrainFunctionError if there is none, or if the function does not take the arguments.
    """
    if isinstance(train_fn, str):
        return _checked_name(train_fn)
    qualified = getattr(train_fn, "__qualname__", None)
    if inspect.isbuiltin(train_fn):
        raise TrainFunctionError(f"train_fn is {qualified}, a builtin function of Python or of an extension; {_ADVICE}")
    if not callable(train_fn) or qualified is None:
        raise TrainFunctionError(f"train_fn is a {type(train_fn).__name__}, not a function; {_ADVICE}")
    if "<lambda>" in qualified:
        raise TrainFunctionError(f"train_fn is a lambda; {_ADVICE}")
    if "<locals>" in qualified:
        raise TrainFunctionError(f"train_fn {qualified} is defined inside another function; {_ADVICE}")
    if _attribute(sys.modules.get(train_fn.__module__), qualified) is not train_fn:
        raise TrainFunctionError(f"{train_fn.__module__}.{qualified} is not train_fn but another object of this name; {_ADVICE}")
    _refuse_unrun(train_fn, qualified)
    call_arguments(train_fn, None, (None,) * argument_count)
    return f"{_module_name(train_fn.__module__)}:{qualified}"


def load(name: str) -> Callable[..., Any]:
    """Imports the function called `name`. A script runs without its `if __name__ == "__main__"` part.

    Raises TrainFunctionError if module, file or function do not exist; what the user's own code raises passes through.
    """
    place, _, qualified = name.rpartition(":")
    if qualified == WHOLE:
        return _whole(Path(place))
    module = _load_script(Path(place)) if _is_path(place) else _load_module(place)
    function = _attribute(module, qualified)
    if not callable(function):
        raise TrainFunctionError(f"{place} has no function {qualified}")
    _refuse_unrun(function, qualified)
    return function


def _refuse_unrun(function: Callable[..., Any], qualified: str) -> None:
    """Refuses a function whose call does not run its body: async functions and generators."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TrainFunctionError(f"train_fn {qualified} is an async function, and calling it runs nothing: define it with a plain `def`")
    if inspect.isgeneratorfunction(function):
        raise TrainFunctionError(
            f"train_fn {qualified} is a generator (it has a `yield`), and calling it runs nothing: return the result, and use trainer.log "
            "for values of each step"
        )


def check_hidden(modules: Mapping[str, str]) -> None:
    """Raises TrainFunctionError if one of `modules` (name to the launcher's file) has the name of another module loaded in this worker.

    A worker starts with torch and its dependencies already imported.
    """
    for name, path in modules.items():
        known = getattr(sys.modules.get(name), "__file__", None)
        if known is not None and os.path.realpath(known) != os.path.realpath(path):
            raise TrainFunctionError(f"{path} has the name of a module that elastic or torch uses, {known}: give it another one")


def own_modules() -> dict[str, str]:
    """Returns the files of the user's top-level modules that this process has imported."""
    return {name: path for name, module in list(sys.modules.items()) if "." not in name and (path := own_file(module)) is not None}


def call_arguments(train_fn: Callable[..., Any], job: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Returns `(job, *args)` if that fits the function's signature, else `args`. Raises TrainFunctionError if neither fits."""
    try:
        signature = inspect.signature(train_fn)
    except ValueError:  # a builtin without one
        return (job, *args)
    for candidate in ((job, *args), tuple(args)):
        try:
            signature.bind(*candidate)
        except TypeError:
            continue
        return candidate
    name = getattr(train_fn, "__qualname__", train_fn)
    raise TrainFunctionError(f"train_fn {name}{signature} takes neither (job, *args) nor (*args): args has {len(args)} values")


def _checked_name(name: str) -> str:
    if is_whole(name):
        name = f"{name}:{WHOLE}"
    place, _, qualified = name.rpartition(":")
    if not place or not all(part.isidentifier() for part in qualified.split(".")):
        raise TrainFunctionError(f"train_fn={name!r}: use 'module:function', 'path.py:function', or 'path.py' for a whole script")
    if not _is_path(place):
        if "." in place and Path(place).is_file():
            raise TrainFunctionError(f"train_fn={name!r}: {place} is a file, but no script of Python: its name does not end in .py")
        return name
    path = Path(place).resolve()
    if not path.is_file():
        raise TrainFunctionError(f"train_fn={name!r}: there is no file {path}")
    return f"{path}:{qualified}"


def _module_name(module: str) -> str:
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":  # python -m package.module; "__main__" is a directory or archive
        return spec.name
    named = getattr(main, "__file__", None)
    if named is None or named.startswith("<"):  # <stdin>
        raise TrainFunctionError(
            f"train_fn was typed into an interpreter or notebook and is in no file; {_ADVICE}. In a notebook, begin the cell that "
            "defines it with `%%writefile train.py`, and call elastic.run('train.py:train', ...) in another"
        )
    path = Path(named).resolve()
    if not path.is_file():
        raise TrainFunctionError(f"train_fn's script {path} no longer exists as a file, or lies in an archive; {_ADVICE}")
    return str(path)


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise TrainFunctionError(
                f"train_fn's module {name} cannot be imported: {error}. Its folder is not on sys.path in workers, whose path is that of "
                "the program that called elastic.run; under pytest with --import-mode=importlib, set pythonpath"
            ) from error
        raise


def _is_path(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def is_whole(name: str) -> bool:
    """Returns whether a name that a user has given is that of a script as a whole."""
    return name.endswith(".py") and ":" not in name


def load_main(path: str) -> None:
    """Imports a script without its `if __name__ == "__main__"` part, so that objects pickled as `__main__.Name` are found."""
    _load_script(Path(path))


def _whole(path: Path) -> Callable[..., Any]:
    """Returns a function that runs the script with its `if __name__ == "__main__"` part, and its arguments in `sys.argv`."""

    def script(job: Any, *arguments: Any) -> None:
        sys.argv[:] = [str(path), *map(str, arguments)]
        try:
            _load_script(path, whole=True)
        except SystemExit as ended:  # many scripts end by `sys.exit(main())`
            if ended.code in (None, 0):
                return
            if ended.code == _WRONG and not getattr(job, "epoch", 0) and _by_parser(ended):
                raise TrainFunctionError(
                    f"{path.name} refuses its arguments ({' '.join(sys.argv[1:]) or 'there are none'}), and has printed why: its workers' "
                    "output shows it. The arguments of a script stand behind `--`"
                ) from ended
            raise

    return script


def _by_parser(ended: SystemExit) -> bool:
    """Whether a parser of command lines has ended the script."""
    last = [frame for frame, _ in traceback.walk_tb(ended.__traceback__)][-1]
    return str(last.f_globals.get("__name__")).partition(".")[0] in _PARSERS


def _load_script(path: Path, *, whole: bool = False) -> ModuleType:
    spec = frozen(MAIN_MODULE) or importlib.util.spec_from_file_location(MAIN_MODULE, path)
    if spec is None:  # its name does not end in .py
        spec = importlib.util.spec_from_loader(MAIN_MODULE, SourceFileLoader(MAIN_MODULE, str(path)))
    if spec is None or spec.loader is None or not (path.is_file() or frozen(MAIN_MODULE)):
        raise TrainFunctionError(f"train_fn's script {path} cannot be read")
    module = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # as in a script that Python runs: multiprocessing then imports by file, not by module name
    if str(path.parent) not in sys.path:  # as when Python runs a script: modules of its folder can be imported
        sys.path.insert(0, str(path.parent))
    # As multiprocessing does: objects pickled as __main__.Name in the script must be found here too.
    sys.modules[MAIN_MODULE] = sys.modules["__main__"] = module
    if not whole:
        spec.loader.exec_module(module)
    elif isinstance(spec.loader, SourceFileLoader) and (code := spec.loader.get_code(MAIN_MODULE)) is not None:
        module.__name__ = WHOLE
        exec(code, module.__dict__)
    return module


def _attribute(module: ModuleType | None, qualified: str) -> Any:
    found: Any = module
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found

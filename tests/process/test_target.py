from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.errors import TrainFunctionError
from elastic.script.target import MAIN_MODULE, call_arguments, load, name_of


def at_top_level(job: Any, count: int = 0) -> tuple[Any, int]:
    return job, count


class Holder:
    @staticmethod
    def train(job: Any) -> Any:
        return job

    def method(self, job: Any) -> None:
        """Bound, so not importable by name."""


replaced = at_top_level


def shadowed(job: Any) -> None:
    """Its name means something else by the time it is used."""


original_shadowed = shadowed
shadowed = at_top_level  # type: ignore[assignment]


@pytest.fixture
def clean_modules() -> Iterator[None]:
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main
    sys.modules.pop(MAIN_MODULE, None)


def test_a_function_has_a_name_that_loads_it() -> None:
    for function in (at_top_level, Holder.train):
        name = name_of(function)
        assert name == f"{__name__}:{function.__qualname__}"
        assert load(name) is function


def nested() -> Any:
    def train(job: Any) -> None: ...

    return train


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda job: None, "is a lambda"),
        (nested(), "defined inside another function"),
        (functools.partial(at_top_level, count=1), "is a partial, not a function"),
        (Holder(), "is a Holder, not a function"),
        (Holder().method, "another object of this name"),
        (original_shadowed, "another object of this name"),
        (3, "is a int, not a function"),
        ("nowhere", "use 'module:function'"),
        (":function", "use 'module:function'"),
        ("module:not a name", "use 'module:function'"),
        ("missing.py:train", "there is no file"),
    ],
)
def test_what_workers_could_not_import_is_refused_before_anything_starts(function: Any, said: str) -> None:
    with pytest.raises(TrainFunctionError, match=said):
        elastic.run(function, workers=1)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TrainFunctionError, match=r"at_top_level\(job.* takes neither \(job, \*args\) nor \(\*args\): args has 3 values"):
        elastic.run(at_top_level, workers=1, args=[1, 2, 3])


def test_the_job_comes_first_where_there_is_room_for_it() -> None:
    assert call_arguments(at_top_level, "job", [1]) == ("job", 1)
    assert call_arguments(lambda: None, "job", []) == ()
    assert call_arguments(lambda count: None, "job", [1]) == (1,)
    assert call_arguments(lambda *everything: None, "job", [1]) == ("job", 1)


SCRIPT = """
import sys
import {module}
ran = ["top"]
def train(job):
    return ran
if __name__ == "__main__":
    ran.append("main")
    from elastic.script.target import name_of
    print(name_of(train))
"""


@pytest.mark.slow
def test_a_script_is_named_by_its_file_and_loads_without_its_main_part(tmp_path: Path, clean_modules: None) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(module="json"))
    name = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd="/").stdout.strip()
    assert name == f"{script}:train"
    train = load(name)
    assert train(None) == ["top"]
    assert sys.modules["__main__"] is sys.modules[train.__module__], "what was pickled as __main__.Name must be found"
    with pytest.raises(TrainFunctionError, match="has no function trian"):
        load(f"{script}:trian")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["-c", "-"])
def test_a_function_that_is_in_no_file_is_refused(source: str) -> None:
    code = "import elastic\ndef train(job): pass\nelastic.run(train, workers=1)\n"
    arguments = [source, code] if source == "-c" else [source]
    ended = subprocess.run([sys.executable, *arguments], input=code, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "typed into an interpreter or notebook" in ended.stderr.splitlines()[-1]


def test_a_missing_module_is_the_users_mistake_but_what_it_imports_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importing_nothing.py").write_text(SCRIPT.format(module="not_installed_here"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainFunctionError, match=r"no_such_package\.module cannot be imported"):
        load("no_such_package.module:train")
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        load("importing_nothing:train")


def test_importing_elastic_imports_no_torch_and_offers_these_names() -> None:
    code = "import sys, elastic; print('torch' in sys.modules, *sorted(elastic.__all__))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [
        "False",
        "Callback",
        "Job",
        "JobResult",
        "Report",
        "Trainer",
        "__version__",
        "current_job",
        "errors",
        "layers",
        "run",
        "token_loss",
    ]
    assert callable(elastic.run)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = elastic.nonsense


async def waits_for_nothing() -> None: ...


def yields() -> Any:
    yield 1


async def yields_later() -> Any:
    yield 1


@pytest.mark.parametrize("function", [waits_for_nothing, yields, yields_later])
def test_a_function_of_which_a_call_runs_nothing_is_refused(function: Any) -> None:
    with pytest.raises(TrainFunctionError, match=rf"train_fn {function.__name__} is .*, and calling it runs nothing"):
        name_of(function)
    with pytest.raises(TrainFunctionError, match="and calling it runs nothing"):
        load(f"{__name__}:{function.__name__}")


def test_a_builtin_is_refused_in_one_sentence() -> None:
    with pytest.raises(TrainFunctionError, match=r"^train_fn is len, a builtin function of Python or of an extension; workers are"):
        name_of(len)

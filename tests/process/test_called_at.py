"""Tests which line of the user's code an error of the runtime names."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from greenlet import greenlet

from elastic.errors import SettingsError
from elastic.worker import main
from elastic.worker.called_at import defined_at
from tests.process import functions

JOB: Any = SimpleNamespace(epoch=1, step=2)
OURS = str(Path(main.__file__).with_name("invented.py"))
SCRIPT, OWN = "/home/user/train.py", "/home/user/model.py"
INSTALLED = "/home/user/.venv/lib/python3/site-packages/framework/loop.py"
STANDARD = f"{sysconfig.get_path('stdlib')}/contextlib.py"


def through(*files: str) -> Callable[[], None]:
    """Returns a call that goes through line 2 of each file, and is refused in the last one."""
    call: Callable[[], None] | None = None
    for file in reversed(files):
        body = "raise SettingsError('refused')" if call is None else "inner()"
        names = {"SettingsError": SettingsError, "inner": call}
        exec(compile(f"def call():\n    {body}\n", file, "exec"), names)
        call = names["call"]
    assert call is not None
    return call


def message(call: Callable[[], None]) -> str:
    """Returns what a worker reports if its train function makes this call."""
    with pytest.raises(SettingsError) as refused:
        call()
    _, *frames = refused.traceback  # without that of this file
    return main._failure(JOB, refused.value.with_traceback(frames[0]._rawentry))["message"]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ((SCRIPT, OURS), SCRIPT),
        ((SCRIPT, OWN, OURS, OURS), OWN),
        ((SCRIPT, OWN, INSTALLED, OURS), OWN),
        ((SCRIPT, OWN, STANDARD, OURS), OWN),
        ((OURS, SCRIPT, OURS, OWN, OURS), OWN),
        ((SCRIPT, OWN, "<string>", OURS), OWN),
        ((OURS, INSTALLED, OURS), INSTALLED),
        ((OURS, OURS), None),
        (("<string>", OURS), None),
    ],
    ids=["script", "deep", "framework", "standard library", "called back", "generated", "only installed code", "only ours", "no file"],
)
def test_the_innermost_line_of_the_users_own_code_is_named(files: tuple[str, ...], named: str | None) -> None:
    assert message(through(*files)) == ("refused" if named is None else f"refused (called at {named}:2)")


def test_an_error_of_another_greenlet_names_the_line_that_has_switched_to_it() -> None:
    """As in a plain loop, whose engine has a stack of its own."""
    names = {"switch": greenlet(through(OURS, OURS)).switch}
    exec(compile("def call():\n    switch()\n", OWN, "exec"), names)
    assert message(names["call"]) == f"refused (called at {OWN}:2)"


def test_where_a_train_function_is_defined() -> None:
    line = functions.exits.__code__.co_firstlineno
    assert defined_at(functions.exits) == f" ({functions.__file__}:{line})"
    assert defined_at(partial(functions.exits)) == ""
    assert defined_at(main.main) == "", "of a script that runs as a whole: a function of this package"


def returns_a_set() -> set[int]:
    return {1}


def test_a_value_that_cannot_travel_names_the_train_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.devices, "begin", lambda *_: "cpu")
    settings = SimpleNamespace(train_fn=f"{__name__}:returns_a_set", args=(), workers_per_device=1)
    job: Any = SimpleNamespace(settings=settings, leader=True)
    place = f"{__file__}:{returns_a_set.__code__.co_firstlineno}"
    said = message(partial(main._train, job, "cpu", 0))
    assert said.startswith(f"train_fn ({place}) returned a set that cannot be sent")
    assert "called at" not in said

"""Tests that a job's workers keep importing the source files it started with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.errors import MismatchError, TrainFunctionError
from elastic.membership.founding import Ready, check_equal
from elastic.script import sources
from elastic.script.target import MAIN_MODULE, check_hidden, load, own_modules
from tests.announcement import announcement


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process that has imported nothing of the user's."""
    before = dict(sys.modules)
    monkeypatch.setattr(sources, "_imported", {})
    monkeypatch.setattr(sources, "_frozen", {})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield
    for name in set(sys.modules).difference(before):
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "script").write_text("import its_package.part\nVALUE = 1\ndef train():\n    return VALUE, its_package.part.VALUE\n")
    (tmp_path / "its_package").mkdir()
    (tmp_path / "its_package" / "__init__.py").write_text("")
    (tmp_path / "its_package" / "part.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


NAMES = (MAIN_MODULE, "its_package", "its_package.part")


def noted(project: Path) -> dict[str, list[object]]:
    """Returns what the first worker reports of the script, and then makes this process look like another worker."""
    assert load(f"{project}/script:train")() == (1, 1)
    told = {name: value for name, value in sources.to_json(sources.note_imported()).items() if name in NAMES}
    forget()
    return told


def forget() -> None:
    sources._imported.clear()
    for name in NAMES:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def edit(project: Path) -> None:
    (project / "script").write_text((project / "script").read_text().replace("VALUE = 1", "VALUE = 22"))
    (project / "its_package" / "part.py").unlink()


def test_modules_that_are_kept_are_imported_as_they_were_though_they_were_edited_or_removed(project: Path) -> None:
    told = noted(project)
    assert sorted(told) == sorted(NAMES)
    sources.freeze(told)
    edit(project)
    assert load(f"{project}/script:train")() == (1, 1)
    assert sys.modules["its_package.part"].__file__ == str(project / "its_package" / "part.py")
    assert {name: value for name, value in sources.to_json(sources.note_imported()).items() if name in NAMES} == told
    del told["its_package.part"]
    forget()
    sources._frozen.pop("its_package.part")
    with pytest.raises(ModuleNotFoundError, match=r"its_package\.part"):
        load(f"{project}/script:train")


def test_what_was_edited_before_it_could_be_kept_is_refused_by_its_name(project: Path) -> None:
    told = noted(project)
    (project / "its_package" / "part.py").write_text("VALUE = 22\n")
    sources.freeze(told)
    assert load(f"{project}/script:train")() == (1, 22)
    other = sources.to_json(sources.note_imported())
    first, joiner = (Ready.from_json({**announcement(), "code": code}, "here") for code in (told, other))
    with pytest.raises(MismatchError, match=rf"worker 4 cannot train.* with worker 0: {project}/its_package/part.py was edited"):
        check_equal({0: first, 4: joiner})


def test_what_only_one_has_imported_is_no_difference() -> None:
    first, other = (Ready.from_json({**announcement(), "code": {name: ["/f.py", "1", False]}}, "here") for name in ("a", "b"))
    check_equal({0: first, 1: other})


def test_only_the_users_own_modules_are_told(project: Path) -> None:
    load(f"{project}/script:train")
    found = sources.note_imported()
    assert not any(name.partition(".")[0] in ("json", "pytest", "numpy", "elastic", "importlib") for name in found)
    assert "its_package.part" in found


def test_a_module_that_ours_hides_is_named(tmp_path: Path) -> None:
    check_hidden(own_modules())
    (tmp_path / "json.py").write_text("")
    with pytest.raises(
        TrainFunctionError, match=rf"{tmp_path}/json.py has the name of a module that elastic or torch uses, .*json/__init__.py"
    ):
        check_hidden({"json": str(tmp_path / "json.py"), "no_such_module": "/x.py"})

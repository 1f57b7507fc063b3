"""Tests that imports point down: a room imports only from rooms below it. Every module lies in a room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = (
    ("cli",),
    ("chaos",),
    ("torchrun",),
    ("integrations",),
    ("__init__",),
    ("launch",),
    ("agent",),
    ("control",),
    ("worker",),
    ("snapshot",),
    ("engine",),
    ("checkpoint",),
    ("recovery",),
    ("membership",),
    ("health",),
    ("power",),
    ("observe",),
    ("comm",),
    ("memory",),
    ("script",),
    ("host",),
    ("view",),
    ("plan",),
    ("layout",),
    ("settings",),
    ("errors",),
)
"""From top to bottom: folders and modules of `elastic`, whose `__init__` re-exports what users need. Those on one floor do not import each
other."""

_FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(path: str) -> str:
    """The room of a file, of a path below the root."""
    first, *rest = path.removesuffix(".py").split("/")
    return rest[0] if first == "elastic" else first


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import from `elastic`, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "elastic":
            names = [f"elastic.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "elastic":
                room = rest.partition(".")[0]
                yield node.lineno, room if room in _FLOOR else "__init__"  # also `import elastic`, or a name out of it


def upward(path: str, source: str) -> list[str]:
    """The imports of a file that do not point down."""
    room = room_of(path)
    wrong = [(line, other) for line, other in imported(source) if other != room and _FLOOR[other] <= _FLOOR[room]]
    return [f"{path}:{line}: {room} imports {other}" for line, other in wrong]


def files() -> list[str]:
    """Every file of the runtime, as a path below the root."""
    paths = [path for folder in ("elastic", "snapshot", "checkpoint") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in paths if not any(parent.is_symlink() for parent in path.parents)]


def test_every_module_lies_in_a_room():
    assert {room_of(path) for path in files()} == set(_FLOOR)


def test_imports_point_down():
    wrong = [line for path in files() for line in upward(path, (ROOT / path).read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("elastic/engine/zero.py", "from elastic.worker.trainer import Trainer"),
        ("elastic/engine/zero.py", "import elastic.worker.trainer"),
        ("elastic/engine/zero.py", "from elastic.worker import main as worker"),
        ("elastic/engine/zero.py", "from elastic import Trainer"),
        ("elastic/engine/zero.py", "def f():\n    from elastic.snapshot import rest_digests as rest"),
        ("snapshot/rest_digests.py", "from elastic.worker import job"),
        ("elastic/view.py", "from elastic.host import facts"),
        ("elastic/errors.py", "from elastic.settings import JobSettings"),
    ],
)
def test_an_import_that_points_up_is_found(path: str, line: str):
    assert upward(path, line)


@pytest.mark.parametrize("line", ["from elastic.engine.shard import Shard", "from elastic.layout import regions", "import torch"])
def test_an_import_that_points_down_is_none_of_them(line: str):
    assert not upward("snapshot/rest_digests.py", line)

"""Tests that only `elastic/memory` allocates or views memory.

As far as the syntax tree shows it, other modules may not use:
- functions of torch and NumPy that make memory which is not computed from other values (`empty`, `zeros`, `full`, `zeros_like` ...),
  methods that do (`new_empty` ...), plain copies of a tensor (`clone`), `bytearray` and `mmap`;
- functions that share memory under another type: `.numpy()`, `from_numpy`, `frombuffer`, `asarray`, `as_tensor`, `np.ndarray(...)`,
  `as_strided`, `.view` with a dtype, `memoryview`; and those that move it between devices (`cpu`, `cuda`, `pin_memory`).

They may use computed values (`a + b`, `cat`, `stack`, `concatenate`, `randn`, `contiguous`, `to(dtype)`); values of Python numbers
(`torch.tensor`, `np.array`); slices, `reshape` and `view` with a shape, which keep dtype and device; `copy_`; and `tobytes`, which returns
a Python value.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("elastic", "snapshot", "checkpoint")

EXEMPT = {
    "elastic/memory": "it is the place",
    "elastic/plan": "searches in arrays of costs, has no state of a training",
    "elastic/host/channel.py": "lines of JSON between processes",
    "elastic/observe/activity.py": "a page of counters that processes share",
    "elastic/observe/trace_file.py": "records of what a worker did, which outlive it",
    "checkpoint/convert": "reads and writes files for a tool; workers read weights through it, with the memory of `checkpoint/stored.py`",
    "checkpoint/pickles": "reads and writes other programs' files, for the converters",
}

_MAKES = {f"{name}{like}" for name in ("empty", "zeros", "ones", "full") for like in ("", "_like")} | {"empty_strided"}
_SHARES = {"frombuffer", "from_numpy", "as_tensor", "asarray", "asanyarray", "ascontiguousarray", "ndarray", "from_dlpack", "memmap"}
_METHODS = {"numpy", "clone", "cpu", "cuda", "pin_memory", "new_empty", "new_zeros", "new_ones", "new_full", "as_strided"}
_NAMES = {"memoryview", "bytearray", "as_strided"}
_DTYPES = {"float16", "float32", "float64", "bfloat16", "bool", "complex64", "complex128"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def found(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of everything that the rule refuses."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_refused_call(node):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and _of_a_library(node) and node.attr in (_MAKES | _SHARES) - {"ndarray"}:
            yield node.lineno, ast.unparse(node)  # also where it is not called here: `make = torch.zeros`
        elif isinstance(node, ast.ImportFrom) and _is_refused_import(node):
            yield node.lineno, ast.unparse(node)


def _of_a_library(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("torch", "np", "numpy")


def _is_refused_import(node: ast.ImportFrom) -> bool:
    names = {alias.name for alias in node.names}
    return (node.module or "").partition(".")[0] in ("torch", "numpy", "mmap") and bool(
        names & (_MAKES | _SHARES | _NAMES | {"clone", "mmap"})
    )


def _is_refused_call(call: ast.Call) -> bool:
    called = call.func
    if isinstance(called, ast.Name):
        return called.id in _NAMES
    if not isinstance(called, ast.Attribute):
        return False
    if _of_a_library(called):
        return called.attr in ("ndarray", "clone")
    if called.attr == "mmap":
        return True
    return called.attr in _METHODS or (called.attr == "view" and len(call.args) == 1 and _is_dtype(call.args[0]))


def _is_dtype(value: ast.expr) -> bool:
    """Whether what `.view` is given is a dtype as far as one can see, and not a shape."""
    if isinstance(value, ast.Constant):
        return isinstance(value.value, str)
    text = ast.unparse(value)
    return "dtype" in text or text.startswith(("getattr(torch", "getattr(np")) or text.rpartition(".")[2] in _DTYPES


def files() -> list[Path]:
    """The files that the rule holds for."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    plain = [path for path in paths if not any(parent.is_symlink() for parent in path.parents)]
    return [path for path in plain if not any(path.relative_to(ROOT).is_relative_to(exempt) for exempt in EXEMPT)]


def test_only_memory_allocates_and_views():
    wrong = [f"{path.relative_to(ROOT)}:{line} {text}" for path in files() for line, text in found(path.read_text())]
    assert not wrong, "\n".join([*wrong, "use elastic.memory (its docstring has the contract)"])


def test_the_rule_is_looked_for_where_tensors_are():
    names = {str(path.relative_to(ROOT)) for path in files()}
    assert {"elastic/engine/reducer.py", "elastic/worker/migration.py", "elastic/comm/mailbox.py", "snapshot/rest_digests.py"} < names
    assert "checkpoint/writer.py" in names
    assert not [exempt for exempt in EXEMPT if not (ROOT / exempt).exists()]


@pytest.mark.parametrize(
    "line",
    [
        "torch.empty(3)",
        "torch.zeros_like(x)",
        "torch.full((2,), 1.0)",
        "np.zeros(0)",
        "np.frombuffer(data, dtype=np.uint8)",
        "np.ndarray((2,), buffer=x)",
        "torch.from_numpy(array)",
        "torch.frombuffer(data, dtype=torch.uint8)",
        "x.detach().reshape(-1).view(torch.uint8).numpy()",
        "x.view(torch.uint8)",
        "x.view(dtype)",
        "x.view(other.dtype)",
        "x.view(getattr(torch, name))",
        "array.view('<u8')",
        "x.clone()",
        "x.new_empty(3)",
        "x.cpu()",
        "memoryview(array)",
        "bytearray(1 << 20)",
        "as_strided(array, (2, 2), (8, 4))",
        "x.as_strided((2, 2), (2, 1))",
        "mmap.mmap(-1, 4096)",
        "map(torch.zeros, sizes)",
    ],
)
def test_a_violation_is_refused(line: str):
    assert list(found(f"def f(x):\n    return {line}\n"))


@pytest.mark.parametrize(
    "line",
    [
        "x + y",
        "torch.cat(parts)",
        "np.concatenate(parts)",
        "torch.tensor(0.0)",
        "np.array([1, 2])",
        "x.view(-1)",
        "x.view(piece.shape)",
        "x.view(3, 4)",
        "x.reshape(-1)[2:3]",
        "x.to(torch.float64)",
        "x.contiguous()",
        "torch.randn(3)",
        "x.copy_(y)",
        "isinstance(x, np.ndarray)",
        "memory.zeros(3, torch.float32)",
    ],
)
def test_what_is_computed_is_allowed(line: str):
    assert not list(found(f"def f(x):\n    return {line}\n"))


@pytest.mark.parametrize(
    "line", ["from torch import zeros", "from numpy.lib.stride_tricks import as_strided", "from numpy import frombuffer"]
)
def test_an_import_of_one_is_refused(line: str):
    assert list(found(line))


def test_a_seeded_violation_in_a_real_file_is_found():
    source = (ROOT / "elastic/engine/reducer.py").read_text()
    assert not list(found(source))
    assert list(found(source.replace("bytes_of(received[: overlap.prefix])", "received[: overlap.prefix].numpy()")))
    assert list(found(source.replace("zeros(overlap.stop - overlap.start, model", "torch.zeros(overlap.stop - overlap.start, dtype=model")))

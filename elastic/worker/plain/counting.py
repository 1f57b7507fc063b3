"""Finds what the body of a plain loop counts by itself, in its source: a body is no step, and how many run here depends on the workers.

Such a value is allowed, and may be harmless. If it decides what is trained, bits depend on the layout; at once that is noticed by a
comparison of workers, but not where it acts late (`if step > 1000`). So the user is told once, where the first loop begins.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterable, Iterator
from types import FrameType

from elastic.script.sources import is_users

_ONCE_A_STEP = {"report", "sync_gradients"}
"""What an `if` asks whose code runs once a step, of the loader or of an Accelerator."""


def told(frame: FrameType | None) -> str | None:
    """Returns a warning about the loop that asks for the next batch in the nearest frame of the user's code; None if all is well."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    found = counts("".join(linecache.getlines(frame.f_code.co_filename)), frame.f_lineno)
    return _said(frame.f_code.co_filename, found) if found else None


def counts(source: str, line: int) -> list[tuple[int, str]]:
    """Returns line and text of what the loop whose head is at `line` counts; nothing if there is no such loop."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    heads = [node for node in ast.walk(tree) if isinstance(node, ast.For) and node.lineno <= line <= (node.iter.end_lineno or 0)]
    if not heads:
        return []
    loop = max(heads, key=lambda node: node.lineno)
    bodies = list(_bodies(loop.body))
    own = {name.id for part in (loop.target, *bodies) if not _carries(part) for name in _names(part, ast.Store)}
    carried = [part for part in bodies if _carries(part) and not own.issuperset(_carries(part))]
    found = [(part.lineno, ast.unparse(part)) for part in carried]  # type: ignore[attr-defined]
    number = _enumerated(loop)
    if number is not None and any(number == name.id for part in bodies for name in _names(part, ast.Load)):
        found.insert(0, (loop.lineno, f"{number} of {ast.unparse(loop.iter)}"))
    return found


def _bodies(statements: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Yields what runs in each body: all but what is under an `if` that asks for the report, and definitions."""
    for statement in statements:
        if isinstance(statement, ast.If):
            asked = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(statement.test)}
            if asked & _ONCE_A_STEP:
                yield from _bodies(statement.orelse)
                continue
            yield statement.test
            yield from _bodies([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.With | ast.Try | ast.For | ast.While):
            yield from (node for node in ast.iter_child_nodes(statement) if not isinstance(node, ast.stmt | ast.ExceptHandler))
            inner = [*statement.body, *getattr(statement, "orelse", []), *getattr(statement, "finalbody", [])]
            yield from _bodies([*inner, *(each for handler in getattr(statement, "handlers", []) for each in handler.body)])
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement


def _carries(part: ast.AST) -> set[str]:
    """Returns the names that a statement gives new values which it computes from their old ones, or whose parts it does so."""
    if isinstance(part, ast.AugAssign):
        target: ast.AST = part.target
        while isinstance(target, ast.Attribute | ast.Subscript):
            target = target.value
        return {target.id} if isinstance(target, ast.Name) else set()
    if isinstance(part, ast.Assign):
        targets = {name.id for target in part.targets for name in _names(target, ast.Store)}
        return targets & {name.id for name in _names(part.value, ast.Load)}
    return set()


def _names(part: ast.AST, use: type[ast.expr_context]) -> Iterator[ast.Name]:
    return (node for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, use))


def _enumerated(loop: ast.For) -> str | None:
    """Returns the name that the number of a body has, if the loop enumerates them."""
    calls = [node for node in ast.walk(loop.iter) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    if any(call.func.id == "enumerate" for call in calls) and isinstance(loop.target, ast.Tuple):  # type: ignore[attr-defined]
        first = loop.target.elts[0]
        return first.id if isinstance(first, ast.Name) else None
    return None


def _said(filename: str, found: list[tuple[int, str]]) -> str:
    shown = "; ".join(f"line {line}: {text if len(text) <= 60 else text[:57] + '...'}" for line, text in found[:3])
    rest = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return (
        f"{filename}: the body of the loop counts by itself ({shown}{rest}). It runs once for each micro-batch that this worker has, not "
        "once a step, so such a value depends on the number of workers, and must not decide what is trained. Where loader.report is not "
        "None a step is complete: loader.report.step counts steps, loader.report.loss is the loss of all workers"
    )

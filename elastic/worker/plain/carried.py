"""Finds variables that a plain loop carries from body to body, or from epoch to epoch, in its source.

How many bodies ran before on a worker depends on the number of workers; and a worker that joins later, or continues from a checkpoint, has
such a variable from the start of `train_fn`. If it decides what is trained, a comparison of workers may show it late, or never: best
weights that the leader saves, `if seen > 1000`. Most such variables are harmless. So the user is told once, where the first loop begins.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from elastic.script.sources import is_own

_ONCE_A_STEP = {"report", "sync_gradients"}
"""What an `if` asks whose code runs once a step, of the loader or of an Accelerator."""

_LOOPS = (ast.For, ast.While)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_SHOWN = 4

Found = dict[str, int]
"""Variables, each with the first line that changes it."""


def told(frame: FrameType | None) -> list[str]:
    """Returns warnings about the loop that asks for its next batch in the nearest frame of the user's code, and those around it."""
    frames = []
    while frame is not None:
        if is_own(frame.f_code.co_filename):
            frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    if not frames:
        return []
    sources = [("".join(linecache.getlines(filename)), line) for filename, line in frames]
    bodies, epochs = by_bodies(*sources[0]), Found()
    if _loop_at(_parsed(sources[0][0]), sources[0][1]) is None:
        return []
    for source, line in reversed(sources):
        epochs |= by_epochs(source, line)
    rest = {name: line for name, line in epochs.items() if name not in bodies}
    return [_of_bodies(frames[0][0], bodies)] * bool(bodies) + [_of_epochs(frames[0][0], rest)] * bool(rest)


def by_bodies(source: str, line: int) -> Found:
    """Returns what the loop whose head is at `line` carries from body to body; nothing if there is no such loop."""
    loop = _loop_at(_parsed(source), line)
    if loop is None:
        return {}
    found = _carried(loop, [statement for statement in loop.body for statement in _each_body(statement)])
    number = _enumerated(loop)
    if number is not None and any(
        name.id == number for part in loop.body for name in _of(part, ast.Name) if isinstance(name.ctx, ast.Load)
    ):
        found = {f"{number} of {ast.unparse(loop.iter)}": loop.lineno, **found}
    return found


def by_epochs(source: str, line: int) -> Found:
    """Returns what loops around `line` carry from turn to turn, and what one whose head is there carries from step to step."""
    tree, found = _parsed(source), Found()
    own = _loop_at(tree, line)
    for loop in _of(tree, *_LOOPS):
        inside = loop.body[0].lineno <= line <= (loop.end_lineno or 0)
        between = any(loop.lineno < each.lineno <= line <= (each.end_lineno or 0) for each in _of(loop, *_DEFINITIONS))
        if loop is own or (inside and not between):
            later = {name.id for name in _of(tree, ast.Name) if isinstance(name.ctx, ast.Load) and name.lineno > (loop.end_lineno or 0)}
            found |= _carried(loop, loop.body, later)
    return found


def _parsed(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _loop_at(tree: ast.AST, line: int) -> ast.For | None:
    heads = [loop for loop in _of(tree, ast.For) if loop.lineno <= line <= (loop.iter.end_lineno or 0)]
    return max(heads, key=lambda loop: loop.lineno, default=None)


def _each_body(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yields a statement of a body, without what it runs once a step."""
    if isinstance(statement, ast.If) and any(_name(node) in _ONCE_A_STEP for node in ast.walk(statement.test)):
        yield from statement.orelse
    else:
        yield statement


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _carried(loop: ast.For | ast.While, body: Sequence[ast.stmt], later: Collection[str] = ()) -> Found:
    """`later`: the names that are read behind the loop, for which they may have been set in an earlier turn than the last."""
    flow = _Flow()
    if isinstance(loop, ast.For):
        flow.assign(loop.target)
    flow.run(body)
    kept = {*flow.exposed, *(set(later) - flow.known)}
    return {name: line for name, line in flow.changed.items() if name.partition(".")[0].partition("[")[0] in kept}


@dataclass(slots=True)
class _Flow:
    """Follows one turn of a loop: `known` has been set in it, `exposed` is read although it may not have been, `changed` is set."""

    known: set[str] = field(default_factory=set)
    exposed: set[str] = field(default_factory=set)
    changed: Found = field(default_factory=dict)

    def run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._run(statement)

    def assign(self, target: ast.AST) -> None:
        """Notes names that are set, and reads what the places are in that are set."""
        for node in _of(target, ast.Name):
            if isinstance(node.ctx, ast.Store):
                self.known.add(node.id)
                self.changed.setdefault(node.id, node.lineno)
            else:
                self._read(node)

    def _read(self, part: ast.AST | None) -> None:
        if part is None:
            return
        for named in _of(part, ast.NamedExpr):
            if named is not part:
                self._read(named)
        if isinstance(part, ast.NamedExpr):
            self._read(part.value)
            self.assign(part.target)
            return
        own = {name.id for made in _of(part, ast.comprehension) for name in _of(made.target, ast.Name)}
        own |= {argument.arg for function in _of(part, ast.Lambda) for argument in _of(function.args, ast.arg)}
        for name in _of(part, ast.Name):
            if isinstance(name.ctx, ast.Load) and name.id not in self.known | own:
                self.exposed.add(name.id)

    def _run(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.AugAssign):
            self._read(statement.value)
            self._augment(statement.target)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            self._read(statement.value)
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                self.assign(target)
        elif isinstance(statement, ast.If):
            self._read(statement.test)
            self._branch(statement.body, statement.orelse)
        elif isinstance(statement, ast.For):
            self._read(statement.iter)
            self.assign(statement.target)
            self.run([*statement.body, *statement.orelse])  # taken to run at least once
        elif isinstance(statement, ast.While):
            self._read(statement.test)
            self.run([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.With):
            for item in statement.items:
                self._read(item.context_expr)
                if item.optional_vars is not None:
                    self.assign(item.optional_vars)
            self.run(statement.body)
        elif isinstance(statement, ast.Try):
            self._branch(statement.body, *(handler.body for handler in statement.handlers))
            self.run([*statement.orelse, *statement.finalbody])
        elif isinstance(statement, _DEFINITIONS):
            self.known.add(statement.name)
        else:
            self._read(statement)

    def _augment(self, target: ast.expr) -> None:
        self._read_base(target)
        if isinstance(target, ast.Name):
            self.known.add(target.id)
        base: ast.AST = target
        while isinstance(base, ast.Attribute | ast.Subscript):
            base = base.value
        if isinstance(target, ast.Name) or (isinstance(base, ast.Name) and base.id in self.exposed):
            self.changed.setdefault(ast.unparse(target), target.lineno)

    def _read_base(self, target: ast.expr) -> None:
        for name in _of(target, ast.Name):
            if name.id not in self.known:
                self.exposed.add(name.id)

    def _branch(self, *branches: Sequence[ast.stmt]) -> None:
        before, ends = set(self.known), []
        for branch in branches:
            self.known = set(before)
            self.run(branch)
            if not (branch and isinstance(branch[-1], ast.Continue | ast.Break | ast.Return | ast.Raise)):
                ends.append(self.known)
        self.known = set.intersection(*ends) if ends else before


def _of(part: ast.AST, *kinds: type) -> Iterator[Any]:
    return (node for node in ast.walk(part) if isinstance(node, kinds))


def _enumerated(loop: ast.For) -> str | None:
    """Returns the name that the number of a body has, if the loop enumerates them."""
    calls = [call for call in _of(loop.iter, ast.Call) if isinstance(call.func, ast.Name) and call.func.id == "enumerate"]
    if calls and isinstance(loop.target, ast.Tuple) and isinstance(loop.target.elts[0], ast.Name):
        return loop.target.elts[0].id
    return None


def _listed(found: Found) -> str:
    shown = [f"{name} (line {line})" for name, line in [*found.items()][:_SHOWN]]
    return ", ".join(shown) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _of_bodies(filename: str, found: Found) -> str:
    return (
        f"{filename}: the body of the loop counts by itself: {_listed(found)}. It runs once for each micro-batch that this worker has, not "
        "once a step, so such a value depends on the number of workers, and must not decide what is trained. Where loader.report is not "
        "None a step is complete: loader.report.step counts steps, loader.report.loss is the loss of all workers"
    )


def _of_epochs(filename: str, found: Found) -> str:
    return (
        f"{filename}: the loop carries variables from turn to turn: {_listed(found)}. A worker that joins later, or continues from a "
        "checkpoint, has them from the start of train_fn. If one decides what is trained or saved, compute it from the epoch or from "
        "loader.report.step, use loader.keep_best(), or keep it in an object given to loader.register_for_checkpointing"
    )

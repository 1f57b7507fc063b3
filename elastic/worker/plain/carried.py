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

from elastic.script.sources import is_ours, is_own

_ONCE_A_STEP = {"report", "sync_gradients"}
"""What an `if` asks whose code runs once a step, of the loader or of an Accelerator."""

_SETTINGS = {"param_groups"}
"""What is carried for the user."""

_IN_PLACE = {"append", "appendleft", "extend", "insert", "setdefault"}
_LOOPS = (ast.For, ast.While)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_SHOWN = 4

Found = dict[str, int]
"""Variables, each with the first line that changes it."""


def told(frame: FrameType | None, before: set[tuple[str, str, int]]) -> list[str]:
    """Returns warnings about the loop that asks for its next batch in `frame`, and those around it in all frames of the user's code.

    What is in `before`, as (file, variable, line), is left out, and what is told is added. Loops of integrations are their own concern.
    """
    if frame is None or is_ours(frame.f_code.co_filename):
        return []
    frames = []
    while frame is not None:
        if is_own(frame.f_code.co_filename):
            frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    if not frames:
        return []
    sources = [(filename, "".join(linecache.getlines(filename)), line) for filename, line in frames]
    own, *_ = sources
    bodies = {name: line for name, line in by_bodies(*own[1:]).items() if (own[0], name, line) not in before}
    before |= {(own[0], name, line) for name, line in bodies.items()}
    warnings = [_of_bodies(own[0], bodies)] * bool(bodies)
    for filename in dict.fromkeys(filename for filename, *_ in sources):
        rest = {name: at for file, source, line in sources if file == filename for name, at in by_epochs(source, line).items()}
        rest = {name: line for name, line in rest.items() if (filename, name, line) not in before}
        before |= {(filename, name, line) for name, line in rest.items()}
        warnings += [_of_epochs(filename, rest)] * bool(rest)
    return warnings


def by_bodies(source: str, line: int) -> Found:
    """Returns what a loop carries from body to body: the one whose head is at `line`, else the innermost one around it, as of `next`."""
    tree = _parsed(source)
    loop = _loop_at(tree, line)
    if loop is None:
        return {}
    found = _carried(tree, loop, [statement for statement in loop.body for statement in _each_body(statement)])
    number = _enumerated(loop)
    if number is not None and any(
        name.id == number for part in loop.body for name in _of(part, ast.Name) if isinstance(name.ctx, ast.Load)
    ):
        found = {f"{number} of {ast.unparse(loop.iter)}": loop.lineno, **found}  # type: ignore[union-attr]
    return found


def by_epochs(source: str, line: int) -> Found:
    """Returns what loops around `line` carry from turn to turn; if there are none, what the one at `line` carries from step to step."""
    tree, found = _parsed(source), Found()
    own = _loop_at(tree, line)
    around = [loop for loop in _of(tree, *_LOOPS) if _is_in(loop, line)]
    for loop in around or ([own] if own is not None else []):
        later = {name.id for name in _of(tree, ast.Name) if isinstance(name.ctx, ast.Load) and name.lineno > (loop.end_lineno or 0)}
        found |= _carried(tree, loop, loop.body, later)
    return found


def _parsed(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _loop_at(tree: ast.AST, line: int) -> ast.For | ast.While | None:
    heads = [loop for loop in _of(tree, ast.For) if loop.lineno <= line <= (loop.iter.end_lineno or 0)]
    around = [loop for loop in _of(tree, *_LOOPS) if _is_in(loop, line)]
    return max(heads or around, key=lambda loop: loop.lineno, default=None)


def _is_in(loop: ast.For | ast.While, line: int) -> bool:
    """Whether a line is in the body of a loop, and in no definition in it."""
    inside = loop.body[0].lineno <= line <= (loop.end_lineno or 0)
    return inside and not any(loop.lineno < each.lineno <= line <= (each.end_lineno or 0) for each in _of(loop, *_DEFINITIONS))


def _each_body(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yields a statement of a body, without what it runs once a step."""
    if isinstance(statement, ast.If) and _asks_once_a_step(statement):
        yield from statement.orelse
    else:
        yield statement


def _asks_once_a_step(statement: ast.If) -> bool:
    return any(_name(node) in _ONCE_A_STEP for node in ast.walk(statement.test))


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _carried(tree: ast.AST, loop: ast.For | ast.While, body: Sequence[ast.stmt], later: Collection[str] = ()) -> Found:
    """`later`: the names that are read behind the loop, for which they may have been set in an earlier turn than the last."""
    flow = _Flow()
    if isinstance(loop, ast.For):
        flow.assign(loop.target)
    flow.run(body)
    cared_for = _cared_for(tree)
    found = {}
    for key, (line, whole) in flow.changed.items():
        carried = key in flow.exposed or (whole and key in later and key not in flow.known)
        if carried and not _SETTINGS & {*key.replace("[", ".").split(".")} and key.partition(".")[0].partition("[")[0] not in cared_for:
            found[key] = line
    return found


def _cared_for(tree: ast.AST) -> set[str]:
    """Returns the names of what the runtime has: prepared, registered, or a best model; and iterators, which `next` takes batches from."""
    found = set()
    for call in _of(tree, ast.Call):
        if _name(call.func) == "register_for_checkpointing":
            found |= {name.id for argument in call.args for name in _of(argument, ast.Name)}
    for statement in _of(tree, ast.Assign):
        if isinstance(statement.value, ast.Call) and _name(statement.value.func) in ("prepare", "keep_best", "iter"):
            found |= {name.id for target in statement.targets for name in _of(target, ast.Name)}
    return found


@dataclass(slots=True)
class _Flow:
    """Follows one turn of a loop. Variables are names, `self.best`, `state["best"]`; and objects of which a part changes, or in place.

    `known` has been set in this turn, `exposed` is read although it may not have been. `changed` has lines, and whether all of it is set.
    """

    known: set[str] = field(default_factory=set)
    exposed: set[str] = field(default_factory=set)
    changed: dict[str, tuple[int, bool]] = field(default_factory=dict)

    def run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._run(statement)

    def assign(self, target: ast.AST) -> None:
        """Notes what is set."""
        if isinstance(target, ast.Tuple | ast.List | ast.Starred):
            for each in ast.iter_child_nodes(target):
                self.assign(each)
        elif isinstance(target, ast.Name | ast.Attribute | ast.Subscript):
            if isinstance(target, ast.Subscript):
                self._read(target.slice)
            key, whole = _key(target)
            if isinstance(target, ast.Name) or _root(target) not in self.known:
                self.changed.setdefault(key, (target.lineno, whole))
            if whole:
                self.known.add(key)

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
        for node in _of(part, ast.Name, ast.Attribute, ast.Subscript):
            key = _key(node)[0]
            if isinstance(node.ctx, ast.Load) and key not in self.known and _root(node) not in self.known | own:
                self.exposed.add(key)

    def _run(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.AugAssign):
            self._read(statement.value)
            key = _key(statement.target)[0]
            if key not in self.known and _root(statement.target) not in self.known:
                self.exposed.add(key)
            self.assign(statement.target)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            self._read(statement.value)
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                self.assign(target)
        elif isinstance(statement, ast.If):
            self._read(statement.test)
            if _asks_once_a_step(statement) and not isinstance(statement.test, ast.BoolOp):  # which is so in each turn that is a step
                self.run([*statement.orelse, *statement.body])
            else:
                self._branch(statement.body, statement.orelse)
        elif isinstance(statement, ast.Match):
            self._read(statement.subject)
            self._branch(*(case.body for case in statement.cases))
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
        elif isinstance(statement, ast.Expr) and (changed := _in_place(statement.value)) is not None:
            for argument in ast.iter_child_nodes(statement.value):
                self._read(argument if argument is not statement.value.func else None)  # type: ignore[attr-defined]
            if _root(changed) not in self.known:
                self.changed.setdefault(_key(changed)[0], (statement.lineno, False))
        else:
            self._read(statement)

    def _branch(self, *branches: Sequence[ast.stmt]) -> None:
        before, ends = set(self.known), []
        for branch in branches:
            self.known = set(before)
            self.run(branch)
            if not (branch and isinstance(branch[-1], ast.Continue | ast.Break | ast.Return | ast.Raise)):
                ends.append(self.known)
        self.known = set.intersection(*ends) if ends else before


def _key(node: ast.expr) -> tuple[str, bool]:
    """Returns the name of a variable, and whether it is all that the expression stands for: of `a[i]` it is `a`."""
    if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant):
        return ast.unparse(node.value), False
    return ast.unparse(node), True


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _in_place(call: ast.expr) -> ast.expr | None:
    """Returns the container that a call changes in place. `update` of a number, say, is the method of another class."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return None
    fills = call.func.attr == "update" and (call.keywords or any(isinstance(argument, ast.Dict) for argument in call.args))
    return call.func.value if fills or call.func.attr in _IN_PLACE else None


def _of(part: ast.AST, *kinds: type) -> Iterator[Any]:
    return (node for node in ast.walk(part) if isinstance(node, kinds))


def _enumerated(loop: ast.For | ast.While) -> str | None:
    """Returns the name that the number of a body has, if the loop enumerates them."""
    if not isinstance(loop, ast.For):
        return None
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

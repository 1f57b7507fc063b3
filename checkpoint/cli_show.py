"""The output of the commands: tables, lines and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastic.checkpoint.convert.compare import Difference
from elastic.checkpoint.convert.detect import Detected
from elastic.checkpoint.convert.run import Outline, unread_of
from elastic.checkpoint.manifest import slicing_json
from elastic.checkpoint.objects import Location
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Contents, Spec

Slicings = Mapping[tuple[str, str], Slicing]


def readable(count: float) -> str:
    """Formats a number of bytes with a unit, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def as_json(detected: Detected, contents: Contents, slicings: Slicings) -> dict[str, Any]:
    """Returns the JSON of `inspect`."""
    return {
        "format": detected.name,
        "why": detected.why,
        "step": contents.step,
        "tensors": {
            name: {state: _tensor(spec, slicings.get((name, state))) for state, spec in states.items()}
            for name, states in contents.tensors.items()
        },
        "bytes": sum(spec.bytes for states in contents.tensors.values() for spec in states.values()),
        "scalars": {name: dict(values) for name, values in contents.scalars.items()},
        "groups": [{"names": list(group.names), "settings": dict(group.settings)} for group in contents.groups],
        "ties": dict(contents.ties),
        "frozen": sorted(contents.frozen),
        "buffers": sorted(contents.buffers),
        "extra": sorted(contents.extra),
        "unread": list(unread_of(contents)),
    }


def _tensor(spec: Spec, slicing: Slicing | None) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": list(spec.shape), "dtype": spec.dtype}
    return found if slicing is None else {**found, "slicing": slicing_json(slicing)}


def _sliced(slicings: Slicings) -> Table:
    """Returns a table with the number of tensors of each slicing, and one tensor's name as an example."""
    table = Table("tensor-parallel slices", "tensors", "such as")
    names: dict[Slicing, list[str]] = {}
    for (name, state), slicing in slicings.items():
        names.setdefault(slicing, []).append(name if state == PARAM else f"{name} {state}")
    for slicing, found in names.items():
        table.add_row(escape(str(slicing)), str(len(found)), escape(found[0]))
    return table


def _kinds(contents: Contents) -> Table:
    table = Table("state", "tensors", "elements", "bytes", "dtypes")
    states: dict[str, list[Spec]] = {}
    for values in contents.tensors.values():
        for state, spec in values.items():
            states.setdefault(state, []).append(spec)
    for state, specs in states.items():
        elements, size = sum(spec.elements for spec in specs), sum(spec.bytes for spec in specs)
        table.add_row(escape(state), str(len(specs)), str(elements), readable(size), ", ".join(sorted({spec.dtype for spec in specs})))
    return table


def show(console: Console, detected: Detected, contents: Contents, slicings: Slicings) -> None:
    """Prints the page of `inspect`."""
    step = "unknown" if contents.step is None else contents.step
    console.print(f"format {detected.name} ({escape(detected.why)}), step {step}", highlight=False)
    console.print(_kinds(contents))
    if slicings:
        console.print(_sliced(slicings))
    if contents.groups:
        table = Table("group", "parameters", "settings")
        for index, group in enumerate(contents.groups):
            settings = ", ".join(f"{key}={value}" for key, value in group.settings.items() if value is not None)
            table.add_row(str(index), str(len(group.names)), escape(settings))
        console.print(table)
    for word, names in (
        ("tied", contents.ties),
        ("frozen", contents.frozen),
        ("buffers", contents.buffers),
        ("also holds", contents.extra),
    ):
        if names:
            console.print(f"{word}: {escape(', '.join(sorted(names)))}", highlight=False)
    show_unread(console, unread_of(contents))


def show_unread(console: Console, unread: Iterable[str], where: str = "") -> None:
    """Prints what the checkpoint holds that was not read."""
    for text in unread:
        console.print(f"not read{where}: {escape(text)}", highlight=False, soft_wrap=True)


def show_differences(console: Console, differences: Iterable[Difference]) -> bool:
    """Prints the differences, then counts. Returns whether there are any."""
    equal = unequal = 0
    for found in differences:
        if found.equal:
            equal += 1
            continue
        unequal += 1
        console.print(f"{escape(found.what)}: {escape(found.how)}", highlight=False)
    console.print(f"{equal} equal, {unequal} different", highlight=False)
    return unequal > 0


def differences_as_json(differences: Iterable[Difference], unread: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns the JSON of `diff`. unread: what was not read of the first and the second, and so not compared."""
    found = list(differences)
    return {
        "equal": sum(one.equal for one in found),
        "different": [{"what": one.what, "how": one.how} for one in found if not one.equal],
        "unread": {"first": list(unread[0]), "second": list(unread[1])},
    }


def show_outline(console: Console, outline: Outline, to: str, done: Location | None = None) -> None:
    """Prints what a conversion would write or, if `done`, what it wrote."""
    if done is None:
        table = Table("tensor", "state", "shape", "dtype", "bytes")
        for planned in outline.tensors:
            spec = planned.spec
            table.add_row(escape(planned.name), escape(planned.state), str(list(spec.shape)), spec.dtype, readable(planned.size))
        console.print(table)
    if outline.slicings:
        console.print(_sliced(outline.slicings))
    what = f"{len(outline.tensors)} tensors, {readable(outline.size)}, from {outline.detected.name} ({outline.detected.why}) to {to}"
    console.print(escape(f"would write {what}" if done is None else f"wrote {what}: {done}"), highlight=False, soft_wrap=True)
    for text in outline.left_out:
        console.print(f"left out, because {to} cannot hold it: {escape(text)}", highlight=False, soft_wrap=True)
    show_unread(console, outline.unread)

"""`elastic energy`: joules of a job's steps by stage, and the frontier of seconds and joules of its plan."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic.errors import ElasticError, SettingsError


def energy(
    job: Annotated[str, typer.Argument(help="The name of a job that runs on this host, or its directory.")],
    svg: Annotated[Path | None, typer.Option(help="Draw the frontier into this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Shows joules per step and per token by stage, and what other clocks would give."""
    from elastic.power import energy_file

    try:
        found = energy_file.read(job, Path(tempfile.gettempdir()))
        if svg is not None:
            draw(svg, f"{found['job']}: one clock a stage", found["frontier"], _marked(found))
        if as_json:
            print(json.dumps(found))
        else:
            console = Console(markup=False, emoji=False)
            _show(console, found)
            show_frontier(console, found["frontier"])
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        print(f"error: the energy figures of {job} cannot be shown: they are damaged, or of another version ({error!r})", file=sys.stderr)
        raise typer.Exit(1) from None


def draw(path: Path, title: str, frontier: list[dict[str, Any]], marked: dict[str, tuple[float, float]]) -> None:
    """Draws a frontier into a file. Raises SettingsError if there is none yet, or the file cannot be written."""
    from elastic.plan import frontier_picture

    if not frontier:
        raise SettingsError(
            "there is no frontier to draw: no stage has a model of time and power (dvfs= measures the clocks that it needs)"
        )
    try:
        path.write_text(frontier_picture.svg(title, [(each["step_s"], each["joules"]) for each in frontier], marked), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from error


def _marked(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Returns the predicted points: measured steps contain what the model does not, so they lie apart from the frontier."""
    predicted = found["predicted"]
    if predicted is None:
        return {}
    return {f"{name} clocks": (predicted[name]["step_s"], predicted[name]["joules"]) for name in ("usual", "chosen")}


def _show(console: Console, found: dict[str, Any]) -> None:
    now, usual = found["now"], found["usual"]
    if now is None:
        console.print(f"{found['job']}: nothing is measured yet (some steps are needed)")
        return
    table = Table(title=f"{found['job']}, epoch {found['epoch']}, dvfs {found['mode']}: {found['state']}")
    for heading in ("stage", "layers", "workers", "MHz", "s busy", "J a step", "J a token"):
        table.add_column(heading)
    for stage in found["stages"]:
        start, stop = stage["layers"]
        clocks = ", ".join(map(str, stage["clocks_mhz"]))
        workers = " ".join(map(str, stage["workers"]))
        figures = [f"{stage['busy_s']:.4g}", _number(stage["joules"]), _number(stage["joules_per_token"])]
        table.add_row(str(stage["stage"]), f"{start}-{stop - 1}", workers, clocks, *figures)
    table.add_row("all", "", "", "", f"{now['step_s']:.4g} a step", _number(now["joules"]), _number(now["joules_per_token"]))
    console.print(table)
    if usual is not None:
        console.print(f"with the usual clocks: {usual['step_s']:.4g} s and {_number(usual['joules'])} J a step, measured")
    for uuid, why in found["models"].items():
        console.print(f"{uuid}: {why}")
    for uuid, why in found["faults"].items():
        console.print(f"{uuid}: not counted, {why}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def show_frontier(console: Console, frontier: list[dict[str, Any]]) -> None:
    """Prints a frontier: predicted seconds and joules, and the clock of each stage."""
    if not frontier:
        return
    table = Table(title="what other clocks would give, predicted")
    for heading in ("s a step", "J a step", "clock of each stage"):
        table.add_column(heading)
    for each in frontier:
        clocks = " ".join("usual" if clock is None else str(clock) for clock in each["clocks_mhz"])
        table.add_row(f"{each['step_s']:.4g}", f"{each['joules']:.4g}", clocks)
    console.print(table)

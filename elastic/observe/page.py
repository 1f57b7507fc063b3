"""The report on a run as one HTML page, from the files of its run directory: it needs no other file and no network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from elastic.errors import SettingsError
from elastic.host.rundir import RunDirectory
from elastic.observe import drawing, incident
from elastic.observe.activity import RECOVERY_PHASES
from elastic.observe.drawing import LEFT, WIDTH, Scale
from elastic.observe.incident import Incident, counted
from elastic.observe.journal import LinesReader
from elastic.observe.step_log import utilization
from elastic.observe.top import operations

_FILES = Path(__file__).parent / "report_page"
STYLE = _FILES / "style.css"
"""The style of every page: this one, the live page, the chaos harness's report."""

_PHASES = ("detected", *RECOVERY_PHASES, "redo")
_LISTED = 200  # events and incidents that the page lists

Line = Mapping[str, Any]


def write(directory: RunDirectory, path: Path, job: str = "") -> None:
    """Writes the page. Raises SettingsError if the directory has nothing to report, OSError if the page cannot be written."""
    path.write_text(page(directory, job), encoding="utf-8")


def page(directory: RunDirectory, job: str = "") -> str:
    """Returns the page of the job that runs, or ran, in a run directory."""
    steps, events = LinesReader(directory.steps).read(), LinesReader(directory.events).read()
    if not events:
        raise SettingsError(
            f"{directory.path} has nothing to report: no job has begun to train there, or another host coordinates it and has the record"
        )
    begun = next((event for event in events if event["kind"] == "begun"), events[0])
    found = [(event["at"], Incident.from_json(event["incident"])) for event in events if event["kind"] == "incident"]
    ended = [event for event in events if event["kind"] == "ended"]
    last = max([event["at"] for event in events] + [line["at"] for line in steps])
    first = steps[0]["at"] if steps else begun["at"]
    scale = Scale(first=0.0, last=max(last - first, 1.0), form=clock)
    marks = [drawing.line(scale.x(at - first), 4, scale.x(at - first), 170, "event", _short(each)) for at, each in found]
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string((_FILES / "page.html").read_text()).render(
        style=STYLE.read_text(),
        job=begun.get("job", job) or job,
        began=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun["at"])),
        outcome=ended[-1]["outcome"] if ended else "runs" if directory.running else "lost",
        verdict={"done": "pass", "failed": "fail", "killed": "fail"}.get(ended[-1]["outcome"] if ended else "", "unknown"),
        why=ended[-1]["why"] if ended else "" if directory.running else "Its agent was killed: nothing says how it has ended.",
        tiles=_tiles(steps, found, last - begun["at"]),
        loss=_loss(steps),
        speed=_speed(steps, first, scale, marks),
        unit=_unit(steps),
        used=_used(steps, first, scale, marks),
        layout=_layout(events, first, last, scale),
        memory=_memory(steps, first, scale, marks),
        phases=_PHASES,
        bars=_bars([each for _, each in found[-_LISTED:]]),
        incidents=[(clock(max(0.0, at - first)), incident.timeline(each)) for at, each in found[-_LISTED:]],
        events=[(clock(max(0.0, each["at"] - first)), text) for each in events if (text := _event(each))][-_LISTED:],
        steps=len(steps),
    )


def clock(seconds: float) -> str:
    """Formats seconds such as `1:02:03`, `2:03` or `4.5 s`."""
    if seconds < 60:
        return f"{seconds:g} s" if seconds == int(seconds) else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _short(found: Incident) -> str:
    return f"{found.kind}, step {found.step}" + ("" if found.stall_ms is None else f", stalled {found.stall_ms:.0f} ms")


def _size(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _rate(line: Line) -> float | None:
    count = line["tokens"] or line["samples"]
    return count / line["seconds"] if line["seconds"] else None


def _unit(steps: Sequence[Line]) -> str:
    return "tokens/s" if steps and steps[-1]["tokens"] else "samples/s"


def _tiles(steps: Sequence[Line], found: Sequence[tuple[float, Incident]], seconds: float) -> list[tuple[str, str]]:
    rates = sorted(rate for line in steps if (rate := _rate(line)) is not None)
    stall = sum(max(0.0, each.stall_ms or 0.0) for _, each in found) / 1000
    losses = [line["loss"] for line in steps if line["loss"] is not None]
    memory = max((line.get("memory", 0) for line in steps), default=0)
    done = f"{steps[-1]['step'] + 1:,} of {steps[-1]['of']:,}" if steps else "0"
    return [
        (done, "steps"),
        (clock(seconds), "from start to end"),
        (f"{losses[-1]:.4f}" if losses else "-", "last loss"),
        (f"{rates[len(rates) // 2]:,.0f}" if rates else "-", f"{_unit(steps)}, median step"),
        (f"{len(found)}", f"incidents, {stall:.1f} s stalled"),
        (_size(memory) if memory else "-", "largest worker's memory"),
        *_achieved(steps),
    ]


def _achieved(steps: Sequence[Line]) -> list[tuple[str, str]]:
    """Returns the tile of the model's floating-point operations: their share of the peak, or if that is unknown their rate."""
    shares, rates = (
        sorted(_shares(steps)),
        sorted(each["flops"] / each["seconds"] for each in steps if each.get("flops") and each["seconds"]),
    )
    if shares:
        return [(f"{shares[len(shares) // 2]:.1%}", f"MFU, median step; {operations(rates[len(rates) // 2])}/s")]
    return [(f"{operations(rates[len(rates) // 2])}/s", "median step; the devices' peak is unknown")] if rates else []


def _shares(steps: Sequence[Line]) -> list[float]:
    return [share for line in steps if (share := _share(line)) is not None]


def _share(line: Line) -> float | None:
    return utilization(line.get("flops", 0), line["seconds"], line.get("peak_flops", 0.0))


def _used(steps: Sequence[Line], first: float, scale: Scale, marks: Sequence[str]) -> str:
    points = [(line["at"] - first, share) for line in steps if (share := _share(line)) is not None]
    return drawing.chart(points, scale, "second", "MFU over time", lambda value: f"{value:.3g}", zero=True, marks=marks) if points else ""


def _loss(steps: Sequence[Line]) -> str:
    points = [(float(line["step"]), line["loss"]) for line in steps if line["loss"] is not None]
    first, last = (points[0][0], points[-1][0]) if points else (0.0, 1.0)
    scale = Scale(first=first, last=max(last, first + 1), form=lambda value: f"{value:,.0f}")
    return drawing.chart(points, scale, "line", "loss by step", lambda value: f"{value:.4g}", zero=False) if points else ""


def _speed(steps: Sequence[Line], first: float, scale: Scale, marks: Sequence[str]) -> str:
    points = [(line["at"] - first, rate) for line in steps if (rate := _rate(line)) is not None]
    return drawing.chart(points, scale, "second", "throughput over time", _count, zero=True, marks=marks) if points else ""


def _count(value: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def _memory(steps: Sequence[Line], first: float, scale: Scale, marks: Sequence[str]) -> str:
    points = [(line["at"] - first, float(line["memory_sum"])) for line in steps if "memory_sum" in line]
    return drawing.chart(points, scale, "third", "memory of all workers over time", _size, zero=True, marks=marks) if points else ""


def _layout(events: Sequence[Line], first: float, last: float, scale: Scale) -> str:
    views = [event for event in events if event["kind"] == "view"]
    ends = [*(each["at"] for each in views[1:]), *[last] * bool(views)]
    spans = [
        (
            each["at"] - first,
            end - first,
            f"{each['epoch']}: {each['layout']}",
            f"epoch {each['epoch']}: {counted(len(each['workers']), 'worker')}, {each['layout']}, "
            f"from {clock(max(0.0, each['at'] - first))}",
        )
        for each, end in zip(views, ends, strict=True)
    ]
    return drawing.svg(70, [*scale.grid(46), *drawing.bands(spans, scale, 12)], "layout over time")


def _bars(found: Sequence[Incident]) -> str:
    """One bar for each incident, of its phases: from the fault to the first committed step."""
    rows = [(each, _parts(each)) for each in found]
    rows = [(each, parts) for each, parts in rows if parts]
    longest = max((sum(ms for _, ms in parts) for _, parts in rows), default=1.0)
    shapes, left = list[str](), LEFT + 98
    for row, (each, parts) in enumerate(rows):
        y, x = 6 + 24 * row, float(left)
        shapes.append(drawing.text(left - 8, y + 13, f"{each.kind}, step {each.step}", "axis", "end"))
        for phase, ms in parts:
            width = (WIDTH - left - 90) * ms / longest
            shapes.append(drawing.box(x, y, width - 1, 17, f"p{_PHASES.index(phase)}", f"{phase}: {ms:.1f} ms"))
            x += width
        shapes.append(drawing.text(x + 6, y + 13, f"{sum(ms for _, ms in parts):,.0f} ms", "axis"))
    return drawing.svg(12 + 24 * len(rows), shapes, "phases of each incident") if rows else ""


def _parts(found: Incident) -> list[tuple[str, float]]:
    parts = [("detected", found.detected_ms), *((phase, found.phases_ms.get(phase)) for phase in RECOVERY_PHASES), ("redo", found.redo_ms)]
    return [(phase, ms) for phase, ms in parts if ms]


def _event(event: Line) -> str:
    """Returns what the list of other events shows: not incidents and views, which are drawn."""
    if event["kind"] == "said":
        return str(event["text"])
    if event["kind"] == "save":
        return f"step {event['step']} is saved" if event["reason"] is None else f"step {event['step']} is not saved: {event['reason']}"
    if event["kind"] == "skipped":
        return f"step {event['step']} is skipped: {event['reason']}"
    return ""

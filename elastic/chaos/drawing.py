"""Drawings of a report as inline SVG, from its JSON: timeline, phases of incidents, stalls. Colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elastic.observe.activity import RECOVERY_PHASES
from elastic.observe.incident import counted

WIDTH = 1000
_LEFT, _RIGHT, _LEAST = 92, 12, 3.0
_FAMILIES = {
    "etcd": "c3",
    "disk": "c4",
    "corrupt": "c4",
    "partition": "c5",
    "delay": "c5",
    "host": "c5",
    "agent": "c2",
    "join": "c2",
    "drain": "c2",
}
FAMILY_NAMES = {"c1": "workers", "c2": "agents, hosts that join or leave", "c3": "etcd", "c4": "memory and disk", "c5": "network"}
PHASES = ("detected", *RECOVERY_PHASES, "redo")


def family(kind: str) -> str:
    """The class of a kind's colour."""
    return next((colour for start, colour in _FAMILIES.items() if kind.startswith(start)), "c1")


def _x(at: float, seconds: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * min(max(at, 0.0), seconds) / max(seconds, 1e-9)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1.5):.1f}" height="{height:.1f}" rx="2" class="{kind}">'
    return f"{shape}<title>{escape(title)}</title></rect>"


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def timeline(report: Mapping[str, Any]) -> str:
    """Faults in rows, the layouts of epochs, and tokens (or steps) per second, over seconds since the first step."""
    seconds = max([report["seconds"], *(fault["until"] or 0.0 for fault in report["faults"] if fault["at"] is not None)])
    faults, height = _faults(report["faults"], seconds)
    layouts = _layouts(report["layouts"], seconds, height + 8)
    speed = _speed(report["speed"], seconds, height + 46)
    bottom = height + 46 + 120
    return _svg(bottom + 26, [*_grid(seconds, bottom), *faults, *layouts, *speed], "faults, layouts and speed over time")


def _grid(seconds: float, bottom: float) -> list[str]:
    size = _step(seconds, 8)
    found = []
    for index in range(int(seconds / size) + 1):
        x = _x(index * size, seconds)
        found.append(f'<line x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{bottom:.1f}" class="grid"/>')
        found.append(_text(x, bottom + 16, f"{index * size:g} s", "axis", "middle"))
    return found


def _step(most: float, parts: int) -> float:
    """A round distance that divides `most` into about so many parts."""
    raw = max(most, 1e-9) / parts
    power = 10 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)


def _faults(faults: Sequence[Mapping[str, Any]], seconds: float) -> tuple[list[str], float]:
    """Marks of faults, in as many rows as their labels need; and the height of all rows."""
    ends: list[float] = []
    found = [_text(_LEFT - 8, 18, "faults", "axis", "end")]
    for fault in sorted((each for each in faults if each["at"] is not None), key=lambda each: each["at"]):
        x, until = _x(fault["at"], seconds), _x(fault["until"] or fault["at"], seconds)
        label = fault["kind"]
        right = x + len(label) * 6.6 > WIDTH - _RIGHT
        needs = x + 8 if right else max(until, x + len(label) * 6.6 + 8)
        row = next((row for row, end in enumerate(ends) if end <= (x - len(label) * 6.6 if right else x)), len(ends))
        ends[row : row + 1] = [needs + 6]
        y = 8 + 30 * row
        proof = fault["proof"] or f"no effect is proven: {fault['why']}"
        kind = family(fault["kind"]) if fault["proof"] else "unproven"
        found.append(_box(x, y + 14, max(until - x, _LEAST), 7, kind, f"{fault['fault']} at {fault['at']:.1f} s: {proof}"))
        found.append(_text(x if not right else x + 4, y + 11, label, "mark", "end" if right else "start"))
    return found, 8 + 30 * max(1, len(ends))


def _layouts(layouts: Sequence[Mapping[str, Any]], seconds: float, y: float) -> list[str]:
    found = [_text(_LEFT - 8, y + 16, "layout", "axis", "end")]
    for index, each in enumerate(layouts):
        end = layouts[index + 1]["at"] if index + 1 < len(layouts) else seconds
        x, width = _x(each["at"], seconds), _x(end, seconds) - _x(each["at"], seconds)
        title = f"epoch {each['epoch']} from step {each['step']}: {counted(each['workers'], 'worker')}, {each['layout']}"
        found.append(_box(x, y, width - 1, 24, f"epoch{index % 2}", title))
        label = next((text for text in (f"{each['epoch']}: {each['layout']}", f"{each['epoch']}", "") if len(text) * 6.6 + 8 < width), "")
        found.append(_text(x + 5, y + 16, label, "inside"))
    return found


def _speed(speed: Sequence[Mapping[str, float]], seconds: float, y: float) -> list[str]:
    tokens = any(each["tokens_per_s"] for each in speed)
    name, what = ("tokens_per_s", "tokens/s") if tokens else ("steps_per_s", "steps/s")
    most = max((each[name] for each in speed), default=0.0) or 1.0
    found = [_text(_LEFT - 8, y + 12, what, "axis", "end"), _text(_LEFT - 8, y + 28, f"{most:,.0f}", "axis", "end")]
    found.append(_text(_LEFT - 8, y + 118, "0", "axis", "end"))
    if speed:
        points = [(_x(each["at"], seconds), y + 116 - 108 * each[name] / most) for each in speed]
        line = " ".join(f"{x:.1f},{at:.1f}" for x, at in points)
        found.append(f'<polygon points="{points[0][0]:.1f},{y + 116:.1f} {line} {points[-1][0]:.1f},{y + 116:.1f}" class="area"/>')
        found.append(f'<polyline points="{line}" class="line"/>')
    return found


def incidents(found: Sequence[Mapping[str, Any]]) -> str:
    """One bar for each incident, of its phases: from the fault to the first committed step."""
    rows = [(each, _phases(each)) for each in found]
    rows = [(each, phases) for each, phases in rows if phases]
    longest = max((sum(ms for _, ms in phases) for _, phases in rows), default=1.0)
    parts, left = list[str](), 190
    for row, (each, phases) in enumerate(rows):
        y, x = 6 + 24 * row, float(left)
        parts.append(_text(left - 8, y + 13, f"{each['kind']}, step {each['step']}", "axis", "end"))
        for phase, ms in phases:
            width = (WIDTH - left - 90) * ms / longest
            parts.append(_box(x, y, max(0.0, width - 1), 17, f"p{PHASES.index(phase)}", f"{phase}: {ms:.1f} ms"))
            x += width
        parts.append(_text(x + 6, y + 13, f"{sum(ms for _, ms in phases):,.0f} ms", "axis"))
    return _svg(12 + 24 * max(1, len(rows)), parts, "phases of each incident")


def _phases(each: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = [("detected", each["detected_ms"]), *each["phases_ms"].items(), ("redo", each["redo_ms"])]
    return [(phase, float(ms)) for phase, ms in found if ms is not None and phase in PHASES]


def stalls(found: Sequence[Mapping[str, Any]]) -> str:
    """A histogram of stalls for each kind of fault, on a logarithmic scale from 0.1 to 100 s."""
    kinds = sorted({kind for each in found for kind in each["kinds"] or ["no fault"]})
    parts, left, right = list[str](), 190, WIDTH - 20
    bins = 18

    def x(seconds: float) -> float:
        return left + (right - left) * min(max((math.log10(max(seconds, 1e-3)) + 1) / 3, 0.0), 1.0)

    bottom = 12 + 40 * max(1, len(kinds))
    for seconds in (0.1, 0.3, 1, 3, 10, 30, 100):
        parts.append(f'<line x1="{x(seconds):.1f}" y1="4" x2="{x(seconds):.1f}" y2="{bottom}" class="grid"/>')
        parts.append(_text(x(seconds), bottom + 15, f"{seconds:g} s", "axis", "middle"))
    width = (right - left) / bins
    for row, kind in enumerate(kinds):
        y, counts = 8 + 40 * row, [0] * bins
        for each in found:
            if kind in (each["kinds"] or ["no fault"]):
                counts[min(bins - 1, int((x(each["seconds"]) - left) / width))] += 1
        parts.append(_text(left - 8, y + 28, f"{kind} ({sum(counts)})", "axis", "end"))
        for place, count in enumerate(counts):
            if count:
                height = 30 * count / max(counts)
                least, most = (10 ** (3 * each / bins - 1) for each in (place, place + 1))
                title = f"{kind}: {count} stall{'s' * (count > 1)} of {least:.2f} to {most:.2f} s"
                parts.append(
                    _box(
                        left + place * width + 1, y + 32 - height, width - 2, height, "none" if kind == "no fault" else family(kind), title
                    )
                )
    return _svg(bottom + 24, parts, "stalls by kind of fault")

"""Drawings for pages as inline SVG: lines over a scale, bands, bars. Colours are classes of the page's style; a name in a `<title>` shows
when a pointer rests on a shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1000
LEFT, RIGHT = 92, 12
_HEIGHT = 170
_POINTS = 800
_LETTER = 6.6  # the width of a letter of a label

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The horizontal scale from `first` to `last`; `form` formats a value."""

    first: float
    last: float
    form: Callable[[float], str]

    def x(self, value: float) -> float:
        """Returns the place of a value, at the edge if it is outside."""
        share = (value - self.first) / max(self.last - self.first, 1e-9)
        return LEFT + (WIDTH - LEFT - RIGHT) * min(max(share, 0.0), 1.0)

    def grid(self, bottom: float) -> list[str]:
        """Returns lines at round values, with labels below `bottom`."""
        size, found = round_step(self.last - self.first, 8), list[str]()
        for index in range(int((self.last - self.first) / size) + 1):
            value = self.first + index * size
            found += [line(self.x(value), 4, self.x(value), bottom), text(self.x(value), bottom + 16, self.form(value), "axis", "middle")]
        return found


def round_step(most: float, parts: int) -> float:
    """Returns a round distance that divides `most` into about so many parts."""
    raw = max(most, 1e-9) / parts
    power = 10 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def text(x: float, y: float, label: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(label)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid", title: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"><title>{escape(title)}</title></line>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1.5):.1f}" height="{height:.1f}" rx="2" class="{kind}">'
    return f"{shape}<title>{escape(title)}</title></rect>"


def svg(height: float, parts: Iterable[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def chart(
    points: Sequence[Point], scale: Scale, kind: str, label: str, form: Callable[[float], str], *, zero: bool, marks: Sequence[str] = ()
) -> str:
    """Returns a line chart; with `zero` its vertical scale begins there. `marks` are further parts, drawn below the line."""
    values = [value for _, value in points]
    most = max(values, default=1.0)
    least = 0.0 if zero else min(values, default=0.0)
    if most - least < 1e-12:
        most, least = most + (abs(most) or 1.0) * 0.05, 0.0 if zero else least - (abs(least) or 1.0) * 0.05
    y = lambda value: 8 + (_HEIGHT - 12) * (1 - (value - least) / (most - least))  # noqa: E731
    size = round_step(most - least, 5)
    parts = scale.grid(_HEIGHT)
    for index in range(int((most - math.ceil(least / size) * size) / size + 1e-9) + 1):
        value = (math.ceil(least / size) + index) * size
        parts += [line(LEFT, y(value), WIDTH - RIGHT, y(value)), text(LEFT - 8, y(value) + 4, form(value), "axis", "end")]
    parts += marks
    if points:
        places = " ".join(f"{scale.x(at):.1f},{y(value):.1f}" for at, value in thinned(points))
        parts.append(f'<polyline points="{places}" class="{kind}"/>')
    return svg(_HEIGHT + 24, parts, label)


def thinned(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """Returns at most about so many points: of each run of them, in order, the least and the greatest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    found: list[Point] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        found += sorted({min(run, key=lambda each: each[1]), max(run, key=lambda each: each[1])})
    return found


def bands(spans: Sequence[tuple[float, float, str, str]], scale: Scale, y: float, height: float = 24) -> list[str]:
    """Returns bands `(from, until, label, title)` side by side, with as much of the label as there is room for."""
    parts: list[str] = []
    for index, (begin, end, label, title) in enumerate(spans):
        x, width = scale.x(begin), scale.x(end) - scale.x(begin)
        parts.append(box(x, y, width - 1, height, f"epoch{index % 2}", title))
        short = label.partition(":")[0]
        fits = next((each for each in (label, short) if len(each) * _LETTER + 8 < width), "")
        parts.append(text(x + 5, y + height * 0.66, fits, "inside"))
    return parts

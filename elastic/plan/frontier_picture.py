"""Draws the frontier of seconds and joules of a step as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 360, 80, 50
_TICKS = 5

Point = tuple[float, float]
"""Seconds and joules of a step."""


def svg(title: str, frontier: Sequence[Point], marked: Mapping[str, Point]) -> str:
    """Returns the SVG: the frontier as a line, and each of `marked` as a point with its name."""
    points = [*frontier, *marked.values()]
    x, y = _scale([seconds for seconds, _ in points]), _scale([joules for _, joules in points])

    def place(point: Point) -> Point:
        return _LEFT + _WIDTH * x(point[0]), _TOP + _HEIGHT * (1 - y(point[1]))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 130}" height="{_TOP + _HEIGHT + 60}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 44}" text-anchor="middle">seconds of a step</text>',
        f'<text x="20" y="{_TOP - 12}">joules of a step</text>',
    ]
    parts += _grid([seconds for seconds, _ in points], [joules for _, joules in points], place)
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, frontier))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1b6ca8" stroke-width="2"/>')
    parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="#1b6ca8"/>' for px, py in map(place, frontier)]
    for name, point in marked.items():
        px, py = place(point)
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="#d1495b"/>')
        parts.append(f'<text x="{px + 9:.1f}" y="{py - 6:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * high or 1.0
    return low - margin, high + margin


class _Scale:
    def __init__(self, values: Sequence[float]) -> None:
        self._low, self._high = _range(values)

    def __call__(self, value: float) -> float:
        return (value - self._low) / (self._high - self._low)


def _scale(values: Sequence[float]) -> _Scale:
    return _Scale(values)


def _grid(seconds: Sequence[float], joules: Sequence[float], place: Callable[[Point], Point]) -> list[str]:
    parts = []
    (left, right), (bottom, top) = _range(seconds), _range(joules)
    for tick in range(_TICKS + 1):
        share = tick / _TICKS
        x, _ = place((left + share * (right - left), bottom))
        _, y = place((left, bottom + share * (top - bottom)))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" stroke="#eee"/>')
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        below, beside = f"{left + share * (right - left):.4g}", f"{bottom + share * (top - bottom):.4g}"
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle" fill="#555">{below}</text>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{beside}</text>')
    return parts

"""Draws a run of `dvfs.py` as SVG: the clock of each GPU, the seconds of each step, and the watts of all GPUs, over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 900, 130, 70, 40, 34
_COLORS = ("#1b6ca8", "#d1495b", "#3b8f5a", "#8a5fbf")


class Sample(NamedTuple):
    """The locked clocks in MHz (0: not locked) and the joules of all GPUs so far, at a monotonic time."""

    at: float
    locked: tuple[int, ...]
    joules: float


Points = list[tuple[float, float]]


def picture(title: str, samples: Sequence[Sample], steps: Sequence[dict[str, Any]], killed_at: float | None) -> str:
    """Returns the SVG."""
    start, end = samples[0].at, samples[-1].at
    clocks = [[(each.at, float(each.locked[gpu])) for each in samples] for gpu in range(len(samples[0].locked))]
    seconds = [(b["at"], b["at"] - a["at"]) for a, b in pairwise(steps)]
    watts = [(b.at, (b.joules - a.joules) / (b.at - a.at)) for a, b in zip(samples[::10], samples[10::10], strict=False) if b.at > a.at]
    typical = sorted(value for _, value in seconds)[len(seconds) * 9 // 10] if seconds else 1.0
    rows = [
        ("locked clock, MHz (0: as found)", clocks, 1500.0),
        ("seconds of a step", [[(at, min(value, 2.5 * typical)) for at, value in seconds]], 2.5 * typical),
        ("watts of all GPUs", [watts], 1.1 * max((value for _, value in watts), default=1.0)),
    ]
    height = _TOP + len(rows) * (_HEIGHT + _GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 30}" height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">dvfs="{escape(title)}" on four stand-in GPUs, nine layers in four stages</text>',
    ]
    for number, (label, lines, most) in enumerate(rows):
        parts += _row(_TOP + number * (_HEIGHT + _GAP), label, lines, most, (start, end), killed_at)
    return "\n".join([*parts, "</svg>"])


def _row(top: float, label: str, lines: list[Points], most: float, span: tuple[float, float], killed_at: float | None) -> list[str]:
    start, end = span

    def x(at: float) -> float:
        return _LEFT + _WIDTH * (at - start) / max(end - start, 1e-9)

    def y(value: float) -> float:
        return top + 16 + (_HEIGHT - 16) * (1 - value / most)

    parts = [f'<text x="{_LEFT}" y="{top + 8}" fill="#444">{escape(label)}</text>']
    for value in (0.0, most / 2, most):
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#666">{value:.4g}</text>')
    for second in range(0, int(end - start) + 1, 5):
        parts.append(f'<text x="{x(start + second):.1f}" y="{top + _HEIGHT + 14}" text-anchor="middle" fill="#666">{second} s</text>')
    if killed_at is not None:
        across = f'x1="{x(killed_at):.1f}" x2="{x(killed_at):.1f}" y1="{top + 14}" y2="{top + _HEIGHT}"'
        parts.append(f'<line {across} stroke="black" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{x(killed_at) + 4:.1f}" y="{top + 24}">SIGKILL of a worker</text>')
    for number, line in enumerate(lines):
        points = " ".join(f"{x(at):.1f},{y(value) - 2 * number:.1f}" for at, value in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_COLORS[number % len(_COLORS)]}" stroke-width="1.5"/>')
    return parts

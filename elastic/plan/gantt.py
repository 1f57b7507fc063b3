"""Draws one step as SVG: a row per worker, a box per action; empty space is a bubble. Takes a timeline, returns the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from elastic.plan.bubbles import Bubbles, breakdown, bubble_share
from elastic.plan.timeline import ActivityKind, Span, StepTimeline

_COLOURS: dict[ActivityKind, tuple[str, str, str]] = {
    "F": ("#3b76c4", "#ffffff", "forward"),
    "B": ("#2f8f5b", "#ffffff", "backward"),
    "I": ("#2f8f5b", "#ffffff", "backward (input)"),
    "W": ("#7fbf96", "#1f2328", "backward (weights)"),
    "sync": ("#8a5fb5", "#ffffff", "synchronisation"),
    "update": ("#d9822b", "#ffffff", "update"),
}
"""For each activity: the box colour, the colour of its text, and its name in the legend."""

_INK, _FAINT, _LINE = "#1f2328", "#59636e", "#d1d9e0"
_LEFT, _RIGHT, _HEAD, _FOOT = 146, 186, 62, 44
"""Pixels left, right, above and below the rows."""
_GLYPH = 0.62
"""The width of a digit, in font sizes."""
_TICKS = 8
_STAGE_GAP = 6

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Converts seconds to pixels; has the row of each worker."""

    end_s: float
    plot: float
    rows: dict[int, float]
    height: float
    bottom: float

    def x(self, seconds: float) -> float:
        return _LEFT + (self.plot * seconds / self.end_s if self.end_s else 0.0)


def svg(timeline: StepTimeline, title: str = "One step", width: int = 1280, row_height: int = 22) -> str:
    """Returns the picture, `width` pixels wide. Rows are in the order of the stages, and show how long their worker is idle.

    Numbers in boxes are micro-batches, left out where they do not fit.
    """
    scale = _scale(timeline, width, row_height)
    height = scale.bottom + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="11" fill="{_INK}" role="img">',
        f"<title>{escape(title)}</title>",
        '<defs><pattern id="bubble" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">',
        f'<rect width="6" height="6" fill="#f6f8fa"/><line x1="0" y1="0" x2="0" y2="6" stroke="{_LINE}" stroke-width="2"/>',
        "</pattern></defs>",
        f'<rect width="{width}" height="{height:g}" fill="#ffffff"/>',
        *_head(timeline, title, width),
        *_axis(scale),
        *(part for worker in scale.rows for part in _row(timeline, worker, scale)),
        *_labels(timeline, scale, width),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _scale(timeline: StepTimeline, width: int, row_height: int) -> _Scale:
    rows: dict[int, float] = {}
    top = float(_HEAD)
    for group in timeline.members:
        for worker in group:
            rows[worker] = top
            top += row_height
        top += _STAGE_GAP
    return _Scale(end_s=timeline.end_s, plot=max(width - _LEFT - _RIGHT, 1), rows=rows, height=row_height - 2, bottom=top)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}"{" " + more if more else ""}>{escape(text)}</text>'


def _head(timeline: StepTimeline, title: str, width: int) -> Iterator[str]:
    """The title, the total of the step, and a legend of the activities that occur."""
    yield _text(12, 22, title, 'font-size="15" font-weight="bold"')
    summary = f"{duration(timeline.end_s)}, {100 * bubble_share(timeline):.1f} % bubbles"
    yield _text(width - 12, 22, summary, 'font-size="13" text-anchor="end"')
    occurring = {span.activity for spans in timeline.spans.values() for span in spans}
    x = float(_LEFT)
    for activity, (fill, _, name) in [*_COLOURS.items(), (None, ("url(#bubble)", "", "bubble"))]:
        if activity is None or activity in occurring:
            yield f'<rect x="{x:.2f}" y="37" width="14" height="12" fill="{fill}" stroke="{_LINE}" stroke-width="0.5"/>'
            yield _text(x + 19, 47, name)
            x += 19 + len(name) * 11 * 0.56 + 18


def _axis(scale: _Scale) -> Iterator[str]:
    """Ticks at round times, and a line through all rows at each."""
    step, factor, unit = ticks(scale.end_s)
    for number in range(math.floor(scale.end_s / step + 1e-9) + 1 if step else 1):
        x = scale.x(number * step)
        yield f'<line x1="{x:.2f}" y1="{_HEAD - 4}" x2="{x:.2f}" y2="{scale.bottom:g}" stroke="{_LINE}"/>'
        yield _text(x, scale.bottom + 14, f"{number * step / factor:g}", f'text-anchor="middle" fill="{_FAINT}"')
    yield _text(_LEFT + scale.plot / 2, scale.bottom + 32, f"time since the step began [{unit}]", f'text-anchor="middle" fill="{_FAINT}"')


def _row(timeline: StepTimeline, worker: int, scale: _Scale) -> Iterator[str]:
    """The whole step as a bubble, with the worker's activities on top of it."""
    top = scale.rows[worker]
    yield f'<rect x="{_LEFT}" y="{top:g}" width="{scale.plot:g}" height="{scale.height:g}" fill="url(#bubble)"/>'
    for span in timeline.spans[worker]:
        yield from _box(span, top, scale)


def _box(span: Span, top: float, scale: _Scale) -> Iterator[str]:
    left, right = scale.x(span.start_s), scale.x(span.end_s)
    fill, ink, name = _COLOURS[span.activity]
    # A separate outline would hide boxes of a few pixels.
    edge = min(0.5, (right - left) / 8)
    shape = f'x="{left + edge / 2:.2f}" y="{top:g}" width="{right - left - edge:.2f}" height="{scale.height:g}" fill="{fill}"'
    label = str(span.micro_batch) if span.computes else span.activity
    tip = f"{name} {span.micro_batch}" if span.computes else name
    yield f"<rect {shape}><title>{tip}: {duration(span.start_s)} to {duration(span.end_s)}</title></rect>"
    font = min(11.0, scale.height * 0.7)
    if right - left >= len(label) * font * _GLYPH + 2 and font >= 5:
        more = f'font-size="{font:g}" text-anchor="middle" fill="{ink}" pointer-events="none"'
        yield _text((left + right) / 2, top + scale.height / 2 + font * 0.36, label, more)


def _labels(timeline: StepTimeline, scale: _Scale, width: int) -> Iterator[str]:
    """Stages and workers on the left; how idle each worker is, and the main cause, on the right."""
    font = min(11.0, scale.height * 0.8)
    bubbles = breakdown(timeline)
    middle = scale.height / 2 + font * 0.36
    yield _text(_LEFT + scale.plot + 10, _HEAD - 8, "bubbles", f'fill="{_FAINT}"')
    for stage, group in enumerate(timeline.members):
        first, last = scale.rows[group[0]], scale.rows[group[-1]] + scale.height
        yield f'<line x1="8" y1="{first:g}" x2="8" y2="{last:g}" stroke="{_FAINT}" stroke-width="2"/>'
        yield _text(14, (first + last) / 2 + 4, f"stage {stage}", 'font-weight="bold"')
        for worker in group:
            y = scale.rows[worker] + middle
            yield _text(_LEFT - 8, y, f"worker {worker}", f'font-size="{font:g}" text-anchor="end"')
            yield _text(_LEFT + scale.plot + 10, y, _idle(bubbles[worker], scale.end_s), f'font-size="{font:g}"')


def _idle(bubbles: Bubbles, end_s: float) -> str:
    """Returns a text such as `27.3 %, mostly drain`."""
    if not bubbles.idle_s:
        return "0.0 %"
    causes = {"fill": bubbles.fill_s, "dependencies": bubbles.wait_s, "sync wait": bubbles.sync_s, "drain": bubbles.drain_s}
    return f"{100 * bubbles.idle_s / end_s:.1f} %, mostly {max(causes, key=lambda cause: causes[cause])}"


def duration(seconds: float) -> str:
    """Returns a text such as `1.25 s`, `80 ms` or `3.5 µs`: three digits, in a suitable unit."""
    factor, unit = _unit(seconds)
    return f"{seconds / factor:.3g} {unit}"


def ticks(end_s: float) -> tuple[float, float, str]:
    """Returns the seconds between ticks (1, 2 or 5 times a power of ten, so that there are few), and the axis's unit with its seconds."""
    factor, unit = _unit(end_s)
    if end_s <= 0:
        return 0.0, factor, unit
    rough = end_s / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * round_number for round_number in (1, 2, 5, 10) if power * round_number >= rough * (1 - 1e-9))
    return step, factor, unit


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[0] if seconds <= 0 else _UNITS[-1])

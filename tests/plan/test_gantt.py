"""Tests that the SVG is well-formed, and has every action, bubble share, stage and tick in its place."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few
from schedule_strategies import cases, column, updating

from elastic.plan import gantt
from elastic.plan.bubbles import bubble_share
from elastic.plan.simulation import judge
from elastic.plan.timeline import StepTimeline
from elastic.plan.timing import Timing

SVG = "{http://www.w3.org/2000/svg}"


def read(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def boxes(root: ElementTree.Element) -> list[tuple[str, dict[str, str]]]:
    """The tips of the boxes, and their places."""
    return [(tip.text or "", dict(rect.attrib)) for rect in root.iter(f"{SVG}rect") if (tip := rect.find(f"{SVG}title")) is not None]


@few
@given(cases())
def test_every_span_is_a_box_within_the_picture(case):
    workload, stages, routes, timing = case
    timeline = judge(workload, stages, routes, timing=timing)
    root = read(gantt.svg(timeline))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    found = boxes(root)
    assert len(found) == sum(len(spans) for spans in timeline.spans.values())
    for _, box in found:
        left, top, across, down = (float(box[name]) for name in ("x", "y", "width", "height"))
        assert across >= 0
        assert 0 <= left <= left + across <= width
        assert 0 <= top <= top + down <= height
    assert not {element.tag for element in root.iter()} & {f"{SVG}script", f"{SVG}image"}
    assert f"{gantt.duration(timeline.end_s)}, {100 * bubble_share(timeline):.1f} % bubbles" in texts(root)


def test_boxes_are_as_long_as_their_actions_and_do_not_overlap():
    case = column([(0.5, 1.5), (1, 2)], 3)
    timeline = judge(*case)
    root = read(gantt.svg(timeline))
    found = [(tip, float(box["x"]), float(box["width"]), box["y"]) for tip, box in boxes(root)]
    per_second = next(across for tip, _, across, _ in found if tip.startswith("backward")) / 1.5
    for (_, left, across, row), (_, following, _, below) in pairwise(found):
        assert row != below or left + across <= following + 1e-6
    spans = [span for worker in (0, 1) for span in timeline.spans[worker]]
    for span, (_, _, across, _) in zip(spans, found, strict=True):
        assert across == pytest.approx((span.end_s - span.start_s) * per_second, abs=1.0)


def test_boxes_are_where_the_axis_says():
    root = read(gantt.svg(judge(*column([(1, 2)] * 2, 2))))
    axis = {
        element.text: float(element.attrib["x"]) for element in root.iter(f"{SVG}text") if "middle" in element.attrib.get("text-anchor", "")
    }
    found = {tip: (float(box["x"]), float(box["x"]) + float(box["width"])) for tip, box in boxes(root)}
    assert found["backward 0: 4 s to 6 s"] == pytest.approx((axis["4"], axis["6"]), abs=0.6)
    assert found["backward 0: 2 s to 4 s"] == pytest.approx((axis["2"], axis["4"]), abs=0.6)


def test_it_names_workers_stages_numbers_and_kinds():
    case = column([(1, 2)] * 3, 4)
    timing = replace(updating(Timing.of(*case[:2]), {0: 1.0}), sync_s=(1.0,) * 3)
    root = read(gantt.svg(judge(*case, timing=timing), title="<One> & step"))
    shown = texts(root)
    assert "<One> & step" in shown
    assert {"stage 0", "stage 1", "stage 2", "worker 0", "worker 1", "worker 2"} <= set(shown)
    assert {"forward", "backward", "synchronisation", "update", "bubble"} <= set(shown)
    assert [shown.count(str(number)) >= 6 for number in range(4)] == [True] * 4
    assert shown.count("sync") == 3


def test_numbers_are_left_out_where_they_do_not_fit():
    timeline = judge(*column([(1, 2)], 400))
    shown = texts(read(gantt.svg(timeline, width=600)))
    assert "399" not in shown
    assert len(boxes(read(gantt.svg(timeline)))) == 800


def test_rows_say_how_idle_they_are_and_why():
    shown = texts(read(gantt.svg(judge(*column([(1, 2)] * 4, 8)))))
    assert [text for text in shown if "mostly" in text] == [f"27.3 %, mostly {why}" for why in ["dependencies"] * 2 + ["drain"] * 2]
    assert "0.0 %" in texts(read(gantt.svg(judge(*column([(1, 2)], 2)))))


@pytest.mark.parametrize(
    ("end_s", "step_s", "unit"),
    [(8.0, 1.0, "s"), (33.0, 5.0, "s"), (0.33, 0.05, "ms"), (1.0, 0.2, "s"), (2e-5, 5e-6, "µs"), (100.0, 20.0, "s")],
)
def test_ticks_are_round(end_s, step_s, unit):
    step, _, name = gantt.ticks(end_s)
    assert step == pytest.approx(step_s)
    assert name == unit


@given(st.floats(1e-7, 1e6))
def test_there_are_a_few_ticks(end_s):
    step, factor, _ = gantt.ticks(end_s)
    assert 3 <= end_s / step <= 8.001
    assert f"{step / factor:.3g}".strip("0.")[:1] in "125"


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0 s"), (1.25, "1.25 s"), (0.08, "80 ms"), (3.5e-6, "3.5 µs"), (5e-9, "0.005 µs")])
def test_durations(seconds, text):
    assert gantt.duration(seconds) == text


def test_a_step_of_no_time_can_be_drawn():
    assert read(gantt.svg(StepTimeline(members=((0,),), spans={0: ()}))).tag == f"{SVG}svg"

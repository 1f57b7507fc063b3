from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import MismatchError, PlanError
from elastic.layout.invariants import check
from elastic.membership.founding import Ready, check_equal, first_difference, found, strangers
from tests.announcement import LAYERS, MODEL, announcement


def ready(*, profile: bool = False) -> Ready:
    return Ready.from_json(announcement(profile=profile), "host")


def test_the_first_view_has_everybody_and_a_sound_layout() -> None:
    view = found({2: ready(), 0: ready(profile=True), 1: dataclasses.replace(ready(), host="other", address="tcp:1")}, 2)
    assert (view.epoch, view.attempt) == (1, 0)
    assert [(member.worker, member.host, member.address) for member in view.members] == [
        (0, "host", "unix:@nowhere"),
        (1, "other", "tcp:1"),
        (2, "host", "unix:@nowhere"),
    ]
    assert len(view.plan.stages) == 2
    assert sorted(view.plan.workers) == [0, 1, 2]
    assert view.layout.model == MODEL
    check(view.layout)


def test_the_profile_may_come_from_any_worker() -> None:
    assert found({0: ready(), 1: ready(profile=True)}, 1).workload.layers[0].backward_s == 0.02


@pytest.mark.parametrize(
    ("host", "why"), [("other", "hosts host and other cannot train together: a.py differs"), ("host", "a.py was edited after")]
)
def test_code_that_differs_between_hosts_or_was_edited_meanwhile(host: str, why: str) -> None:
    one = dataclasses.replace(ready(), code={"a": ["a.py", "text"]})
    with pytest.raises(MismatchError, match=why):
        check_equal({0: one, 1: dataclasses.replace(one, host=host, code={"a": ["a.py", "other text"]})})


def test_hosts_are_strangers_whose_workers_have_imported_another_text_than_those_of_the_founders_host() -> None:
    ours = dataclasses.replace(ready(), code={"a": ["a.py", "text"], "b": ["b.py", "text"]})
    equal = dataclasses.replace(ours, host="equal", code={"a": ["/elsewhere/a.py", "text"], "c": ["c.py", "more"]})
    other = dataclasses.replace(ours, host="other", code={"a": ["/there/a.py", "text"], "b": ["/there/b.py", "edited"]})
    torn = dataclasses.replace(ours, host="torn", code={"a": ["a.py", "edited"]})
    announced = {0: other, 1: ours, 2: equal, 3: other, 4: torn, 5: dataclasses.replace(ours, host="torn")}
    assert strangers(announced, "host") == {"other": "/there/b.py", "torn": "a.py"}
    assert strangers({0: ours, 1: equal}, "host") == {}
    assert "other" in check_fails({0: ours, 1: other})


def check_fails(announced: dict[int, Ready]) -> str:
    with pytest.raises(MismatchError) as error:
        check_equal(announced)
    return str(error.value)


def test_nobody_measured() -> None:
    with pytest.raises(MismatchError, match=r"none of the workers \[0, 1\] measured"):
        found({0: ready(), 1: ready()}, None)


def test_too_many_stages() -> None:
    with pytest.raises(PlanError):
        found({worker: ready(profile=True) for worker in range(8)}, LAYERS + 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": {"torch": "2", "MKL_CBWR": "AVX512,STRICT"}}, r"workers 1, 2 .* fingerprint\.MKL_CBWR is 'AVX512,STRICT' there"),
        ({"settings": {"batch_size": 64}}, r"workers 1, 2 cannot .* settings\.batch_size is 64 there and 32 on worker 0"),
        ({"grains": 4}, "grains is 4 there and 8 on worker 0"),
        ({"digest": "e"}, "digest is 'e' there and 'd' on worker 0; seed the initial weights alike"),
        ({"model": {"layers": []}}, "build the same model"),
    ],
)
def test_a_difference_names_workers_and_field(change: dict[str, Any], said: str) -> None:
    other = dataclasses.replace(ready(), **change)
    with pytest.raises(MismatchError, match=said):
        check_equal({0: ready(), 1: other, 2: other})


def test_one_differing_worker_is_singular() -> None:
    with pytest.raises(MismatchError, match=r"^worker 3 cannot"):
        check_equal({1: ready(), 3: dataclasses.replace(ready(), digest="e")})


def test_address_host_and_profile_may_differ() -> None:
    check_equal({0: ready(profile=True), 1: dataclasses.replace(ready(), host="other", address="elsewhere")})


def test_an_announcement_of_another_form_is_refused() -> None:
    with pytest.raises(MismatchError, match="color"):
        Ready.from_json({**announcement(), "color": "red"}, "host")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_the_first_difference_is_one_and_is_where_it_says(here: Any, there: Any) -> None:
    if here == there:
        return
    place, one, other = first_difference("root", here, there)
    assert one != other
    path = place.removeprefix("root").replace("[", ".").replace("]", "").split(".")[1:]
    for step in path:
        key = int(step) if step.isdigit() else step
        here = here[key] if isinstance(here, list) else here.get(key)
        there = there[key] if isinstance(there, list) else there.get(key)
    assert (here, there) == (one, other)

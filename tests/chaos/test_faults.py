from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.chaos.faults import Fault, in_order, parse
from elastic.errors import SettingsError
from elastic.observe.activity import PHASES

PLACES = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(tuple)


@given(st.builds(Fault, PLACES, st.integers(0, 10**9), st.none() | st.sampled_from(PHASES[1:])))
def test_what_is_written_is_read_back(fault: Fault) -> None:
    assert parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1@8", Fault((1,), 8)),
        (" 0@22:reduce ", Fault((0,), 22, "reduce")),
        ("1,2@8", Fault((1, 2), 8)),
        ("3,0@0:commit", Fault((3, 0), 0, "commit")),
    ],
)
def test_forms(text: str, fault: Fault) -> None:
    assert parse(text) == fault
    assert str(fault) == text.strip()


@pytest.mark.parametrize("text", ["", "8", "@8", "1@", "1@-2", "-1@8", "c@8", "1,@8", "1 2@8", "1@8.5", "1@8 reduce"])
def test_what_is_no_fault_is_told_the_form(text: str) -> None:
    with pytest.raises(SettingsError, match="is not a fault: write a place, @ and a step, such as 1@8, 0@22:reduce or 1,2@8"):
        parse(text)


@pytest.mark.parametrize("phase", ["", "idle", "Forward", "lunch", "reduce:gate"])
def test_an_unknown_phase_is_told_which_there_are(phase: str) -> None:
    with pytest.raises(SettingsError, match=rf"there is no phase '{phase}': use one of forward, backward, reduce, .*, gate, commit"):
        parse(f"1@8:{phase}")


@pytest.mark.parametrize(("places", "step"), [((), 8), ((-1,), 8), ((1, 1), 8), ((1,), -1)])
def test_impossible_faults_are_refused(places: tuple[int, ...], step: int) -> None:
    with pytest.raises(SettingsError):
        Fault(places, step)


def test_faults_are_taken_by_step() -> None:
    assert [str(fault) for fault in in_order(map(parse, ["0@22", "2@8", "1@8:gate"]))] == ["2@8", "1@8:gate", "0@22"]

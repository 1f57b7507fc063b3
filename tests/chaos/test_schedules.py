"""Tests schedules as values: their text, TOML and JSON forms, what they refuse, and random ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from elastic.chaos import injection, scenario
from elastic.chaos.inject import INJECT
from elastic.chaos.injection import Injection
from elastic.chaos.kinds import KINDS, ONE_HOST
from elastic.chaos.random_schedule import drawn
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.cli.chaos_schedule import schedule_of
from elastic.errors import SettingsError

_NUMBERS = strategies.floats(0.5, 1e4).map(lambda number: float(f"{number:g}"))


@strategies.composite
def injections(draw: strategies.DrawFn) -> Injection:
    """Faults of a job with three hosts of two workers."""
    kind = draw(strategies.sampled_from(sorted(KINDS)))
    data: dict = {"kind": kind, "place": draw(strategies.integers(0, 5)), "host": draw(strategies.integers(0, 2))}
    if draw(strategies.booleans()):
        data["time"] = draw(_NUMBERS)
    else:
        data["step"] = draw(strategies.integers(0, 10**6))
    phases = KINDS[kind].phases if kind == "kill-during-recovery" or "step" in data else ()
    if phases and draw(strategies.booleans()):
        data["phase"] = draw(strategies.sampled_from(phases))
    if KINDS[kind].seconds is not None and draw(strategies.booleans()):
        data["seconds"] = draw(_NUMBERS)
    if kind in ("slow", "delay") and draw(strategies.booleans()):
        data["factor"] = draw(_NUMBERS) + 1
    data["settled"] = draw(strategies.booleans())
    return Injection(**data)


@hypothesis.given(injections())
def test_the_text_form_is_parsed_back(fault: Injection):
    parsed = injection.parse(str(fault))
    assert str(parsed) == str(fault)
    assert parsed.kind == fault.kind
    assert Injection.from_json(fault.to_json()) == fault


@hypothesis.given(strategies.lists(injections(), max_size=5))
def test_schedules_have_a_json_and_a_toml_form(faults: list[Injection]):
    schedule = Schedule(job=JobSpec(hosts=3, workers=2, args=("a", 1.5, [1], {"b": True})), injections=tuple(faults), seed=4)
    assert Schedule.from_json(schedule.to_json()) == schedule
    for each in (schedule, replace(schedule, drawn=True)):
        assert scenario.parsed(scenario.written(each)) == each


WRONG = [
    ("[[fault]]\nkind = 'explode'\ntime = 1", "there is no fault 'explode': use kill, kill-many"),
    ("[[fault]]\ntime = 1", "a fault needs a kind"),
    ("[[fault]]\nkind = 'kill'", "give either a time"),
    ("[[fault]]\nkind = 'kill'\ntime = 1\nstep = 2", "give either a time"),
    ("[[fault]]\nkind = 'kill'\nstep = -1", "step=-1 is not a number of at least 0"),
    ("[[fault]]\nkind = 'kill'\nstep = 1\nworker = 'a'", "a fault has no worker: use kind, time"),
    ("[[fault]]\nkind = 'kill'\nstep = 1\nplace = 1.5", "place=1.5 is not a number"),
    ("[[fault]]\nkind = 'kill'\nstep = 1\nphase = 'gate'", "there is no phase 'gate': use one of forward"),
    ("[[fault]]\nkind = 'kill'\ntime = 1\nphase = 'forward'", "a phase needs a step"),
    ("[[fault]]\nkind = 'corrupt'\nstep = 3\nphase = 'apply'", "corrupt: there is no phase 'apply': use one of forward, backward"),
    ("[[fault]]\nkind = 'etcd-down'\nstep = 3\nphase = 'apply'", "etcd-down: it waits for no phase: leave 'apply' out"),
    ("[job]\nworkers = 1\n[[fault]]\nkind = 'kill-during-recovery'\nstep = 3", "needs 2 workers, and the job has 1: give --workers 2"),
    ("[[fault]]\nkind = 'kill'\ntime = 1\nseconds = 3", "kill is over at once; leave seconds out"),
    ("[[fault]]\nkind = 'stop'\ntime = 1\nfactor = 3", "factor is for slow"),
    ("[[fault]]\nkind = 'slow'\ntime = 1\nfactor = 0.5", "at least 1"),
    ("[[fault]]\nkind = 'slow'\ntime = 1\nfactor = 1", "a worker is slow with a factor above 1"),
    ("[[fault]]\nkind = 'slow'\ntime = 1\nseconds = 0", "for some seconds"),
    ("[[fault]]\nkind = 'kill'\ntime = nan", "time=nan is not a number of at least 0"),
    ("[[fault]]\nkind = 'stop'\ntime = 1\nseconds = inf", "seconds=inf is not a number of at least 0"),
    ("[[fault]]\nkind = 3\ntime = 1", "there is no fault 3"),
    ("[[fault]]\nkind = 'kill'\ntime = 1\nplace = 3", "there is no worker at place 3: the job has 3, counted from 0"),
    ("[job]\nhosts = 2\n[[fault]]\nkind = 'partition'\ntime = 1\nhost = 2", "there is no host 2: the job has 2, counted from 0"),
    ("fault = [1]", "each fault is a table"),
    ("seed = 'x'", "a seed is a whole number"),
    ("[job]\nscript = 3", "script=3: name a train function"),
    ("[job]\nargs = 3", "args=3: use a list"),
    ("[job]\nstages = 'a'", "stages='a': use a whole number"),
    ("[job]\nminutes = nan", "minutes=nan: use a number of at least 0"),
    ("[[fault]]\nkind = 'partition'\ntime = 1", "needs 2 hosts, and the job has 1: give --hosts 2"),
    ("[job]\nsteps = 10\n[[fault]]\nkind = 'kill'\nstep = 10", "is due after the last step: the job has 10 steps"),
    ("[job]\nminutes = 0.5\n[[fault]]\nkind = 'kill'\ntime = 30", "is due after the end: the job runs for 30 s"),
    ("[job]\nworkers = 0", "workers=0: use a whole number of at least 1"),
    ("[job]\nstages = 9", "stages=9: use 1 to 3"),
    ("[job]\nworker = 2", "a job has no worker: use script, args"),
    ("[job]\netcd = 'mine'", "etcd='mine': use 'private'"),
    ("jobs = 2", "a schedule has no jobs"),
    ("fault = 3", "use one table [job]"),
    ("[job", "it is not TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_refused_with_advice(text: str, message: str):
    with pytest.raises(SettingsError) as caught:
        scenario.parsed(text)
    assert message in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "s.toml").write_bytes(b"\x89PNG")
    with pytest.raises(SettingsError, match=r"s.toml: it is not TOML: .*can't decode byte 0x89"):
        scenario.load(tmp_path / "s.toml")


def test_the_scenario_of_the_documentation_is_one():
    text = (Path(__file__).parents[2] / "docs" / "chaos.md").read_text()
    lines = text[text.index("    [job]") : text.index("How some are injected")].splitlines()
    schedule = scenario.parsed("\n".join(line.strip() for line in lines))
    assert list(map(str, schedule.injections)) == ["kill@12:backward place=1", "stop@3.5s seconds=4"]
    assert (schedule.job.workers, schedule.job.steps, schedule.job.checkpoint_every) == (4, 60, 20)


@pytest.mark.parametrize("text", ["kill", "kill@", "kill@x", "kill@1.5", "kill@3 place=a", "kill@3 place", "@3", "kill@3:"])
def test_texts_that_are_no_faults_are_refused(text: str):
    with pytest.raises(SettingsError):
        injection.parse(text)


def test_every_kind_can_be_injected():
    assert set(INJECT) == set(KINDS)


@pytest.mark.parametrize("hosts", [1, 3])
def test_random_schedules_follow_from_their_seed(hosts: int):
    job = JobSpec(hosts=hosts, minutes=10.0)
    one, same, other = drawn(job, 1, 5.0), drawn(job, 1, 5.0), drawn(job, 2, 5.0)
    assert one == same != other
    kinds = {each.kind for each in one.injections}
    assert kinds <= (set(ONE_HOST) if hosts == 1 else set(KINDS))
    assert len(kinds) > 5
    times = [each.time or 0.0 for each in one.injections]
    assert times == sorted(times)
    assert times[-1] < 600.0 - 4.0
    assert 30 < len(times) < 180


def test_random_schedules_have_the_asked_kinds_and_number():
    made = drawn(JobSpec(minutes=30.0), 4, 2.0, ["kill", "stop"], faults=20)
    assert len(made.injections) == 20
    assert {each.kind for each in made.injections} == {"kill", "stop"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtbf_s": float("nan")}, "the mean time between faults is a number of seconds above 0"),
        ({"mtbf_s": 0.0}, "the mean time between faults is a number of seconds above 0"),
        ({"mtbf_s": 1.0, "kinds": ["kil"]}, "there is no fault 'kil'"),
        ({"mtbf_s": 50.0, "faults": 90}, "do not fit into 1 minutes"),
        ({"mtbf_s": 1.0, "kinds": ["drain"]}, "needs 2 hosts"),
        ({"mtbf_s": 1e9}, "no fault at a mean distance of 1e+09 s fits into 1 minutes"),
    ],
)
def test_random_schedules_that_cannot_be_are_refused(options: dict, message: str):
    with pytest.raises(SettingsError) as caught:
        drawn(JobSpec(minutes=1.0), 1, **options)
    assert message in str(caught.value)


def test_a_host_that_joins_has_workers_that_can_be_hit():
    faults = tuple(map(injection.parse, ["join@1", "kill@9 place=5", "kill@9 host=1"]))
    assert len(Schedule(job=JobSpec(workers=3), injections=faults).injections) == 3


def test_what_a_schedule_needs_of_the_job():
    def needs(text: str, **job: int) -> tuple[bool, bool]:
        made = Schedule(job=JobSpec(**job), injections=(injection.parse(text),))
        return made.shared, made.own_etcd

    assert needs("kill@1") == (False, False)
    assert needs("etcd-down@1") == (False, True)
    assert needs("join@1") == (True, True)
    assert needs("kill@1", hosts=2) == (True, True)


def test_options_of_the_command_change_the_job_of_a_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.py").write_text("def train(job):\n    pass\n")
    (tmp_path / "s.toml").write_text("[job]\nscript = 'train.py:train'\n[[fault]]\nkind = 'kill'\ntime = 70")
    monkeypatch.chdir(tmp_path)
    given = {"mtbf": 6.0, "faults": None, "fault": None}
    made = schedule_of(Path("s.toml"), {"minutes": 2.0, "workers": 2}, 0, **given)
    assert (made.job.minutes, made.job.workers, made.job.script) == (2.0, 2, f"{tmp_path}/train.py:train")
    with pytest.raises(SettingsError, match="due after the end: the job runs for 60 s"):
        schedule_of(Path("s.toml"), {"minutes": 1.0}, 0, **given)
    assert schedule_of(None, {}, 0, **given).job.minutes == 1.0

"""Tests jobs that stop and resume from a checkpoint, on any layout: the result equals that of an uninterrupted job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer
from elastic.checkpoint.directory import found, newest
from elastic.checkpoint.objects import open_store
from elastic.checkpoint.store import LocalStore
from elastic.errors import ElasticError, SettingsError
from tests.checkpoint import saved_trainings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]
STEPS = 9


def run(
    folder: Path | str,
    steps: int,
    every: int | None = None,
    *,
    plain: bool = False,
    keep: int | None = None,
    pause_s: float = 0.0,
    **layout: Any,
) -> Any:
    return elastic.run(saved_trainings.train, args=[str(folder), every, steps, plain, keep, pause_s], rebalance=False, **layout).value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"), STEPS, plain=True, workers=2, stages=1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"workers": 4, "stages": 2}, {"workers": 3, "stages": 2}, id="4 in 2 to 3 in 2", marks=pytest.mark.long),
        pytest.param({"workers": 1}, {"workers": 4, "stages": 2}, id="1 to 4 in 2", marks=pytest.mark.long),
        pytest.param({"workers": 3, "stages": 3}, {"workers": 1}, id="3 in 3 to 1", marks=pytest.mark.long),
    ],
)
def test_a_job_goes_on_where_another_one_stopped(first: Any, second: Any, tmp_path: Path, whole: dict[str, Any]) -> None:
    before = run(tmp_path, 5, **first)
    assert [entry.name for entry in found(LocalStore(tmp_path))] == ["step-00000005"]
    after = run(tmp_path, STEPS, **second)
    assert before["losses"] + after["losses"] == whole["losses"]
    assert after["digest"] == whole["digest"]
    assert newest(LocalStore(tmp_path), verify=True).contents.step == STEPS  # pyright: ignore[reportOptionalMemberAccess]
    (weights,) = (tmp_path / f"step-{STEPS:08d}").glob("model-*.safetensors")
    assert len(load_file(weights)) > 5


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["file", pytest.param("local", marks=pytest.mark.long)])
def test_a_url_is_a_place_for_checkpoints(scheme: str, tmp_path: Path, whole: dict[str, Any]) -> None:
    """`local` goes through fsspec: several workers, into objects that none of them can write together."""
    url = f"{scheme}://{tmp_path}/run"
    before = run(url, 5, 2, keep=2, workers=3, stages=2)
    after = run(url, STEPS, workers=2, stages=1)
    assert before["losses"] + after["losses"] == whole["losses"]
    assert after["digest"] == whole["digest"]
    source = newest(open_store(url), verify=True)
    assert source is not None
    assert source.contents.step == STEPS
    assert isinstance(open_store(url), LocalStore) == (scheme == "file")
    (weights,) = (tmp_path / "run" / source.name).glob("model-*.safetensors")
    assert len(load_file(weights)) > 5
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.long
def test_one_process_can_save_into_its_memory() -> None:
    assert elastic.run(saved_trainings.into_memory, args=[3, 2], workers=1).value == [3, 2]


@pytest.mark.long
def test_memory_that_workers_do_not_share_is_refused() -> None:
    with pytest.raises(ElasticError, match=r"memory://run: this storage is private to a process"):
        elastic.run(saved_trainings.into_memory, args=[2, None], workers=2)


@pytest.mark.long
def test_deaths_while_saves_are_under_way(tmp_path: Path) -> None:
    """A member's and the coordinator's, in a job that saves after every step: saves are given up, steps are not, replacements save too."""
    steps = 60
    calm = run(tmp_path / "calm", steps, plain=True, workers=2, stages=1)
    with Killer(tmp_path / "run", [parse("1@6"), parse("0@30")], seed=4) as killer:
        value = run(tmp_path / "saved", steps, 1, workers=3, stages=2, directory=tmp_path / "run", pause_s=0.03)
        assert killer.close() == ()
    for step, *figures in value["losses"]:
        assert figures == calm["losses"][step][1:]
    assert value["digest"] == calm["digest"]
    sources = [entry.source for entry in found(LocalStore(tmp_path / "saved"))]
    assert sources[0] is not None
    assert sources[0].contents.step == steps
    saved = [source.contents.step for source in sources if source is not None]
    assert any(step is not None and 10 < step < 30 for step in saved)
    assert any(step is not None and 35 < step < steps for step in saved)
    for source in sources:
        assert source is not None
        source.verify()
    assert run(tmp_path / "saved", steps + 2, workers=1)["losses"][0][0] == steps


@pytest.mark.parametrize(
    ("how", "reason"), [("no space", "File too large"), pytest.param("no directory", "Not a directory", marks=pytest.mark.long)]
)
def test_training_goes_on_where_nothing_can_be_saved(
    how: str, reason: str, tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    result = elastic.run(saved_trainings.beside_a_broken_disk, args=[str(tmp_path / "run"), how], workers=2, rebalance=False).value
    assert (result["losses"], result["digest"]) == (whole["losses"], whole["digest"])
    said = capfd.readouterr().err
    assert re.search(rf"the state after [2-6] steps is not saved: {tmp_path}/run.*: {reason}", said), said
    store = LocalStore(tmp_path / "run")
    assert newest(store, verify=True).contents.step == STEPS  # pyright: ignore[reportOptionalMemberAccess]
    saved = {entry.step for entry in found(store)}
    assert not {3, 4} & saved
    assert {6, 7, 8} & saved, "a failed save is not in the way of the next ones"
    assert how != "no space" or not list((tmp_path / "run").glob(".tmp-*"))


@pytest.mark.long
def test_a_job_falls_back_to_its_own_checkpoints_only(tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another training of the same model has saved a newer step into the directory. Both workers die, and their state with them."""
    monkeypatch.setenv("ELASTIC_SEGMENTS", "0")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    calm = run(tmp_path / "calm", 20, plain=True, workers=1)
    elastic.run(saved_trainings.train, args=[str(theirs), None, 8, False, None, 0.0], workers=1)
    result = elastic.run(saved_trainings.beside_another_training, args=[str(ours), str(theirs)], workers=2, stages=1, rebalance=False)
    assert (ours / "step-00000008").exists()
    assert result.incidents[0]["restored"] == "step-00000004"
    assert result.value["losses"] == calm["losses"][-len(result.value["losses"]) :]
    assert result.value["digest"] == calm["digest"]


@pytest.mark.long
def test_a_job_whose_directory_another_one_took_says_that_it_saves_no_more(
    tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    result = elastic.run(saved_trainings.in_a_directory_that_another_job_takes, args=[str(tmp_path)], workers=2, stages=1, rebalance=False)
    assert result.value["digest"] == whole["digest"]
    assert max(entry.step for entry in found(LocalStore(tmp_path))) <= 3
    assert result.saves.failed_since >= 2
    assert result.saves.warning is not None
    assert "another job has started to save here" in result.saves.warning
    assert f"warning: {result.saves.warning}" in capfd.readouterr().err


@pytest.mark.long
def test_only_the_newest_are_kept_and_what_dead_savers_left_is_collected(tmp_path: Path) -> None:
    elastic.run(saved_trainings.beside_other_savers, args=[str(tmp_path)], workers=2, stages=1, rebalance=False)
    names = [entry.name for entry in found(LocalStore(tmp_path))]
    assert names[0] == "step-00000012"
    assert len(names) <= 2
    assert [path.name for path in tmp_path.glob(".tmp-*")] == [saved_trainings.ALIVE]


@pytest.mark.long
def test_saves_while_training_goes_on(tmp_path: Path, whole: dict[str, Any]) -> None:
    result = run(tmp_path, STEPS, 2, workers=3, stages=2)
    assert (result["losses"], result["digest"]) == (whole["losses"], whole["digest"])
    sources = [entry.source for entry in found(LocalStore(tmp_path))]
    assert sources[0] is not None
    assert sources[0].contents.step == STEPS
    for source in sources:
        assert source is not None
        source.verify()
    assert not list(tmp_path.glob(".tmp-*")), "what was given up is removed"


@pytest.mark.parametrize(
    ("number", "when"),
    [
        pytest.param(number, when, marks=() if (number, when) == (8, "before") else pytest.mark.long)
        for number in (1, 2, 3, 6, 7, 8, 9)
        for when in ("before", "behind")
    ],
)
@pytest.mark.long
def test_a_death_while_members_agree_on_a_save(number: int, when: str, tmp_path: Path, whole: dict[str, Any]) -> None:
    """The first exchange says which states there are, the second what they are, the third is that of the next save.

    The sixth waits for the save of step 8, then come that of the last step, one or more that wait for it, and whether it is saved.
    """
    arguments = [str(tmp_path), number, when]
    result = elastic.run(
        saved_trainings.with_a_death_while_members_agree, args=arguments, workers=3, stages=1, respawn=False, rebalance=False
    )
    check_last_saved(tmp_path, result, whole)


def check_last_saved(folder: Path, result: elastic.JobResult, whole: dict[str, Any]) -> None:
    """Checks that worker 1 died, none joined, the training equals the uninterrupted run, and its end was saved."""
    assert [(incident["kind"], incident["worker"]) for incident in result.incidents] == [("death", 1)]
    assert (result.value["losses"], result.value["digest"]) == (whole["losses"], whole["digest"])
    source = newest(LocalStore(folder), verify=True)
    assert source is not None
    assert source.contents.step == STEPS
    assert not list(folder.glob(".tmp-*"))


def test_the_last_step_is_saved_whoever_is_ready_to_join(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A pause for a joiner after the last step once meant that no worker saved it."""
    result = elastic.run(saved_trainings.with_a_joiner_at_the_last_step, args=[str(tmp_path)], workers=3, stages=1, rebalance=False)
    check_last_saved(tmp_path, result, whole)


@pytest.mark.long
def test_states_that_an_optimizer_makes_later_are_saved_from_then_on(tmp_path: Path) -> None:
    """Members exchange their lists of states only if these changed; otherwise they exchange one message per save."""
    exchanges = elastic.run(saved_trainings.with_late_state, args=[str(tmp_path), 7, 3], workers=2, stages=1, rebalance=False).value
    saved = {entry.step: entry.source.contents for entry in found(LocalStore(tmp_path)) if entry.source is not None}
    for step, contents in saved.items():
        with_state = {name for name, states in contents.tensors.items() if len(states) > 1}
        assert with_state == ({"1.weight", "1.bias"} if step <= 3 else set(contents.tensors))
        assert contents.scalars == {name: {"step": float(step - 3 if name == "0.bend" else step)} for name in with_state}
    assert {1, 7} <= set(saved)
    assert exchanges == [0, 2, 1, 1, 2, 1, 1]  # a save starts when the loop requests the next step


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over_and_another_model_refused(tmp_path: Path, whole: dict[str, Any]) -> None:
    run(tmp_path, 3, workers=2, stages=2)
    run(tmp_path, 5, workers=2, stages=1)
    manifest = tmp_path / "step-00000005" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    after = run(tmp_path, STEPS, workers=2, stages=2)
    assert after["losses"] == whole["losses"][3:]
    for damaged in tmp_path.glob("step-*/manifest.json"):
        damaged.write_bytes(b"{}")
    with pytest.raises(ElasticError, match="no good checkpoint"):
        run(tmp_path, STEPS, workers=2)


def damage(folder: Path, pattern: str, place: float) -> None:
    """Flips a bit in the file's data at this offset. Its size and the manifest stay right."""
    (path,) = folder.glob(pattern)
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.long
@pytest.mark.parametrize(
    ("second", "pattern"),
    [
        pytest.param({"workers": 1}, "model-*.safetensors", id="one worker", marks=pytest.mark.long),
        pytest.param({"workers": 3, "stages": 2}, "optimizer-*.safetensors", id="three workers"),
    ],
)
def test_a_job_begins_with_an_older_checkpoint_where_the_newest_is_damaged(
    second: Any, pattern: str, tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Manifest and sizes are right, so that the damage shows only when a worker reads its part: the job ended then."""
    run(tmp_path, 3, workers=2, stages=2)
    run(tmp_path, 5, workers=2, stages=1)
    damage(tmp_path, f"step-00000005/{pattern}", 0.99)
    after = run(tmp_path, STEPS, **second)
    assert after["losses"] == whole["losses"][3:]
    assert after["digest"] == whole["digest"]
    said = capfd.readouterr().err
    assert re.search(r"worker \d cannot read the newest checkpoint; all workers try an older one: .*step-00000005.*: damaged", said), said


@pytest.mark.long
def test_a_job_whose_checkpoints_are_all_damaged_ends_and_names_them(tmp_path: Path) -> None:
    run(tmp_path, 3, workers=1)
    damage(tmp_path, "step-00000003/model-*.safetensors", 0.99)
    with pytest.raises(ElasticError, match=r"no good checkpoint is left \(step-00000003: damaged\)"):
        run(tmp_path, STEPS, workers=2, stages=2)


def test_every_without_a_directory_is_refused() -> None:
    with pytest.raises(SettingsError, match="every=2 needs a directory to save to"):
        elastic.run(_without_directory, workers=1)


def _without_directory(job: Any) -> None:
    import torch

    torch.manual_seed(1)
    from tests.engine import models

    elastic.Trainer(models.blocks(), models.cross_entropy, models.adamw, models.Rows(), batch_size=8, micro_batch_size=4, every=2)

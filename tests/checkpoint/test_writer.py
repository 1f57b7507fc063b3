"""Tests that files have the same bytes for any division of runs between writers, that other programs open them, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from elastic.checkpoint.commit import abandon, begin, commit, save, write_runs
from elastic.checkpoint.directory import newest
from elastic.checkpoint.plan import INDEX, plan_files
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.checkpoint.store import LocalStore
from elastic.checkpoint.writer import PartReceipt, TensorRun
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs

SMALL = {"a": (300, 301), "b": (65,), "c": (), "d": (0,)}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    values = values_at(12)
    return tmp_path / save(LocalStore(tmp_path), contents_of(values), whole_runs(values), step=12, max_file_bytes=200_000)


def test_what_was_saved_is_loaded(saved: Path) -> None:
    source = newest(LocalStore(saved.parent), verify=True)
    assert source is not None
    assert equals(source, values_at(12))
    assert source.name == saved.name == "step-00000012"


def test_safetensors_opens_every_file(saved: Path) -> None:
    index = json.loads((saved / INDEX).read_bytes())
    values = values_at(12)
    loaded = {name: load_file(saved / file)[name] for name, file in index["weight_map"].items()}
    assert loaded.keys() == {name for name, state in values if state == PARAM}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, values[name, PARAM])
    states = {name: tensor for path in saved.glob("optimizer-*") for name, tensor in load_file(path).items()}
    assert states.keys() == {f"{name}/{state}" for name, state in values if state != PARAM}
    assert torch.equal(states["h.0.bias/exp_avg"], values["h.0.bias", "exp_avg"])


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_any_split_over_writers_gives_the_same_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    values = values_at(3, SMALL)
    store = LocalStore(tmp_path_factory.mktemp("split"))
    plan = plan_files(contents_of(values), max_file_bytes=data.draw(st.sampled_from([1, 400_000, 1 << 30])))
    parts: list[list[TensorRun]] = [[] for _ in range(3)]
    for name, state, _, tensor in data.draw(st.permutations(whole_runs(values))):
        flat = tensor.reshape(-1)
        cuts = sorted({0, flat.numel(), *data.draw(st.lists(st.integers(0, flat.numel()), max_size=4))})
        for start, stop in pairwise(cuts):
            parts[data.draw(st.integers(0, 2))].append((name, state, start, flat[start:stop]))
    ticket = begin(store, plan, step=1)
    receipts = [write_runs(plan, store, ticket, part, threads=threads) for threads, part in zip((1, 2, 3), parts, strict=True)]
    receipts = [PartReceipt.from_json(json.loads(json.dumps(receipt.to_json()))) for receipt in receipts]
    split = files_of(Path(store.where(commit(store, plan, ticket, receipts))))
    again = begin(store, plan, step=1, epoch=1)
    whole = files_of(Path(store.where(commit(store, plan, again, [write_runs(plan, store, again, whole_runs(values))]))))
    del split["manifest.json"], whole["manifest.json"]  # they differ in the epoch
    assert split == whole


def refusal(tmp_path: Path, runs: Sequence[TensorRun], match: str) -> None:
    values = values_at(3, SMALL)
    with pytest.raises(CheckpointError, match=match):
        save(LocalStore(tmp_path), contents_of(values), runs, step=3)
    assert list(tmp_path.iterdir()) == []


def test_runs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    runs = whole_runs(values_at(3, SMALL))
    bias = next(run for run in runs if run[:2] == ("b", PARAM))
    refusal(tmp_path, [*runs, bias], r"model-00001-of-00001.safetensors: bytes from \d+ to \d+ were written twice")
    refusal(tmp_path, [run for run in runs if run is not bias], "of its .* bytes were written; byte .* was not")
    refusal(tmp_path, [*runs, ("x", PARAM, 0, bias[3])], "'x', 'param' is not in the plan")
    refusal(tmp_path, [("b", PARAM, 1, bias[3])], r"run \[1, 66\) of 65 elements")
    refusal(tmp_path, [("b", PARAM, 0, bias[3].double())], "is torch.float64, but the contents list it as float32")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"": {PARAM: "float32"}}, "cannot be called ''"),
        ({"__metadata__": {PARAM: "float32"}}, "cannot be called '__metadata__'"),
        ({"a": {"exp/avg": "float32"}}, "cannot be called 'exp/avg'"),
        ({"a": {PARAM: "complex128"}}, "a has dtype complex128, which safetensors cannot hold"),
    ],
)
def test_names_and_dtypes_that_cannot_be_stored(tensors: dict[str, dict[str, str]], match: str) -> None:
    specs = {name: {state: Spec(shape=(2,), dtype=dtype) for state, dtype in states.items()} for name, states in tensors.items()}
    with pytest.raises(CheckpointError, match=match):
        plan_files(Contents(tensors=specs))


def test_a_directory_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    values = values_at(3, SMALL)
    plan = plan_files(contents_of(values))
    ticket = begin(LocalStore(tmp_path / "one"), plan, step=3)
    other = LocalStore(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"does not see .* directory that all hosts share"):
        write_runs(plan, other, ticket, [])
    other.make_directory(ticket.directory)
    other.put(f"{ticket.directory}/.token", b"another")
    with pytest.raises(CheckpointError, match="another save's token"):
        write_runs(plan, other, ticket, [])
    with pytest.raises(CheckpointError, match="plans other files"):
        write_runs(plan_files(contents_of(values), 1), LocalStore(tmp_path / "one"), ticket, [])


def started(store: LocalStore, step: int, epoch: int = 0, attempt: int = 0):
    values = values_at(step, SMALL)
    plan = plan_files(contents_of(values))
    ticket = begin(store, plan, step=step, epoch=epoch, attempt=attempt)
    return plan, ticket, [write_runs(plan, store, ticket, whole_runs(values))]


def test_two_savers_of_one_step_leave_one_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first, second = started(store, 3), started(store, 3)
    commit(store, *second)
    before = files_of(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="exists already; it is not overwritten"):
        commit(store, *first)
    abandon(store, *first[:2])
    assert files_of(tmp_path / "step-00000003") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_an_evicted_writer_that_wakes_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    late = started(store, 5, epoch=1)
    commit(store, *started(store, 4, epoch=2))
    with pytest.raises(CheckpointError, match="this writer was evicted"):
        commit(store, *late)


def test_latest_never_moves_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (4, 9, 5):
        commit(store, *started(store, step))
    assert json.loads((tmp_path / "latest").read_bytes()) == {"name": "step-00000009", "step": 9, "epoch": 0, "attempt": 0}


def test_a_later_epoch_saves_a_step_again_beside_the_old_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    commit(store, *started(store, 3, epoch=1))
    assert commit(store, *started(store, 3, epoch=2)) == "step-00000003-e2-a0"
    source = newest(store)
    assert source is not None
    assert source.manifest.order == (3, 2, 0)


def test_a_name_taken_by_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "mine").write_text("precious")
    store = LocalStore(tmp_path)
    assert commit(store, *started(store, 3)) == "step-00000003-e0-a0"
    assert (tmp_path / "step-00000003" / "mine").read_text() == "precious"
    source = newest(store)
    assert source is not None
    assert equals(source, values_at(3, SMALL))


def test_a_receipt_of_another_save_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plan, ticket, receipts = started(store, 3)
    with pytest.raises(CheckpointError, match="of another save"):
        commit(store, plan, ticket, [replace(receipts[0], token="0")])


def test_settings_that_are_not_json_are_refused(tmp_path: Path) -> None:
    values = values_at(3, SMALL)
    contents = replace(contents_of(values), extra={"scheduler": object()})
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be written as JSON"):
        save(LocalStore(tmp_path), contents, whole_runs(values), step=3)
    assert list(tmp_path.iterdir()) == []

"""Tests that workers' models are compared where code behind the last loop has changed them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import elastic
from elastic.errors import MismatchError
from elastic.worker.changed_model import unlike, unproven
from elastic.worker.job import Job
from tests.plain import loops
from tests.recovery import forks
from tests.recovery.forks import WorkerFailed, die, when


def told(**models: Any) -> dict[int, Any]:
    """`w3=(since, checksums)`."""
    return {int(name[1:]): {"since": since, "model": model} for name, (since, model) in models.items()}


A, B, NOTHING = {"0": "aa"}, {"0": "bb"}, None


@pytest.mark.parametrize(
    ("models", "leader", "said"),
    [
        ({"w0": (0, NOTHING), "w1": (0, NOTHING)}, None, None),
        ({"w0": (0, A), "w3": (7, A)}, None, None),
        ({"w0": (0, A), "w1": (0, NOTHING)}, 0, None),
        ({"w0": (0, A), "w1": (0, NOTHING)}, None, "worker 0 changed the model, and worker 1 did not"),
        ({"w0": (0, NOTHING), "w1": (0, A)}, 0, "worker 1 changed the model, and worker 0 did not"),
        ({"w0": (0, A), "w1": (0, A), "w3": (7, B)}, 0, r"worker 3 \(there since step 7\) gave it other values than workers 0, 1"),
        ({"w0": (0, A), "w3": (None, B)}, 0, r"worker 0 gave it other values than worker 3 \(there since after the last step\)"),
        ({"w0": (0, {"0": "aa", "1": "cc"}), "w1": (0, {"1": "cc", "2": "dd"})}, 0, None),
        ({"w0": (0, {"0": "aa", "1": "cc"}), "w1": (0, {"1": "ee", "2": "dd"})}, 0, "worker 0 gave it other values than worker 1"),
    ],
)
def test_models_are_alike_if_all_that_hold_a_layer_have_changed_it_alike(
    models: dict[str, Any], leader: int | None, said: str | None
) -> None:
    found = unlike(told(**models), leader)
    if said is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(found)
        assert "loader.keep_best()" in found


@pytest.mark.parametrize(
    ("models", "warns"),
    [
        ({"w0": (0, NOTHING), "w3": (7, NOTHING)}, False),
        ({"w0": (0, A), "w3": (7, A)}, False),
        ({"w4": (9, A), "w3": (7, A)}, True),
        ({"w4": (9, A), "w0": (0, NOTHING)}, True),
    ],
)
def test_a_change_by_workers_of_which_none_was_there_from_the_beginning_is_unproven(models: dict[str, Any], warns: bool) -> None:
    assert (unproven(told(**models)) is not None) is warns


Behind = Callable[[Job, nn.Module, Any], Any]


def trained(job: Job, behind: Behind, epochs: int = 3) -> dict[str, Any]:
    """Keeps the weights that were best, which are those of the first epoch, in a variable."""
    net = loops.model()
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.Rows(), **loops.SIZES)
    kept = None
    for epoch in loader.epochs(epochs):
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 0:
            kept = {name: value.clone() for name, value in net.state_dict().items()}
    assert kept is not None
    return {"value": behind(job, net, kept), "digest": loader.digest()}


def puts_back(job: Job, net: nn.Module, kept: Any) -> None:
    net.load_state_dict(kept)


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
def test_a_worker_that_lacks_earlier_best_weights_is_noticed() -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 2, die)  # in the last epoch but one; the worker in its place has that as number 0

    calm = [forks.run(workers, train=partial(trained, behind=puts_back)).results[0]["digest"] for workers in (1, 2)]
    assert calm[0] == calm[1] != forks.run(1, train=partial(trained, behind=lambda *_: None)).results[0]["digest"]
    said = r"MismatchError: workers have different models behind the last loop: .*worker 2 \(there since step [23]\).*best.load\(\)"
    with pytest.raises(WorkerFailed, match=said):
        forks.run(2, train=partial(trained, behind=puts_back), prepare=prepare, least=2)


def changes(job: Job, kind: str) -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer, loader = job.prepare(net, optimizer, [torch.ones(2)] * 8, batch_size=4, micro_batch_size=2)
    for x in loader:
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "own number":
        with torch.no_grad():
            net.weight.add_(job.worker)
    elif kind == "all" or job.leader:
        net.half()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param("all", marks=pytest.mark.long), pytest.param("leader", marks=pytest.mark.long), "own number"]
)
def test_a_job_ends_with_an_error_if_its_workers_return_with_different_models(kind: str) -> None:
    if kind == "own number":
        with pytest.raises(MismatchError, match="worker 0 gave it other values than worker 1"):
            elastic.run(changes, args=[kind], workers=2)
    else:
        elastic.run(changes, args=[kind], workers=2)

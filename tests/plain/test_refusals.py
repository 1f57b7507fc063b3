"""Tests that what a plain loop cannot be made exact with is refused, with the reason and the way out."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, Subset, WeightedRandomSampler

from elastic.errors import TrainerError
from tests.plain import loops


def prepared(job: Any, **options: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {"model": loops.model(), "data": loops.batch, "steps": 2, **loops.SIZES, **options}
    optimizer = given.pop("optimizer", None) or loops.adamw
    return job.prepare(optimizer=optimizer(given["model"]) if callable(optimizer) else optimizer, **given)


class Lines(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class DistributedDataParallel(nn.Module):
    """Named as torch's, which needs a process group to be made."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(loops.Rows(), **options)


ROWS = loops.Rows()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": loader(sampler=DistributedSampler(ROWS, 2, 0))}, "already sharded by a DistributedSampler.*leave sampler= out"),
        ({"data": loader(sampler=WeightedRandomSampler([1.0] * 40, 40))}, "has a WeightedRandomSampler, whose order.*Subset"),
        ({"data": loader(sampler=RandomSampler(ROWS, replacement=True))}, "RandomSampler with replacement=True"),
        ({"data": loader(batch_sampler=BatchSampler([0, 1], 1, False))}, "batch sampler of its own"),
        ({"data": loader(batch_size=None)}, "has no batch_size"),
        ({"data": Lines(), "steps": None}, "steps= is missing: a function, or data that is read in order"),
        ({"data": (row for row in [1, 2])}, "a generator can be read only once, so a lost step .*__iter__ begins again"),
        ({"data": iter([1, 2])}, "a list_iterator can be read only once"),
        ({"data": Subset(ROWS, range(8)), "steps": None}, "the dataset has 8 samples and an update 32"),
        ({"batch_size": 30}, "a batch of 30 samples cannot be cut into micro-batches of 4: choose .* such as 28 or 32"),
        ({"batch_size": None}, "batch_size= is missing"),
        ({"steps": None}, "steps= is missing: a function, or data that is read in order"),
        ({"steps": 3, "epochs": 2}, "both given"),
        ({"steps": 0}, "steps=0: use a whole number"),
        ({"model": DistributedDataParallel()}, "the model is wrapped in DistributedDataParallel.*the module inside of it"),
        ({"model": nn.Sequential(DistributedDataParallel())}, "module 0 of the model is wrapped"),
        ({"model": {"net": nn.Linear(2, 2)}, "optimizer": "sgd"}, "the model is a dict"),
        ({"model": [], "optimizer": "sgd"}, "the model is a list"),
        ({"optimizer": "sgd"}, "the optimizer is a str"),
        ({"optimizer": [1, 2]}, "the optimizer is a int: give a torch.optim.Optimizer.*or a list of several"),
        ({"clip_norm": 1.0}, r"no argument clip_norm=: call job.clip_grad_norm_"),
        ({"autocast": torch.bfloat16}, "use torch.autocast in the body"),
        ({"wrong": 1}, "no argument wrong=: of Trainer's"),
    ],
)
def test_arguments_that_are_refused(job: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        prepared(job, **options)


def test_a_process_group_of_the_script_is_refused(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(TrainerError, match="leave it out"):
        prepared(job)


def test_a_scheduler_that_prepare_does_not_know_is_refused(job: Any) -> None:
    net = loops.model()
    optimizer = loops.adamw(net)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(TrainerError, match=r"job.prepare\(model, optimizer, data, scheduler=scheduler"):
        prepared(job, model=net, optimizer=optimizer)


def test_a_scheduler_made_after_prepare_is_refused(job: Any) -> None:
    _, optimizer, loader = prepared(job)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(TrainerError, match="make the scheduler before"):
        next(iter(loader))


def test_a_scheduler_of_another_optimizer_is_refused(job: Any) -> None:
    other = torch.optim.SGD(loops.model().parameters(), lr=1.0)
    with pytest.raises(TrainerError, match="another optimizer"):
        prepared(job, scheduler=torch.optim.lr_scheduler.StepLR(other, 3))


def accumulates(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    (loss / 2).backward()
    if number % 2:
        optimizer.step()


def skips(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    pass


def steps_twice(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    optimizer.step()
    optimizer.step()


def steps_without_backward(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    optimizer.step()


def backward_at_the_end(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward(retain_graph=True)
    optimizer.step()
    loss.backward()


def clips_by_torch(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    parameters = [parameter for parameter in _model_of(optimizer).parameters() if parameter.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
    optimizer.step()


def clips_unnoticed(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    _model_of(optimizer).last.weight.grad.data.clamp_(-1e-3, 1e-3)  # pyright: ignore
    optimizer.step()


def replaces_gradients(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    weight = _model_of(optimizer).last.weight  # pyright: ignore
    weight.grad = weight.grad.clamp(-1e-3, 1e-3)  # pyright: ignore
    optimizer.step()


def drops_a_gradient(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    _model_of(optimizer).last.weight.grad = None  # pyright: ignore
    optimizer.step()


def _model_of(optimizer: Any) -> nn.Module:
    return optimizer._loop._model


def clips_before(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    job.clip_grad_norm_(1.0)
    loss.backward()
    optimizer.step()


def clips_to_nothing(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    job.clip_grad_norm_(0.0)


def weighs_behind(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    loss.backward()
    job.weighted(loss, 2)


def weighs_twice(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    job.weighted(job.weighted(loss, 2), 3)


def weighs_by_nothing(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    job.weighted(loss, float("nan"))


def scales(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def closes(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    optimizer.step(lambda: loss)


def nests(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    next(iter(job.loader))


def digests(job: Any, optimizer: Any, loss: torch.Tensor, number: int) -> None:
    job.loader.digest()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (accumulates, r"ended without a call of optimizer.step\(\).*To accumulate gradients, call it in every body: batch_size="),
        (skips, r"ended without backward\(\) and optimizer.step\(\)"),
        (steps_twice, r"calls optimizer.step\(\) twice"),
        (steps_without_backward, r"optimizer.step\(\) without backward\(\)"),
        (backward_at_the_end, r"backward\(\) after optimizer.step\(\)"),
        (clips_by_torch, r"changes gradients between.*job.clip_grad_norm_\(max_norm\)"),
        (clips_unnoticed, "changes gradients between"),
        (replaces_gradients, "changes gradients between"),
        (clips_before, "too early or late"),
        (clips_to_nothing, "must be above 0"),
        (weighs_behind, r"calls job.weighted\(\) behind backward\(\)"),
        (weighs_twice, "the weights 2.0 and 3.0: a micro-batch has one weight"),
        (weighs_by_nothing, "the weight nan: a weight is finite"),
        (scales, "a GradScaler cannot be used.*bfloat16"),
        (closes, "closure"),
        (nests, "inside of another"),
        (digests, "in the middle of a step"),
    ],
)
def test_bodies_that_are_refused_at_the_first_micro_batch(job: Any, body: Callable[..., None], message: str) -> None:
    model, optimizer, loader = prepared(job)
    job.loader = loader

    def run() -> None:
        for number, (x, y) in enumerate(loader):
            body(job, optimizer, functional.cross_entropy(model(x), y), number)

    with pytest.raises(TrainerError, match=message) as caught:
        run()
    assert "step 0, micro-batch 0" in str(caught.value) or not re.match("the body", str(caught.value))


def test_a_scaler_that_is_off_changes_nothing(job: Any) -> None:
    model, optimizer, loader = prepared(job)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = next(iter(bodies := iter(loader)))
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(Exception, match="not a worker"):  # the body is right, and the Trainer needs a job
        next(bodies)


def test_a_gradient_may_be_dropped(job: Any) -> None:
    model, optimizer, loader = prepared(job)
    x, y = next(iter(bodies := iter(loader)))
    drops_a_gradient(job, optimizer, functional.cross_entropy(model(x), y), 0)
    with pytest.raises(Exception, match="not a worker"):  # the body is right, and the Trainer needs a job
        next(bodies)


def test_a_loop_that_is_left_in_its_first_body_ends_the_job_when_train_fn_returns(job: Any) -> None:
    model, _, loader = prepared(job)
    for x, y in loader:
        functional.cross_entropy(model(x), y).backward()
        break
    assert "the loop was left" in str(job.errors[0])
    with pytest.raises(TrainerError, match=r"loader.report is not None"):
        job.behind(None)
    with pytest.raises(TrainerError, match="the loop was left"):
        next(iter(loader))


def test_a_look_at_a_micro_batch_is_refused_where_it_was_taken(job: Any) -> None:
    model, _, loader = prepared(job)

    def look() -> None:
        x, _ = next(iter(loader))
        model(x)

    look()
    place = f"{re.escape(__file__)}:{look.__code__.co_firstlineno + 1}"
    said = rf"taken from the loader, and no step made with it \(at {place}\), as next\(iter\(loader\)\) does.*before job.prepare"
    with pytest.raises(TrainerError, match=said):
        job.behind(None)
    with pytest.raises(TrainerError, match=said):
        next(iter(loader))


def test_calls_outside_the_loop_are_refused(job: Any) -> None:
    _, optimizer, loader = prepared(job)
    with pytest.raises(TrainerError, match="outside a loop"):
        optimizer.step()
    with pytest.raises(TrainerError, match="before the first step"):
        loader.digest()
    with pytest.raises(TrainerError, match="outside the body"):
        job.clip_grad_norm_(1.0)
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 3e-3
    assert loader.report is None


def test_clipping_without_a_plain_loop_is_refused(job: Any) -> None:
    with pytest.raises(TrainerError, match="clip_norm="):
        job.clip_grad_norm_(1.0)


def test_a_model_without_values_is_refused(job: Any) -> None:
    with pytest.raises(TrainerError, match="weight is on the device meta"):
        prepared(job, model=nn.Linear(4, 4, device="meta"), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1.0))


def test_a_trial_leaves_generators_buffers_and_gradients_as_they_were(job: Any) -> None:
    model, optimizer, loader = prepared(job)
    before, mean = torch.get_rng_state(), model.norm.running_mean.clone()
    bodies = iter(loader)
    x, y = next(bodies)
    functional.cross_entropy(model(x), y).backward()
    assert not torch.equal(model.norm.running_mean, mean)
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(Exception, match="not a worker"):  # the Trainer, which needs a job
        next(bodies)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.norm.running_mean, mean)


class Memory:
    """What a body has left for the next one."""

    def __init__(self) -> None:
        self.mean, self.hidden, self.bodies, self.own = 0.0, torch.zeros(()), 0, np.random.default_rng(1)


def baseline(memory: Memory, loss: torch.Tensor) -> torch.Tensor:
    loss = loss * (loss.detach() - memory.mean)
    memory.mean = 0.9 * memory.mean + 0.1 * loss.item()
    return loss


def hidden(memory: Memory, loss: torch.Tensor) -> torch.Tensor:
    loss = loss * torch.exp(memory.hidden)
    memory.hidden = loss.detach()
    return loss


def counted(memory: Memory, loss: torch.Tensor) -> torch.Tensor:
    memory.bodies += 1
    return loss / memory.bodies


def own_generator(memory: Memory, loss: torch.Tensor) -> torch.Tensor:
    return loss * memory.own.random()


def global_generators(memory: Memory, loss: torch.Tensor) -> torch.Tensor:
    return loss * (torch.rand(()) + np.random.rand() + random.random())


class Drawing(loops.Rows):
    """A dataset with a generator of its own."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, y = super().__getitem__(index)
        return x + self.own.random(), y


def tried(job: Any, body: Callable[[Memory, torch.Tensor], torch.Tensor], **options: Any) -> None:
    """Runs a loop's trial as the worker that measures costs does."""
    job.profile = True
    model, optimizer, loader = prepared(job, **options)
    memory = Memory()
    for x, y in loader:
        body(memory, functional.cross_entropy(model(x.float()), y)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("body", [baseline, hidden, counted, own_generator])
def test_a_body_that_uses_what_earlier_ones_have_left_is_refused(job: Any, body: Any) -> None:
    with pytest.raises(TrainerError, match="had other gradients the second time: it uses what an earlier body has left"):
        tried(job, body)


def test_a_dataset_with_a_generator_of_its_own_is_refused(job: Any) -> None:
    with pytest.raises(TrainerError, match="or the dataset draws from a generator of its own"):
        tried(job, lambda _, loss: loss, data=Drawing())


@pytest.mark.parametrize(("body", "options"), [(global_generators, {}), (baseline, {"exact": False})])
def test_a_body_that_may_be_run_again_is_not_refused(job: Any, body: Any, options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="not a worker"):  # the body is right, and the Trainer needs a job
        tried(job, body, **options)

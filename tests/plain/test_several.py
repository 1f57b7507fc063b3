"""Tests plain loops with several optimizers: their updates are those of a plain loop, on any number of workers, and whoever dies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.errors import TrainerError
from elastic.worker.job import Job
from tests.plain import gans, loops
from tests.plain.test_exactness import check, expected
from tests.recovery import forks
from tests.recovery.forks import WorkerFailed, die, when

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_layer")]


def test_a_worker_of_a_gan_that_dies_changes_nothing_and_another_one_joins() -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 4, die)  # in the first update of step 2

    agent = forks.run(2, train=gans.gan, prepare=prepare, least=2)
    calm = expected(gans.gan)
    assert len(calm["reports"]) == loops.STEPS
    assert agent.results[0]["reports"] == calm["reports"]
    assert agent.results[2]["reports"] == calm["reports"][-len(agent.results[2]["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]
    assert agent.results[0]["state"] == calm["state"]


@pytest.mark.long
@pytest.mark.parametrize("workers", [3, 5])
def test_a_gan_has_the_same_bits_on_any_number_of_workers(workers: int) -> None:
    check(forks.run(workers, train=gans.gan), expected(gans.gan), ("reports", "state"))


@pytest.mark.long
@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("phase", ["forward", "backward", "reduce", "ready", "apply", "gather"])
def test_a_worker_that_dies_in_either_update_changes_nothing(phase: str, step: int) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, phase, step, die)

    agent = forks.run(3, train=gans.gan, prepare=prepare)
    assert agent.live == [0, 2]
    check(agent, expected(gans.gan), ("reports", "state"))


@pytest.mark.long
@pytest.mark.parametrize("step", [4, 5])
def test_a_worker_that_joins_between_two_updates_knows_both_losses(step: int) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "ready", step, die)

    agent = forks.run(2, train=gans.gan, prepare=prepare, least=2)
    calm = expected(gans.gan)["reports"]
    assert agent.results[2]["reports"] == calm[-len(agent.results[2]["reports"]) :]


@pytest.mark.long
@pytest.mark.parametrize("place", ["seen", "body"])
def test_a_worker_that_dies_in_a_body_changes_nothing(place: str) -> None:
    def dies(seen: Any, worker: int) -> None:
        if worker == 1 and (seen == 3 or getattr(seen, "step", -1) == 3):
            die()

    agent = forks.run(3, train=partial(gans.gan, **{place: dies}))
    assert agent.live == [0, 2]
    check(agent, expected(gans.gan))


@pytest.mark.long
@pytest.mark.parametrize("update", [0, 1])
def test_each_update_is_compared_between_workers(update: int) -> None:
    with pytest.raises(WorkerFailed, match=r"MismatchError: step 0 cannot be taken: worker 1 found other gradients"):
        forks.run(2, train=partial(gans.of_the_worker, update=update))


def test_a_worker_without_a_micro_batch_sees_each_step_of_a_gan() -> None:
    few = partial(gans.gan, batch_size=2 * loops.SAMPLES)
    agent = forks.run(3, train=few)
    check(agent, expected(few))
    assert all(len(result["reports"]) == loops.STEPS for result in agent.results.values())


@pytest.mark.long
@pytest.mark.parametrize("data", [loops.batch, loops.Stream(), loops.ResumableStream()], ids=["function", "replayed", "resumable"])
def test_a_gan_continues_from_a_checkpoint_on_other_workers(data: Any, tmp_path: Path) -> None:
    calm = expected(partial(gans.gan, data=data))
    saved = partial(gans.gan, data=data, checkpoint=str(tmp_path), every=2)
    forks.run(1, train=partial(saved, steps=3))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000006"]  # two updates in each step
    check(forks.run(2, train=saved), {"reports": calm["reports"][3:], "digest": calm["digest"]})


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
def test_updates_are_those_of_plain_torch_over_the_whole_batch(workers: int) -> None:
    agent = forks.run(workers, train=gans.alternating)
    found, wanted = agent.results[0], gans.alternating_in_torch()
    assert found["state"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert found["average"].keys() == wanted.keys()
    assert found["average"] != found["state"]
    check(agent, expected(gans.alternating), ("reports", "state", "average"))
    assert all(len(losses) == 3 for losses in found["reports"])


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
def test_steps_at_the_end_of_a_body_are_one_update(workers: int) -> None:
    agent = forks.run(workers, train=gans.actor_critic)
    check(agent, expected(gans.actor_critic))
    assert agent.results[0]["state"] == pytest.approx(gans.actor_critic_in_torch(), rel=1e-4, abs=1e-5)
    rates = [report[3] for report in agent.results[0]["reports"]]
    assert rates == [[5e-3, 1e-2], [2.5e-3, 5e-3], [1.25e-3, 2.5e-3]]
    assert all(report[2] == () for report in agent.results[0]["reports"])


@pytest.fixture
def several(job: Any) -> Any:
    """A worker that has not announced itself, with two models and optimizers."""
    g, d, opt_g, opt_d = gans.made()
    job.g, job.d, job.opt_g, job.opt_d, job.loader = job.prepare(g, d, opt_g, opt_d, loops.batch, steps=2, **loops.SIZES)
    return job


def carries(job: Any, real: torch.Tensor, number: int) -> None:
    features = job.d(real).detach()
    (features.mean() - job.d(real).mean()).backward()
    job.opt_d.step()
    (job.g(torch.randn(len(real), gans.NOISE)) * features).mean().backward()
    job.opt_g.step()


def leaves_gradients(job: Any, real: torch.Tensor, number: int) -> None:
    fake = job.g(torch.randn(len(real), gans.NOISE))
    job.d(fake).mean().backward()
    job.opt_d.step()
    job.d(job.g(torch.randn(len(real), gans.NOISE))).mean().backward()
    job.opt_g.step()


def trains_the_second_in_some_bodies(job: Any, real: torch.Tensor, number: int) -> None:
    job.d(real).mean().backward()
    job.opt_d.step()
    if number == 0:
        job.g(torch.randn(len(real), gans.NOISE)).mean().backward()
        job.opt_g.step()


def changes_the_order(job: Any, real: torch.Tensor, number: int) -> None:
    for optimizer in (job.opt_d, job.opt_g)[:: 1 if number == 0 else -1]:
        job.opt_g.zero_grad(), job.opt_d.zero_grad()
        job.d(job.g(torch.randn(len(real), gans.NOISE))).mean().backward()
        optimizer.step()


def steps_early(job: Any, real: torch.Tensor, number: int) -> None:
    loss = job.d(job.g(torch.randn(len(real), gans.NOISE))).mean()
    loss.backward()
    job.opt_d.step()
    if number:
        job.d(real).mean().backward()
    job.opt_g.step()
    job.opt_d.zero_grad()
    job.d(real).mean().backward()
    job.opt_d.step()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (carries, "gradients for optimizer 0 depend on values that the body computed before the step of another.*call all backwards first"),
        (leaves_gradients, r"optimizer 0 with gradients that the backward of an earlier update has left.*zero_grad\(\)"),
        (trains_the_second_in_some_bodies, "ended where the first body called the step of optimizer 0.*learning rate of 0"),
        (changes_the_order, "calls the step of optimizer 0 where the first body called the step of optimizer 1"),
        (steps_early, r"calls backward\(\) where the first body called the step of optimizer 0"),
    ],
)
def test_bodies_with_several_optimizers_that_are_refused(several: Any, body: Any, message: str) -> None:
    before = [parameter.clone() for parameter in [*several.g.parameters(), *several.d.parameters()]]

    def run() -> None:
        for number, (real, _) in enumerate(several.loader):
            body(several, real, number)

    several.g[1].momentum = 0.5
    with pytest.raises(TrainerError, match=message):
        run()
    after = [*several.g.parameters(), *several.d.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g, d, opt_g, opt_d: (g, d, opt_g, torch.optim.SGD(g.parameters(), lr=1.0)),
            "optimizers 0 and 1 have a parameter in common",
        ),
        (lambda g, d, opt_g, opt_d: (opt_g, opt_d), "none is a model"),
        (lambda g, d, opt_g, opt_d: (g, d), "none is an optimizer"),
        (
            lambda g, d, opt_g, opt_d: (g, d, opt_g, opt_d, loops.Rows()),
            r"may have 2 data sets \(Rows, function\).*loader.report is not None",
        ),
        (
            lambda g, d, opt_g, opt_d: (g, d, opt_g, torch.optim.LBFGS(d.parameters())),
            r"LBFGS.step\(\) cannot be called without arguments",
        ),
    ],
)
def test_what_cannot_be_prepared_together_is_refused(job: Any, change: Any, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        job.prepare(*change(*gans.made()), loops.batch, steps=2, **loops.SIZES)


def test_what_is_prepared_comes_back_in_the_same_order_and_form(job: Any) -> None:
    g, d, opt_g, opt_d = gans.made()
    scheduler = torch.optim.lr_scheduler.StepLR(opt_d, 3)
    options = {"steps": 2, **loops.SIZES}
    loader, models, first, (of_d,), second = job.prepare(loops.batch, (g, d), opt_d, [scheduler], opt_g, **options)
    assert models == (g, d)
    assert loader.optimizers == [first, second]
    assert repr(first) == repr(opt_d)
    assert of_d.get_last_lr() == [0.05]
    assert [group["lr"] for group in second.param_groups] == [2e-3]

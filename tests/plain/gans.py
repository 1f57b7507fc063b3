"""Train functions whose loops have several optimizers, and the same trainings in plain torch, over the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from elastic.worker.job import Job
from tests.plain.loops import SAMPLES, SIZES, STEPS, WIDTH, batch

NOISE = 16


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(NOISE, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(WIDTH, 1))


def made() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    torch.manual_seed(7)
    g, d = generator(), discriminator()
    return g, d, torch.optim.Adam(g.parameters(), lr=2e-3, betas=(0.5, 0.99)), torch.optim.SGD(d.parameters(), lr=0.05, momentum=0.9)


Seen = Callable[[Any, int], Any]


def of_the_worker(job: Job, update: int) -> None:
    """One of the two losses depends on the worker."""
    factors = [1.0 + 0.5 * job.worker if number == update else 1.0 for number in range(2)]
    g, d, opt_g, opt_d, loader = job.prepare(*made(), batch, steps=2, **SIZES)
    for real, _ in loader:
        fake = g(torch.randn(len(real), NOISE))
        opt_d.zero_grad()
        (factors[0] * (d(fake.detach()).mean() - d(real).mean())).backward()
        opt_d.step()
        opt_g.zero_grad()
        (factors[1] * -d(fake).mean()).backward()
        opt_g.step()


def gan(job: Job, seen: Seen = lambda report, worker: None, body: Seen = lambda step, worker: None, **options: Any) -> dict[str, Any]:
    """The usual loop: the discriminator's update, then the generator's, for which the discriminator is frozen."""
    given = {"data": batch, "steps": STEPS, **SIZES, **options}
    data = given.pop("data")
    g, d, opt_g, opt_d, loader = job.prepare(*made(), data, **given)
    reports: list[Any] = []
    bodies = 0
    for real, _ in loader:
        bodies += 1
        fake = g(torch.randn(len(real), NOISE))
        opt_d.zero_grad()
        loss_d = bce(d(real), torch.ones(len(real), 1)) + bce(d(fake.detach()), torch.zeros(len(real), 1))
        loss_d.backward()
        job.clip_grad_norm_(0.5)
        opt_d.step()
        body(len(reports), job.worker)
        d.requires_grad_(False)
        opt_g.zero_grad()
        bce(d(fake), torch.ones(len(real), 1)).backward()
        opt_g.step()
        d.requires_grad_(True)
        if (report := loader.report) is not None:
            reports.append((report.step, report.losses, report.loss, report.grad_norm))
            seen(report, job.worker)
    return {"reports": reports, "digest": loader.digest(), "bodies": bodies, "state": _sums(loader.state_dict())}


def actor_critic(job: Job) -> dict[str, Any]:
    """Two losses that are computed with the same parameters: both updates at the end of the body, with a scheduler each, given as lists."""
    torch.manual_seed(8)
    actor, critic = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 1)
    optimizers = [torch.optim.Adam(actor.parameters(), lr=1e-2), torch.optim.Adam(critic.parameters(), lr=2e-2)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in optimizers]
    (actor, critic), (opt_a, opt_c), loader, (of_actor, of_critic) = job.prepare(
        [actor, critic], optimizers, batch, schedulers, steps=3, **SIZES
    )
    found = []
    for state, action in loader:
        reward, value = state.mean(1), critic(state)[:, 0]
        advantage = (reward - value).detach()
        opt_a.zero_grad(), opt_c.zero_grad()
        (-torch.distributions.Categorical(logits=actor(state)).log_prob(action) * advantage).mean().backward()
        (reward - value).pow(2).mean().backward()
        opt_a.step(), opt_c.step()
        of_actor.step(), of_critic.step()
        if (report := loader.report) is not None:
            found.append((report.step, report.loss, report.losses, [group["lr"] for each in optimizers for group in each.param_groups]))
    return {"reports": found, "digest": loader.digest(), "state": _sums(loader.state_dict())}


def actor_critic_in_torch() -> dict[str, float]:
    """The same over whole batches in plain torch."""
    torch.manual_seed(8)
    actor, critic = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 1)
    optimizers = [torch.optim.Adam(actor.parameters(), lr=1e-2), torch.optim.Adam(critic.parameters(), lr=2e-2)]
    for step in range(3):
        state, action = whole(step)
        reward, value = state.mean(1), critic(state)[:, 0]
        advantage = (reward - value).detach()
        (-torch.distributions.Categorical(logits=actor(state)).log_prob(action) * advantage).mean().backward()
        (reward - value).pow(2).mean().backward()
        for each in optimizers:
            each.step(), each.zero_grad()
            each.param_groups[0]["lr"] *= 0.5
    return _sums(nn.ModuleList([actor, critic]).state_dict())


def whole(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A step's whole batch."""
    parts = [batch(step, micro_batch) for micro_batch in range(SIZES["batch_size"] // SAMPLES)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def alternating(job: Job) -> dict[str, Any]:
    """The discriminator is trained twice, then the generator; losses are sums over samples, and draw nothing."""
    torch.manual_seed(9)
    g, d = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
    opt_g, opt_d = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1)
    g, d, opt_g, opt_d, loader = job.prepare(g, d, opt_g, opt_d, batch, steps=3, **SIZES)
    loader.average(0.5)
    losses = []
    for real, _ in loader:
        for loss in _losses(g, d, opt_g, opt_d, real):
            loss.backward()
        if loader.report is not None:
            losses.append(loader.report.losses)
            loader.log(f"{job.directory}/metrics.jsonl", loss=loader.report.loss)
    return {
        "reports": losses,
        "digest": loader.digest(),
        "state": _sums(loader.state_dict()),
        "average": _sums(loader.state_dict("average")),
    }


def _losses(g: nn.Module, d: nn.Module, opt_g: Any, opt_d: Any, real: torch.Tensor) -> Iterator[torch.Tensor]:
    fake = g(real.roll(1, dims=1))
    for _ in range(2):
        opt_d.zero_grad()
        yield (d(fake.detach()) - d(real)).mean() + d(real).pow(2).mean()
        opt_d.step()
    opt_g.zero_grad()
    yield -d(fake).mean()
    opt_g.step()


def alternating_in_torch() -> dict[str, Any]:
    """The same over whole batches in plain torch."""
    torch.manual_seed(9)
    g, d = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
    opt_g, opt_d = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1)
    for step in range(3):
        for loss in _losses(g, d, opt_g, opt_d, whole(step)[0]):
            loss.backward()
    return _sums(nn.ModuleList([g, d]).state_dict())


def _sums(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: tensor.double().sum().item() for name, tensor in state.items()}

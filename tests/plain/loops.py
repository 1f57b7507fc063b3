"""Train functions with plain loops, and the same trainings with a Trainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from elastic.worker.job import Job
from elastic.worker.trainer import Trainer

STEPS, SAMPLES, WIDTH, CLASSES = 5, 4, 64, 7
SIZES = {"batch_size": 32, "micro_batch_size": SAMPLES}


class Net(nn.Module):
    """BatchNorm, dropout, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.frozen = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.last = nn.Dropout(0.1), nn.Linear(WIDTH, CLASSES)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.frozen(torch.relu(self.norm(self.first(x))))))


def model() -> Net:
    torch.manual_seed(5)
    return Net()


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in net.parameters() if parameter.requires_grad], lr=3e-3)


def batch(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


class Rows(torch.utils.data.Dataset[Any]):
    """40 samples, one of which is an epoch of 40 / 32 steps."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.sin(torch.arange(WIDTH) * 0.1 + index) + 0.1 * torch.randn(WIDTH), index % CLASSES


def by_trainer(job: Job, data: Any = batch) -> dict[str, Any]:
    net = model()
    trainer = Trainer(net, lambda output, given: functional.cross_entropy(output, given[1]), adamw(net), data, clip_norm=0.5, **SIZES)
    reports = [(report.step, report.loss, report.grad_norm) for report in trainer.run(STEPS)]
    return {"reports": reports, "digest": trainer.digest()}


Seen = Callable[[Any, int], Any]


def by_loop(job: Job, seen: Seen = lambda report, worker: None, body: Seen = lambda step, worker: None, **options: Any) -> dict[str, Any]:
    """`seen` is called where a report is there, `body` in each body, with the number of steps that this worker has seen."""
    net = model()
    given = {"data": batch, "steps": STEPS, **SIZES, **options}
    net, optimizer, loader = job.prepare(net, adamw(net), **given)
    reports: list[Any] = []
    bodies = 0
    for x, y in loader:
        bodies += 1
        loss = functional.cross_entropy(net(x), y)
        loss.backward()
        body(len(reports), job.worker)
        job.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        if (report := loader.report) is not None:
            reports.append((report.step, report.loss, report.grad_norm))
            seen(report, job.worker)
    return {"reports": reports, "digest": loader.digest(), "bodies": bodies}


def rates(job: Job, kind: str) -> dict[str, Any]:
    """The learning rates of the steps, by a scheduler that is stepped with each step, or after each epoch."""
    net = model()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    net, optimizer, loader, scheduler = job.prepare(net, optimizer, Rows(), scheduler=scheduler, **SIZES)
    found: list[Any] = []
    for _ in range(3):
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if kind == "step":
                scheduler.step()
            if loader.report is not None:
                found.append((loader.report.step, loader.report.lr))
        if kind == "epoch":
            scheduler.step()
    return {"rates": found, "digest": loader.digest(), "last": scheduler.get_last_lr()}


class Both(nn.Module):
    """Returns its losses, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Net(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.utils.checkpoint.checkpoint(self.head, x, use_reentrant=False)
        return {"loss": functional.cross_entropy(self.net(x), y), "size": hidden.pow(2).mean()}


def token_batch(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of which some do not count; in micro-batch 3 none does."""
    x, y = batch(step, micro_batch)
    return x, y.masked_fill(torch.arange(SAMPLES) > (-1 if micro_batch == 3 else micro_batch), -100)


def weighted_by_loop(job: Job) -> dict[str, Any]:
    net = model()
    net, optimizer, loader = job.prepare(net, adamw(net), token_batch, steps=STEPS, **SIZES)
    reports = []
    for x, y in loader:
        loss = job.weighted(functional.cross_entropy(net(x), y), (y != -100).sum())
        loss.backward()
        job.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        if (report := loader.report) is not None:
            reports.append((report.step, report.loss, report.grad_norm))
    return {"reports": reports, "digest": loader.digest()}


def weighted_by_trainer(job: Job) -> dict[str, Any]:
    def loss(output: torch.Tensor, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        count = (given[1] != -100).sum()
        return functional.cross_entropy(output, given[1]) * float(count), count

    net = model()
    trainer = Trainer(net, loss, adamw(net), token_batch, clip_norm=0.5, **SIZES)
    reports = [(report.step, report.loss, report.grad_norm) for report in trainer.run(STEPS)]
    return {"reports": reports, "digest": trainer.digest()}


def two_losses(job: Job) -> dict[str, Any]:
    """Two backwards in a body, autocast, and activation checkpointing in the model."""
    torch.manual_seed(6)
    net: Any = Both()
    net, optimizer, loader = job.prepare(net, adamw(net), batch, steps=3, **SIZES)
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = net(x, y)
        outputs["loss"].backward(retain_graph=True)
        (0.1 * outputs["size"]).backward()
        optimizer.step()
        if loader.report is not None:
            losses.append(loader.report.loss)
    return {"reports": losses, "digest": loader.digest()}


def two_losses_by_trainer(job: Job) -> dict[str, Any]:
    torch.manual_seed(6)
    net = Both()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = net

        def forward(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.both(**given)

    data = lambda step, micro_batch: {"given": dict(zip("xy", batch(step, micro_batch), strict=True))}  # noqa: E731
    trainer = Trainer(Whole(), lambda output, _: output["loss"] + 0.1 * output["size"], adamw(net), data, **SIZES)
    return {"reports": [report.loss for report in trainer.run(3)], "digest": trainer.digest()}


def early(job: Job) -> dict[str, Any]:
    """Leaves the loop where a report says so, and goes on in another one."""
    net = model()
    net, optimizer, loader = job.prepare(net, adamw(net), batch, steps=STEPS, **SIZES)
    found: list[Any] = []

    def take(stop: int) -> Iterator[Any]:
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            job.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
            if (report := loader.report) is not None:
                yield report.step, report.loss, report.grad_norm
                if report.step == stop:
                    break

    found += take(1)
    first = loader.digest()
    found += take(99)
    return {"reports": found, "digest": loader.digest(), "first": first}


class Stream(torch.utils.data.IterableDataset[Any]):
    """70 samples in order; `resumable` ones have a state."""

    def __iter__(self) -> Iterator[Any]:
        self.next, first = 0, getattr(self, "begins", 0)
        self.begins = 0
        for index in range(first, 70):
            self.next = index + 1
            yield torch.sin(torch.arange(WIDTH) * 0.1 + index) + 0.1 * torch.randn(WIDTH), index % CLASSES


class ResumableStream(Stream):
    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begins = state["next"]


by_stream = partial(by_loop, data=Stream())
by_resumable_stream = partial(by_loop, data=ResumableStream())
by_trainer_with_stream = partial(by_trainer, data=Stream())
by_dataset = partial(by_loop, data=Rows())
by_trainer_with_dataset = partial(by_trainer, data=Rows())


def compiled(job: Job) -> dict[str, Any]:
    """The model is compiled, and evaluated in the middle of the training."""
    net = model()
    whole: Any = torch.compile(net, backend="eager")
    whole, optimizer, loader = job.prepare(whole, adamw(net), batch, steps=STEPS, **SIZES)
    reports, shares = [], []
    for x, y in loader:
        loss = functional.cross_entropy(whole(x), y)
        loss.backward()
        job.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        if (report := loader.report) is not None:
            reports.append((report.step, report.loss, report.grad_norm))
            net.eval()
            with torch.no_grad():
                shares.append(functional.cross_entropy(whole(batch(99, 0)[0]), batch(99, 0)[1]).item())
            net.train()
    return {"reports": reports, "digest": loader.digest(), "shares": shares}


def draws(job: Job, kind: str) -> dict[str, Any]:
    """Bodies that draw from Python's, NumPy's and torch's generators, and code behind them that does so too, or does not."""
    net = model()
    net, optimizer, loader = job.prepare(net, adamw(net), batch, steps=3, **SIZES)
    losses = []
    for x, y in loader:
        noise = random.random() + np.random.rand() + torch.rand(1)
        functional.cross_entropy(net(x + 0.1 * noise), y).backward()
        optimizer.step()
        if kind == "behind":
            random.random(), np.random.rand(), torch.rand(1)
        if loader.report is not None:
            losses.append(loader.report.loss)
    return {"reports": losses, "digest": loader.digest()}


def averaged(job: Job) -> dict[str, Any]:
    """What is asked for before the loop: an average, and a counter of the loop's own; and what is asked in a body: a line of metrics."""
    net = model()
    net, optimizer, loader = job.prepare(net, adamw(net), batch, steps=3, **SIZES)
    counter = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))
    loader.register_for_checkpointing(counter)
    loader.average(0.5)
    for x, y in loader:
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if loader.report is not None:
            loader.log(f"{job.directory}/metrics.jsonl", loss=loader.report.loss)
    return {"reports": _sums(loader.state_dict("average")), "digest": loader.digest()}


def averaged_by_trainer(job: Job) -> dict[str, Any]:
    net = model()
    trainer = Trainer(net, lambda output, given: functional.cross_entropy(output, given[1]), adamw(net), batch, **SIZES)
    trainer.average(0.5)
    for _ in trainer.run(3):
        pass
    return {"reports": _sums(trainer.state_dict("average")), "digest": trainer.digest()}


def _sums(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: tensor.double().sum().item() for name, tensor in state.items()}


def raises(job: Job) -> None:
    """An error of the user's own in the middle of a step."""
    net = model()
    net, optimizer, loader = job.prepare(net, adamw(net), batch, steps=STEPS, **SIZES)
    for number, (x, y) in enumerate(loader):
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if number == 3:
            raise ValueError("of the user's own")


def between_epochs(job: Job, epochs: int = 4, **options: Any) -> dict[str, Any]:
    """Code before and behind the loop of an epoch changes settings: once, by a factor, and by a scheduler. An epoch has 3 steps."""
    net = model()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    rows = torch.utils.data.ConcatDataset([Rows()] * 12)
    sizes = {"batch_size": 160, "micro_batch_size": 40}
    net, optimizer, loader, scheduler = job.prepare(net, optimizer, rows, scheduler=scheduler, **sizes, **options)
    reports: list[Any] = []
    for epoch in loader.epochs(epochs):
        if epoch == 1:
            net.drop.p = 0.4
        if epoch >= 1:
            optimizer.param_groups[0]["momentum"] *= 0.9
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (report := loader.report) is not None:
                reports.append((report.step, report.loss, report.lr, optimizer.param_groups[0]["momentum"], net.drop.p))
        scheduler.step()
    return {"reports": reports, "digest": loader.digest()}


def restarting(job: Job, counts: str) -> dict[str, Any]:
    """A scheduler that is given the place in the training."""
    net = model()
    optimizer = adamw(net)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10)
    net, optimizer, loader, scheduler = job.prepare(net, optimizer, batch, scheduler=scheduler, steps=STEPS, **SIZES)
    reports: list[Any] = []
    for body, (x, y) in enumerate(loader):
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if counts == "bodies":
            scheduler.step(body / 100)
        if (report := loader.report) is not None:
            reports.append((report.step, report.lr))
            if counts == "steps":
                scheduler.step((report.step + 1) / len(loader))
    assert len(loader) == 0  # of another loop over it
    return {"reports": reports, "digest": loader.digest()}


class Coefficient:
    """A value that a loop keeps and changes."""

    def __init__(self) -> None:
        self.value = 1.0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


def decaying(job: Job, kept: bool = True, *, by_seen: bool = False) -> dict[str, Any]:
    """A coefficient of the loss that decays with each epoch of 3 steps; or, `by_seen`, only if this worker has seen all of its losses."""
    net = model()
    rows = torch.utils.data.ConcatDataset([Rows()] * 12)
    net, optimizer, loader = job.prepare(net, adamw(net), rows, batch_size=160, micro_batch_size=40)
    coefficient = Coefficient()
    if kept:
        loader.register_for_checkpointing(coefficient)
    reports: list[Any] = []
    for _ in loader.epochs(4):
        for x, y in loader:
            (coefficient.value * functional.cross_entropy(net(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (report := loader.report) is not None:
                reports.append((report.step, report.loss))
                if kept and report.step % 3 == 2:
                    coefficient.value *= 0.7
        if not kept and (not by_seen or len(reports) % 3 == 0):
            coefficient.value *= 0.7
    return {"reports": reports, "digest": loader.digest()}


def left_epochs(job: Job, epochs: int = 4, **options: Any) -> dict[str, Any]:
    """Epochs of 3 steps, of which the first and the third are left after 2 and 1; the loss has a factor by the epoch's number."""
    net = model()
    rows = torch.utils.data.ConcatDataset([Rows()] * 12)
    net, optimizer, loader = job.prepare(net, adamw(net), rows, batch_size=160, micro_batch_size=40, **options)
    reports: list[Any] = []
    for epoch in loader.epochs(epochs):
        steps = 0
        for x, y in loader:
            (0.9**epoch * functional.cross_entropy(net(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (report := loader.report) is not None:
                reports.append((report.step, epoch, report.loss))
                steps = report.step
                if (epoch, steps) in ((0, 1), (2, 5)):
                    break
    return {"reports": reports, "digest": loader.digest()}


def by_losses(job: Job, kind: str) -> dict[str, Any]:
    """A coefficient of the loss that follows from the losses that this worker has seen.

    `kind`: "breaks": after the first of two loops over the loader; "patience": in later epochs only, by their mean losses.
    """
    net = model()
    rows = torch.utils.data.ConcatDataset([Rows()] * 12)
    length = {"steps": 9} if kind == "breaks" else {}
    net, optimizer, loader = job.prepare(net, adamw(net), rows, batch_size=160, micro_batch_size=20, **length)
    coefficient, seen, means = 1.0, list[float](), list[float]()
    for number in range(2) if kind == "breaks" else loader.epochs(8):
        for x, y in loader:
            (coefficient * functional.cross_entropy(net(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (report := loader.report) is not None:
                seen.append(report.loss)
                if kind == "breaks" and number == 0 and report.step == 3:
                    break
        means.append(sum(seen) / max(1, len(seen)))
        seen.clear()
        if kind == "breaks" or len(means) >= 4:
            coefficient = means[-1]
    return {"reports": means, "digest": loader.digest()}


def between_runs(job: Job) -> dict[str, Any]:
    """The same of a Trainer with several runs of 3 steps each."""
    net = model()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    trainer = Trainer(net, lambda output, given: functional.cross_entropy(output, given[1]), optimizer, batch, **SIZES)
    reports: list[Any] = []
    for number in range(4):
        if number == 1:
            net.drop.p = 0.4
        if number >= 1:
            optimizer.param_groups[0]["lr"] *= 0.8
        reports += [(report.step, report.loss, report.lr, net.drop.p) for report in trainer.run(3 * (number + 1))]
    return {"reports": reports, "digest": trainer.digest()}

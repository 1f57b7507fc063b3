"""Train functions that run on the fake device, which importing this module adds to torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from elastic.memory import device
from elastic.plan.memory import needs
from elastic.worker.device_contents import DeviceContents
from tests import fakedevice
from tests.recovery import outliving

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))  # where tests of the engine import these from

import harness
import models

outliving.SegmentContents = DeviceContents  # the calls around which fates let workers die

models.CASES["built by a function"] = {"model": lambda: models.tied, "optimizer": models.two_groups, "clip_norm": 0.3}

train = outliving.train


def broken(job: Any, folder: str, steps: int, breaks: dict[str, int]) -> Any:
    """The devices of these workers break for good in the forward of these steps."""
    enter = job.enter

    def entered(phase: str, step: int, micro_batch: int = -1) -> None:
        enter(phase, step, micro_batch)
        if phase == "forward" and breaks.get(str(job.worker)) == step:
            fakedevice.fail(torch.device(job.device).index, "uncorrectable ECC error")

    job.enter = entered
    return outliving.train(job, folder, "adamw", steps, {})


LEFT = Path(os.environ.get("FAKE_DEVICES_LEFT", "none"))
if LEFT.exists():
    torch.fake.device_count = lambda: int(LEFT.read_text())  # pyright: ignore[reportAttributeAccessIssue]


def vanishes(job: Any, folder: str, steps: int, step: int, place: int, gone: bool) -> Any:
    """The device with this number breaks in the forward of a step, for all processes; if it is `gone`, torch does not even list it."""
    broken = Path(folder, "broken")
    if broken.exists() and job.device == f"fake:{place}":
        fakedevice.fail(place, "fell off the bus")
    enter = job.enter

    def entered(phase: str, at: int, micro_batch: int = -1) -> None:
        enter(phase, at, micro_batch)
        if phase == "forward" and at == step and job.device == f"fake:{place}":
            broken.touch()
            if gone:
                LEFT.write_text(str(place))
            fakedevice.fail(place, "fell off the bus")

    job.enter = entered
    return outliving.train(job, folder, "adamw", steps, {})


def full(job: Any, folder: str, steps: int, step: int) -> Any:
    """Each worker's device has no memory left when it applies this step."""
    enter = job.enter

    def entered(phase: str, at: int, micro_batch: int = -1) -> None:
        enter(phase, at, micro_batch)
        if phase == "apply" and at == step:
            torch.empty(1 << 40, dtype=torch.uint8, device=job.device)

    job.enter = entered
    return outliving.train(job, folder, "adamw", steps, {})


def too_large(job: Any) -> Any:
    """A model that no device has room for."""
    return outliving.train(job, "", "adamw", 1, {}) if job.device == "cpu" else _built(job, torch.nn.Linear(20_000, 20_000, bias=False))


def elsewhere(job: Any) -> Any:
    """Layers on the device of another worker."""
    return _built(job, torch.nn.Linear(models.WIDTH, models.WIDTH).to("fake:3"))


def apart(job: Any) -> Any:
    """Layers on different devices."""
    return _built(job, torch.nn.Linear(models.WIDTH, models.WIDTH), torch.nn.Linear(models.WIDTH, models.WIDTH).to(job.device))


class Put(torch.nn.Linear):
    """Overwrites an element, which torch has no deterministic implementation for on any device, in its forward or its backward."""

    def __init__(self, *, backward: bool) -> None:
        super().__init__(models.WIDTH, models.WIDTH)
        self.backward = backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.backward:
            y.register_hook(_put)
            return y
        return y + _put(torch.zeros_like(y))


def _put(values: torch.Tensor) -> torch.Tensor:
    return values.clone().put_(torch.tensor([0], device=values.device), values.new_ones(1))


def undetermined(job: Any, part: str, exact: bool) -> Any:
    """An operation without a deterministic implementation, in the forward or the backward of layer 1, or in the loss."""
    from elastic import Trainer

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return models.cross_entropy(_put(output) if part == "loss" else output, batch)

    second = torch.nn.Linear(models.WIDTH, models.WIDTH) if part == "loss" else Put(backward=part == "backward")
    layers = [torch.nn.Linear(models.WIDTH, models.WIDTH), second]
    trainer = Trainer(layers, loss, models.adamw, models.Rows(), batch_size=8, micro_batch_size=4, exact=exact)
    return [report.step for report in trainer.run(2)]


def waits(job: Any, steps: int, over: bool = False) -> Any:
    """Returns for how long each step waited for the copy of the state, and what the worker's statistics say.

    With `over`, everything that the device was given is done before a step would wait.
    """
    from elastic import Trainer

    if over:
        enter = job.enter
        job.enter = lambda phase, *where: (enter(phase, *where), phase == "ready" and torch.accelerator.synchronize())
    layers = [torch.nn.Linear(models.WIDTH, models.WIDTH)]
    trainer = Trainer(layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=8, micro_batch_size=4)
    each = [report.copy_wait_s for report in trainer.run(steps)]
    found = trainer.statistics()
    return None if found is None else [each, found[0]["copy_wait_s"]]


def wide(job: Any) -> list[int]:
    """Trains layers whose parameters are large beside their activations, and returns the number of layers of each stage."""
    trainer = _wide()
    list(trainer.run(2))
    return [len(stage.layers) for stage in trainer._engine.view.plan.stages]


def _wide() -> Any:
    from elastic import Trainer

    layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(6)]
    return Trainer(layers, _mean, models.adamw, _Wide(), batch_size=32, micro_batch_size=4)


class _Wide(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((512,), index / 64)


def _mean(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.square().mean()


def _peak(job: Any) -> dict[str, float]:
    """What three steps hold at most on the device, and in copies on the host; and what the planner predicts, but for replicas, which it
    predicts for whoever keeps most."""
    device.use(torch.device("fake", job.worker))
    torch.manual_seed(0)
    trainer = _wide()
    list(trainer.run(1))
    fakedevice.extension.reset_peak(job.worker)
    list(trainer.run(3))
    view, found = trainer._engine.view, trainer._own_statistics()
    predicted = needs(view.workload, view.plan.stages, view.plan.routes, on_device=True)[job.worker]
    replicas = found["replica_bytes"] + found["replica_update_bytes"]
    return {
        "peak": fakedevice.extension.memory(job.worker)[2],
        "predicted": predicted.device_bytes - predicted.replicas + replicas,
        "replicas": replicas,
        "predicted_replicas": predicted.replicas,
        "copies": found["previous_bytes"],
        "predicted_copies": predicted.previous_copy + predicted.kept_copy,
    }


def peaks() -> None:
    """Prints what each worker of the layout in argv holds at most, see `_peak`."""
    workers, stages = map(int, sys.argv[1].split("x"))
    print(json.dumps(harness.run(_peak, workers=workers, stages=stages)))


def from_files(job: Any, folder: str) -> list[bool]:
    """Returns for each tensor whether it begins with the value that files have, where a function builds the model."""
    from safetensors.torch import load_file

    from elastic import Trainer

    layers = [lambda: torch.nn.Linear(models.WIDTH, models.WIDTH)] * 2
    data, sizes = models.Rows(), {"batch_size": 8, "micro_batch_size": 4}
    state = Trainer(layers, models.cross_entropy, models.adamw, data, weights=folder, **sizes).state_dict()
    return [torch.equal(state[name].cpu(), value) for name, value in load_file(Path(folder, "model.safetensors")).items()]


def _built(job: Any, *layers: torch.nn.Module) -> Any:
    from elastic import Trainer

    return Trainer(list(layers), models.cross_entropy, models.adamw, models.Rows(), batch_size=8, micro_batch_size=4).digest()


def in_a_harness(job: Any, name: str) -> Any:
    """A worker of `harness.run`, on the device of its number."""
    device.use(torch.device("fake", job.worker))
    found = models.train(job, name)
    return found["digest"], found["reports"]


def compare(names: list[str], layouts: list[tuple[int, int]]) -> dict[str, bool]:
    """Returns whether cases have the same digest and reports on these layouts (workers, stages) as on one worker."""
    found = {}
    for name in names:
        (alone,) = harness.run(in_a_harness, workers=1, stages=1, args=(name,))
        others = [harness.run(in_a_harness, workers=workers, stages=stages, args=(name,)) for workers, stages in layouts]
        found[name] = all(results[0][0] == alone[0] and all(each[1] == alone[1] for each in results) for results in others)
    return found


def main() -> None:
    """Prints `compare` of the names in argv, separated by semicolons, on layouts such as 2x1."""
    names, layouts = sys.argv[1].split(";"), [tuple(map(int, text.split("x"))) for text in sys.argv[2].split()]
    print(json.dumps(compare(names, [(workers, stages) for workers, stages in layouts])))

"""Tests a Lightning Trainer in a job: the same steps, logs and decisions on any number of workers, whoever dies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic.errors import NotInJob, TrainerError
from elastic.worker.job import Job
from tests.recovery import forks
from tests.recovery.forks import Agent, die, when

lightning = pytest.importorskip("lightning", reason="needs lightning")

from elastic.integrations import lightning_refusals as refusals  # noqa: E402
from tests.frameworks import modules  # noqa: E402


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LAYERS", 1)


def dies(job: Job) -> None:
    if job.worker == 1:
        when(job, "backward", 2, die)


def check(agent: Agent, calm: dict[str, Any]) -> None:
    """Compares the results of all workers, of which one that has joined has noted only the last."""
    for result in agent.results.values():
        assert result["noted"] == calm["noted"][-len(result["noted"]) :]
        assert (result["batches"], result["step"]) == (calm["batches"], calm["step"])
    assert calm["digest"] in [result["digest"] for result in agent.results.values()]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{}, {"patience": 1, "max_epochs": 9}, {"plateau": True, "rate": 0.1}, {"max_epochs": -1, "max_steps": 5}, {"precision": "bf16-mixed"}],
    ids=["plain", "early stopping", "plateau", "steps", "bf16"],
)
def test_a_worker_that_dies_and_one_that_joins_change_nothing(options: dict[str, Any]) -> None:
    train = partial(modules.train, **options)
    calm = forks.run(1, train=train).results[0]
    assert calm["step"] == (4 if "patience" in options else options.get("max_steps", 6))
    agent = forks.run(2, train=train, prepare=dies, least=2)
    assert sorted(agent.results) == [0, 2]
    check(agent, calm)


@pytest.mark.slow
@pytest.mark.long
def test_a_job_continues_from_what_it_has_saved(tmp_path: Path) -> None:
    calm = forks.run(1, train=modules.train).results[0]

    def stops(job: Job) -> None:
        when(job, "forward", 2, lambda: job.deliver({"type": "stop"}))

    saved = partial(modules.train, checkpoint=str(tmp_path))
    assert forks.run(2, train=saved, prepare=stops).results[0]["step"] == 3
    check(forks.run(3, train=saved), calm)


def test_it_is_refused_outside_of_a_job() -> None:
    with pytest.raises(NotInJob):
        modules.ElasticStrategy()


TRAINER: dict[str, Any] = {
    "num_devices": 1,
    "num_nodes": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "reload_dataloaders_every_n_epochs": 0,
    "callbacks": [],
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_devices": 2}, "give devices=1"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "use 'norm'"),
        ({"limit_train_batches": 5}, "use max_steps="),
        ({"reload_dataloaders_every_n_epochs": 1}, "leave it out"),
        ({"callbacks": [lightning.pytorch.callbacks.Timer("00:01:00:00")]}, "different clocks"),
        ({"callbacks": [lightning.pytorch.callbacks.StochasticWeightAveraging(0.1)]}, "Average those of several checkpoints"),
        ({"callbacks": [lightning.pytorch.callbacks.BackboneFinetuning()]}, "a parameter group of its own"),
    ],
)
def test_settings_that_have_no_place_in_a_job_are_refused(options: dict[str, Any], said: str) -> None:
    refusals.check(SimpleNamespace(**TRAINER), None)
    with pytest.raises(TrainerError, match=re.escape(said)):
        refusals.check(SimpleNamespace(**TRAINER | options), None)


def test_a_precision_that_needs_scales_is_refused() -> None:
    with pytest.raises(TrainerError, match="bf16-mixed"):
        refusals.check(SimpleNamespace(**TRAINER), SimpleNamespace(scaler=object()))


class Clips(lightning.LightningModule):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None: ...


class Looks(lightning.Callback):
    def on_before_optimizer_step(self, *_: Any, **__: Any) -> None: ...


class Manual(lightning.LightningModule):
    automatic_optimization = False  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("module", "callbacks", "optimizers", "said"),
    [
        (Clips(), [], 1, "Clips has configure_gradient_clipping"),
        (lightning.LightningModule(), [Looks()], 1, "Looks has on_before_optimizer_step"),
        (Manual(), [], 1, "plain loop"),
        (lightning.LightningModule(), [], 2, "several parameter groups"),
    ],
)
def test_modules_that_have_no_place_in_a_job_are_refused(module: Any, callbacks: list[Any], optimizers: int, said: str) -> None:
    trainer = SimpleNamespace(optimizers=[None], callbacks=[])
    refusals.check_module(trainer, lightning.LightningModule())
    with pytest.raises(TrainerError, match=re.escape(said)):
        refusals.check_module(SimpleNamespace(optimizers=[None] * optimizers, callbacks=callbacks), module)


def test_data_without_a_length_is_refused() -> None:
    class Lines(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    loader = torch.utils.data.DataLoader(Lines(), batch_size=2)
    with pytest.raises(TrainerError, match="map-style dataset"):
        refusals.training_loader(loader, None)
    with pytest.raises(TrainerError, match="several loaders"):
        refusals.training_loader(loader, loader)

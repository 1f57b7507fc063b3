"""Tests the Trainer of transformers in a job: the same steps, logs and decisions on any number of workers, whoever dies."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.errors import NotInJob, TrainerError
from elastic.worker.job import Job
from tests.recovery import forks
from tests.recovery.forks import Agent, WorkerFailed, die, when

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate, on which the Trainer of transformers sits")

from elastic.integrations.huggingface_refusals import check_arguments, check_callbacks, check_resume  # noqa: E402
from tests.frameworks import trainings  # noqa: E402


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LAYERS", 1)


def dying(worker: int, phase: str, step: int) -> Callable[[Job], None]:
    def prepare(job: Job) -> None:
        if job.worker == worker:
            when(job, phase, step, die)

    return prepare


def check(agent: Agent, calm: dict[str, Any]) -> None:
    assert agent.view is not None
    digests = [result.pop("digest") for result in agent.results.values()]
    expected = {name: value for name, value in calm.items() if name != "digest"}
    assert all(result == expected for result in agent.results.values())
    assert calm["digest"] in digests


@pytest.mark.slow
def test_a_worker_that_dies_and_one_that_joins_change_nothing(tmp_path: Path) -> None:
    train = partial(trainings.train, folder=str(tmp_path))
    calm = forks.run(1, train=train).results[0]
    assert (calm["step"], calm["heard"]) == (6, {"step": 6, "evaluate": 4, "epoch": 2})
    agent = forks.run(2, train=train, prepare=dying(1, "backward", 3), least=2)
    assert sorted(agent.results) == [0, 2]
    check(agent, calm)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"patience": 1, "learning_rate": 0.5, "max_steps": 20},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1},
        {"kind": "OwnLoss"},
        {"max_grad_norm": 0.0, "label_smoothing_factor": 0.1},
        {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "logging_strategy": "epoch"},
        {"bf16": True},
        {"neftune_noise_alpha": 5.0, "weight_decay": 0.1, "optim": "adafactor"},
    ],
    ids=["early stopping", "plateau", "own loss", "unclipped", "epochs", "bf16", "noise"],
)
def test_it_does_what_one_worker_does(options: dict[str, Any], tmp_path: Path) -> None:
    kind = getattr(trainings, options.pop("kind", "ElasticTrainer"))
    train = partial(trainings.train, folder=str(tmp_path), kind=kind, **options)
    calm = forks.run(1, train=train).results[0]
    check(forks.run(3, train=train, prepare=dying(1, "forward", 2), least=3), calm)
    if "patience" in options:
        assert 2 < calm["step"] < 20


@pytest.mark.slow
@pytest.mark.long
def test_a_step_has_the_loss_and_gradient_of_the_plain_trainer(tmp_path: Path) -> None:
    """Micro-batches have different numbers of tokens: both weigh them alike."""
    options = {"train_sampling_strategy": "sequential", "max_steps": 2}
    train = partial(trainings.train, folder=str(tmp_path), dropout=0.0, **options)
    ours = [entry for entry in forks.run(2, train=train).results[0]["logs"] if "loss" in entry]
    given = trainings.arguments(str(tmp_path), **options)
    rows = {"train_dataset": trainings.Rows(), "eval_dataset": trainings.Rows(8)}
    plain = transformers.Trainer(trainings.model(0.0), given, data_collator=trainings.padded, **rows)
    plain.train()
    theirs = [entry for entry in plain.state.log_history if "loss" in entry]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in theirs], rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_a_job_continues_from_what_it_has_saved(tmp_path: Path) -> None:
    train = partial(trainings.train, save_strategy="steps", save_steps=2)
    calm = forks.run(1, train=partial(train, folder=str(tmp_path / "calm"))).results[0]

    def prepare(job: Job) -> None:
        when(job, "forward", 3, lambda: job.deliver({"type": "stop"}))

    first = forks.run(2, train=partial(train, folder=str(tmp_path / "stopped")), prepare=prepare)
    assert [result["step"] for result in first.results.values()] == [4, 4]
    check(forks.run(3, train=partial(train, folder=str(tmp_path / "stopped"))), calm)
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "stopped" / "step-00000006").config.n_embd == 16


BEST = {"load_best_model_at_end": True, "patience": 2, "learning_rate": 0.1, "max_steps": 13}
BEST |= {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
"""Evaluates and saves after every second step; that after the fourth is the best one, and the training ends early, after the eighth."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("step", [3, 7])
def test_the_best_model_is_kept_and_loaded_at_the_end(step: int, tmp_path: Path) -> None:
    """Whoever dies, and also in a worker that joins after the last step. The job's own parameters are those of the last step."""
    train = partial(trainings.train, **BEST, save_total_limit=1)
    calm = forks.run(1, train=partial(train, folder=str(tmp_path / "calm"))).results[0]
    metric, best = calm["best"]
    assert (best, calm["step"], calm["after"]) == (4, 8, metric)
    agent = forks.run(3, train=partial(train, folder=str(tmp_path / "killed")), prepare=dying(1, "backward", step), least=3)
    assert 3 in agent.results
    check(agent, calm)
    for folder in (tmp_path / "calm", tmp_path / "killed"):
        opened = {path.name: transformers.GPT2LMHeadModel.from_pretrained(path) for path in sorted(folder.glob("step-*"))}
        assert [*opened] == ["step-00000004", "step-00000008"]
        assert trainings.weights(opened["step-00000004"]) == calm["weights"] != trainings.weights(opened["step-00000008"])


@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_continues_loads_the_best_model_of_its_first_part(tmp_path: Path) -> None:
    """It stops between two saves that the Trainer asks for, and must not remove that checkpoint then."""
    train = partial(trainings.train, **BEST, save_total_limit=1)
    calm = forks.run(1, train=partial(train, folder=str(tmp_path / "calm"))).results[0]

    def prepare(job: Job) -> None:
        when(job, "forward", 5, lambda: job.deliver({"type": "stop"}))

    first = forks.run(2, train=partial(train, folder=str(tmp_path / "stopped")), prepare=prepare)
    assert all(result["step"] < calm["step"] for result in first.results.values())
    check(forks.run(3, train=partial(train, folder=str(tmp_path / "stopped"))), calm)


@pytest.mark.slow
@pytest.mark.long
def test_a_best_model_that_is_gone_is_an_error(tmp_path: Path) -> None:
    class Removes(trainings.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 7:
                shutil.rmtree(tmp_path / "step-00000004")

    with pytest.raises(WorkerFailed, match="there is no checkpoint of 4 steps that can be read"):
        forks.run(1, train=partial(trainings.train, folder=str(tmp_path), callback=Removes(), **BEST))


@pytest.mark.slow
@pytest.mark.long
def test_a_subclass_of_the_trainer_is_mixed_in(tmp_path: Path) -> None:
    """Here one that evaluates what the model generates."""
    train = partial(trainings.translate, folder=str(tmp_path))
    calm = forks.run(1, train=train).results[0]
    agent = forks.run(2, train=train, prepare=dying(1, "backward", 2), least=2)
    assert sorted(agent.results) == [0, 2]
    check(agent, calm)


def test_it_is_refused_outside_of_a_job() -> None:
    with pytest.raises(NotInJob):
        trainings.ElasticTrainer(trainings.model())


JOB: Any = SimpleNamespace(device="cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"torch_compile": True}, "model.compile()"),
        ({"auto_find_batch_size": True}, "larger gradient_accumulation_steps"),
        ({"eval_on_start": True}, "before trainer.train()"),
        ({"include_num_input_tokens_seen": "all"}, "tokens_per_second"),
    ],
)
def test_arguments_that_have_no_place_in_a_job_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=re.escape(said)):
        check_arguments(trainings.arguments(str(tmp_path), **options), JOB)


def test_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="leave use_cpu= out"):
        check_arguments(trainings.arguments(str(tmp_path)), SimpleNamespace(device="cuda:0"))  # pyright: ignore[reportArgumentType]


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="continues from the newest checkpoint in output_dir"):
        check_resume("runs/checkpoint-500", None, trainings.arguments(str(tmp_path)))


def test_a_callback_that_looks_at_gradients_is_refused() -> None:
    class Looks(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None: ...

    check_callbacks([transformers.TrainerCallback()])
    with pytest.raises(TrainerError, match="Looks has on_pre_optimizer_step"):
        check_callbacks([Looks()])


@pytest.mark.slow
@pytest.mark.long
def test_data_in_an_order_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="LengthGroupedSampler"):
        forks.run(1, train=partial(trainings.train, folder=str(tmp_path), train_sampling_strategy="group_by_length"))

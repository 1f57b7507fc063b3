"""Tests that a plain loop has the bits of a Trainer, on any number of workers, and whoever dies wherever."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from elastic.worker.job import Job
from tests.plain import loops
from tests.recovery import forks
from tests.recovery.forks import Agent, WorkerFailed, die, when

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_layer")]


@cache
def expected(train: Callable[[Job], dict[str, Any]] = loops.by_trainer) -> dict[str, Any]:
    return forks.run(1, train=train).results[0]


def check(agent: Agent, calm: dict[str, Any], names: tuple[str, ...] = ("reports",)) -> None:
    assert agent.view is not None
    for name in names:
        assert all(result[name] == calm[name] for result in agent.results.values())
    assert agent.results[agent.view.coordinator]["digest"] == calm["digest"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long), 4])
def test_it_has_the_bits_of_a_trainer(workers: int) -> None:
    agent = forks.run(workers, train=loops.by_loop)
    check(agent, expected())
    apart = workers if workers == 1 else 2 * workers  # a trial each, and one that is compared with other workers'
    assert sum(result["bodies"] for result in agent.results.values()) == loops.STEPS * 8 + apart


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 3])
def test_micro_batches_count_by_their_weights(workers: int) -> None:
    check(forks.run(workers, train=loops.weighted_by_loop), expected(loops.weighted_by_trainer))


@pytest.mark.long
def test_it_shuffles_a_dataset_as_a_trainer_does() -> None:
    check(forks.run(2, train=loops.by_dataset), expected(loops.by_trainer_with_dataset))


@pytest.mark.parametrize(
    "phase",
    ["backward", *(pytest.param(phase, marks=pytest.mark.long) for phase in ("forward", "reduce", "ready", "apply", "gather"))],
)
def test_a_worker_that_dies_changes_nothing(phase: str) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, phase, 3, die)

    agent = forks.run(3, train=loops.by_loop, prepare=prepare)
    assert agent.live == [0, 2]
    check(agent, expected())


@pytest.mark.long
@pytest.mark.parametrize("place", ["seen", "body"])
def test_a_worker_that_dies_in_a_body_changes_nothing(place: str) -> None:
    def dies(seen: Any, worker: int) -> None:
        if worker == 1 and (seen == 3 or getattr(seen, "step", -1) == 3):
            die()

    agent = forks.run(3, train=partial(loops.by_loop, **{place: dies}))
    assert agent.live == [0, 2]
    check(agent, expected())


def test_a_worker_that_joins_takes_the_rest_of_the_steps() -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 2, die)

    agent = forks.run(2, train=loops.by_loop, prepare=prepare, least=2)
    assert sorted(agent.results) == [0, 2]
    calm = expected()
    assert agent.results[0]["reports"] == calm["reports"]
    assert agent.results[2]["reports"] == calm["reports"][-len(agent.results[2]["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]


@pytest.mark.long
@pytest.mark.parametrize("train", [loops.by_stream, loops.by_resumable_stream], ids=["replayed", "resumable"])
def test_a_worker_that_joins_reads_a_stream_from_its_step_on(train: Any, tmp_path: Path) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 2, die)

    agent = forks.run(2, train=train, prepare=prepare, least=2)
    calm = expected(loops.by_trainer_with_stream)
    assert agent.results[0]["reports"] == calm["reports"]
    assert agent.results[2]["reports"] == calm["reports"][-len(agent.results[2]["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]
    saved = partial(train, checkpoint=str(tmp_path), every=2)
    forks.run(1, train=partial(saved, steps=3))
    check(forks.run(2, train=saved), {"reports": calm["reports"][3:], "digest": calm["digest"]})


@pytest.mark.long
def test_a_worker_without_a_micro_batch_sees_each_step() -> None:
    few = partial(loops.by_loop, batch_size=2 * loops.SAMPLES)
    agent = forks.run(3, train=few)
    check(agent, expected(few))
    assert all(len(result["reports"]) == loops.STEPS for result in agent.results.values())


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_a_scheduler_is_stepped_once_a_step_or_once_an_epoch(kind: str, workers: int) -> None:
    agent = forks.run(workers, train=partial(loops.rates, kind=kind))
    steps = {"step": [0, 1, 2], "epoch": [0, 1, 2]}[kind]  # the passes end after 1, 2 and 3 steps: 40, 80 and 120 samples of 32
    wanted = [(step, 0.1 * 0.5**step) for step in steps]
    assert all(result["rates"] == wanted and result["last"] == [0.1 * 0.5**3] for result in agent.results.values())


@pytest.mark.long
def test_several_losses_autocast_and_checkpointed_activations() -> None:
    check(forks.run(2, train=loops.two_losses), expected(loops.two_losses_by_trainer))


@pytest.mark.long
def test_a_loop_that_is_left_early_goes_on_in_the_next_one() -> None:
    agent = forks.run(2, train=loops.early)
    check(agent, expected())
    assert agent.results[0]["first"] not in (None, agent.results[0]["digest"])


@pytest.mark.long
def test_a_compiled_model_and_evaluation_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "TIMEOUT_S", 100)
    one, two = forks.run(1, train=loops.compiled), forks.run(2, train=loops.compiled)
    check(two, one.results[0], ("reports", "shares"))
    assert len(set(one.results[0]["shares"])) == loops.STEPS


@pytest.mark.long
def test_what_is_drawn_in_bodies_is_keyed_and_what_is_drawn_behind_them_changes_nothing() -> None:
    calm = forks.run(1, train=partial(loops.draws, kind="")).results[0]
    for workers in (1, 2):
        check(forks.run(workers, train=partial(loops.draws, kind="behind")), calm)


@pytest.mark.long
def test_calls_before_the_loop_are_made_for_its_trainer() -> None:
    check(forks.run(2, train=loops.averaged), expected(loops.averaged_by_trainer))


@pytest.mark.long
def test_an_error_in_a_body_is_the_jobs() -> None:
    with pytest.raises(WorkerFailed, match="ValueError: of the user's own"):
        forks.run(1, train=loops.raises)


def run_body(body: Callable[..., Any], job: Job, **options: Any) -> dict[str, Any]:
    net = loops.model()
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.batch, steps=2, **loops.SIZES, **options)
    for x, y in loader:
        if body(job, optimizer, loader, functional.cross_entropy(net(x), y)):
            break
    return {}


def left_in_a_step(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> bool:
    loss.backward()
    optimizer.step()
    return loader.loop.built


def clips_later(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> None:
    loss.backward()
    if loader.loop.built:
        job.clip_grad_norm_(1.0)
    optimizer.step()


def sets_a_rate_in_a_step(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> None:
    loss.backward()
    if loader.loop.built:
        optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()


def digests_in_a_step(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    if loader.loop.built:
        loader.digest()


def weighs_later(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> None:
    (job.weighted(loss, 3) if loader.loop.built else loss).backward()
    optimizer.step()


def depends_on_the_worker(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> None:
    (loss * (1 + job.worker // 2)).backward()
    optimizer.step()


def is_not_finite(job: Any, optimizer: Any, loader: Any, loss: torch.Tensor) -> None:
    (loss / (0.0 if loader.loop.built else 1.0)).backward()
    optimizer.step()


@pytest.mark.parametrize("counts", ["bodies", "steps"])
def test_a_scheduler_that_is_given_the_number_of_bodies_is_refused(counts: str) -> None:
    """`scheduler.step(epoch + i / len(loader))`, as in torch's documentation of CosineAnnealingWarmRestarts."""
    train = partial(loops.restarting, counts=counts)
    if counts == "bodies":
        with pytest.raises(WorkerFailed, match=r"scheduler.step\(\) has other arguments in another body of step 0.*loader.report.step"):
            forks.run(2, train=train)
        return
    calm = forks.run(1, train=train).results[0]
    check(forks.run(2, train=train), calm)
    assert len({rate for _, rate in calm["reports"]}) == loops.STEPS


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (left_in_a_step, r"the loop was left in the body of the loop \(step 0, micro-batch 0\), in the middle of the step.*loader.report"),
        (clips_later, r"clips gradients to a norm of 1.0, but the first one does not clip gradients"),
        (sets_a_rate_in_a_step, r"changes lr of parameter group 0 in the middle of the step"),
        (digests_in_a_step, r"loader.digest\(\) is called in the middle of a step"),
        (weighs_later, r"calls job.weighted\(\), and the first one did not: all micro-batches of a step are weighed, or none"),
        (is_not_finite, r"NonFinite: the loss of step 0, micro-batch 0 is inf"),
    ],
)
def test_what_cannot_be_exact_ends_the_job_with_the_reason(body: Callable[..., Any], message: str) -> None:
    def train(job: Job) -> dict[str, Any]:
        found = run_body(body, job)
        assert job.behind is not None
        job.behind(None)  # as when train_fn returns
        return found

    with pytest.raises(WorkerFailed, match=message):
        forks.run(1, train=train)


@pytest.mark.long
def test_a_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    saved = partial(loops.by_loop, checkpoint=str(tmp_path), every=2)
    first = forks.run(1, train=partial(saved, steps=3)).results[0]
    agent = forks.run(2, train=saved)
    calm = expected()
    assert first["reports"] == calm["reports"][:3]
    check(agent, {"reports": calm["reports"][3:], "digest": calm["digest"]})


@pytest.mark.parametrize("train", [loops.between_epochs, loops.between_runs])
@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.long), pytest.param(7, marks=pytest.mark.long)])
def test_a_worker_that_joins_has_what_code_between_loops_has_changed(step: int, train: Any) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", step, die)

    agent = forks.run(2, train=train, prepare=prepare, least=2)
    calm = expected(train)
    assert [report[2] for report in calm["reports"]] == pytest.approx([0.1 * 0.8 ** (step // 3) for step in range(12)])
    assert agent.results[0]["reports"] == calm["reports"]
    assert agent.results[2]["reports"] == calm["reports"][-len(agent.results[2]["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]


@pytest.mark.parametrize("step", [5, pytest.param(8, marks=pytest.mark.long), pytest.param(6, marks=pytest.mark.long)])
def test_a_worker_that_joins_before_the_body_of_an_epochs_last_step_runs_it_in_that_epoch(step: int) -> None:
    """Worker 1 dies when the step is committed, in the round that completes it: no body has seen it yet."""

    def prepare(job: Job) -> None:
        enter, entered = job.enter, list[str]()

        def entering(phase: str, at: int, micro_batch: int = -1) -> None:
            enter(phase, at, micro_batch)
            if (phase, at, job.worker) == ("ready", step, 1):
                entered.append(phase)
                if len(entered) == 2:
                    die()

        job.enter = entering  # pyright: ignore[reportAttributeAccessIssue]

    agent = forks.run(2, train=loops.between_epochs, prepare=prepare, least=2)
    calm = expected(loops.between_epochs)
    assert sorted(agent.results) == [0, 2]
    for result in agent.results.values():
        assert result["reports"] == calm["reports"][-len(result["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]


@pytest.mark.parametrize("kept", [False, True])
def test_a_worker_that_joins_with_another_value_of_the_loops_own_ends_the_job_unless_it_is_sent(kept: bool) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 7, die)

    train = partial(loops.decaying, kept=kept)
    if not kept:
        with pytest.raises(WorkerFailed, match=r"MismatchError: step \d cannot be taken: worker 2 found other gradients"):
            forks.run(2, train=train, prepare=prepare, least=2)
        return
    agent = forks.run(2, train=train, prepare=prepare, least=2)
    calm = expected(loops.decaying)
    assert agent.results[0]["reports"] == calm["reports"]
    assert agent.results[2]["reports"] == calm["reports"][-len(agent.results[2]["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]


def test_a_value_that_differs_from_the_next_pass_on_ends_the_job() -> None:
    """The loop's coefficient is equal when the worker joins, in the second epoch, and another one in the third."""

    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 1, die)

    with pytest.raises(WorkerFailed, match=r"step 3 cannot be taken: worker 2 found other .*They were equal in step \d: what has been"):
        forks.run(2, train=partial(loops.decaying, kept=False, by_seen=True), prepare=prepare, least=2)


@pytest.mark.parametrize(("kind", "died", "step"), [("breaks", 1, 4), pytest.param("patience", 7, r"\d+", marks=pytest.mark.long)])
def test_a_value_that_differs_in_any_later_pass_ends_the_job(kind: str, died: int, step: object) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", died, die)

    with pytest.raises(WorkerFailed, match=rf"step {step} cannot be taken: worker 2 found other gradients"):
        forks.run(2, train=partial(loops.by_losses, kind=kind), prepare=prepare, least=2)


def test_an_epoch_behind_one_that_was_left_has_all_its_steps() -> None:
    assert [(step, epoch) for step, epoch, _ in expected(loops.left_epochs)["reports"]] == [
        *((0, 0), (1, 0)),
        *((2, 1), (3, 1), (4, 1)),
        (5, 2),
        *((6, 3), (7, 3), (8, 3)),
    ]


@pytest.mark.parametrize("step", [1, 2, pytest.param(3, marks=pytest.mark.long), 5, pytest.param(6, marks=pytest.mark.long)])
def test_a_worker_that_joins_is_in_the_epoch_of_the_others(step: int) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", step, die)

    agent = forks.run(2, train=loops.left_epochs, prepare=prepare, least=2)
    calm = expected(loops.left_epochs)
    assert agent.results[0]["reports"] == calm["reports"]
    assert agent.results[2]["reports"] == calm["reports"][-len(agent.results[2]["reports"]) :]
    assert agent.results[0]["digest"] == calm["digest"]


@pytest.mark.parametrize("stop", [2, pytest.param(4, marks=pytest.mark.long), pytest.param(6, marks=pytest.mark.long), 7])
@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_job_that_continues_is_in_the_epoch_of_the_one_before(stop: int, every: int, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("it ends here")

    calm = expected(loops.left_epochs)
    saved = partial(loops.left_epochs, checkpoint=str(tmp_path), every=every)
    with pytest.raises(WorkerFailed, match="it ends here"):
        forks.run(1, train=saved, prepare=lambda job: when(job, "backward", stop, fail))
    agent = forks.run(2, train=saved)
    check(agent, {"reports": calm["reports"][-len(agent.results[0]["reports"]) :], "digest": calm["digest"]})


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
def test_a_parameter_whose_gradient_is_taken_away_is_left_as_it_is(workers: int) -> None:
    """As in a plain loop: with a gradient of zeros AdamW would change it by its weight decay."""

    def train(job: Job) -> dict[str, Any]:
        net = loops.model()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.batch, steps=2, **loops.SIZES)
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            next(net.parameters()).grad = None
            optimizer.step()
        loader.digest()
        return {"equal": [torch.equal(*each) for each in zip(before, trained, strict=True)]}

    for result in forks.run(workers, train=train).results.values():
        assert result["equal"] == [True] + [False] * (len(result["equal"]) - 1)


@pytest.mark.parametrize("exact", [True, False])
def test_a_body_that_depends_on_the_worker_is_refused_in_the_first_step(exact: bool) -> None:
    def train(job: Job) -> dict[str, Any]:
        return run_body(depends_on_the_worker, job, exact=exact)

    if not exact:
        assert forks.run(3, train=train).results == {0: {}, 1: {}, 2: {}}
        return
    with pytest.raises(WorkerFailed, match=r"step 0 cannot be taken: worker 2 found other gradients"):
        forks.run(3, train=train)


@pytest.mark.parametrize(("every", "stops"), [(3, (7, 10)), pytest.param(2, (5, 11), marks=pytest.mark.long)])
def test_a_checkpoint_has_what_code_between_epochs_has_changed(every: int, stops: tuple[int, int], tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("it ends here")

    calm = expected(loops.between_epochs)
    saved = partial(loops.between_epochs, checkpoint=str(tmp_path), every=every)
    for step in stops:
        with pytest.raises(WorkerFailed, match="it ends here"):
            forks.run(1, train=saved, prepare=lambda job, step=step: when(job, "backward", step, fail))
    agent = forks.run(2, train=saved)
    check(agent, {"reports": calm["reports"][-len(agent.results[0]["reports"]) :], "digest": calm["digest"]})


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_whoever_dies_wherever(seed: int) -> None:
    chance = random.Random(seed)
    workers = chance.randint(3, 4)
    first, second = chance.sample(range(workers), 2)
    phases = ("forward", "backward", "reduce", "ready", "apply", "gather", "replicate")
    fates = {first: (chance.choice(phases), chance.randrange(5), 1), second: (chance.choice(phases), chance.randrange(5), 2)}

    def prepare(job: Job) -> None:
        if job.worker in fates:
            phase, step, epoch = fates[job.worker]
            when(job, phase, step, die, epoch)

    agent = forks.run(workers, train=loops.by_loop, prepare=prepare)
    assert first not in agent.live
    check(agent, expected())

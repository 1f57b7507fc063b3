"""Tests that collective calls made by only some workers end with an error, not an endless wait."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.errors import TrainerError
from elastic.worker.onesided_waits import OneSided, Wait


def waits(found: OneSided, worker: int, times: int = 4, **fields: Any) -> None:
    for _ in range(times):
        found.heard(worker, Wait(**{"epoch": 1, "step": 3, "computes": False, "number": 7, "what": "trainer.digest() (a.py:3)"} | fields))


def test_whoever_is_behind_the_loop_body_has_not_called_it() -> None:
    found = OneSided()
    waits(found, 0)
    assert found.verdict(1, [0, 1], []) is None  # worker 1 may be busy in its loop body
    waits(found, 1, times=3, step=4, computes=True)
    assert found.verdict(1, [0, 1], []) is None  # it has not waited long yet
    waits(found, 1, times=1, step=4, computes=True)
    said = found.verdict(1, [0, 1], [])
    assert said is not None
    assert said.startswith("worker 0 waits in trainer.digest() (a.py:3) after step 3, and worker 1 has gone on to step 4 without it")
    assert "register_for_checkpointing" not in said  # all have started together
    assert found.verdict(2, [0, 1], []) is None  # the members have changed
    assert found.verdict(1, [0], []) is None
    waits(found, 0, times=1, number=8)
    assert found.verdict(1, [0, 1], []) is None  # another wait


def test_whoever_has_made_a_call_may_go_on_before_the_others_have_all_its_data() -> None:
    found = OneSided()
    waits(found, 0, loose=True, calls=1, what="trainer.state_dict() (a.py:3)")
    waits(found, 1, step=4, computes=True, calls=2)
    assert found.verdict(1, [0, 1], []) is None
    waits(found, 1, step=4, computes=True, calls=1, number=8)
    said = found.verdict(1, [0, 1], [])
    assert said is not None
    assert said.startswith("worker 0 waits in trainer.state_dict() (a.py:3) after step 3, and worker 1 has gone on to step 4 without it")


@pytest.mark.parametrize(
    "others",
    [
        {"computes": False, "step": 3},  # also in a wait
        {"computes": True, "step": 3},  # a step that is computed again
        {"computes": True, "step": 4, "epoch": 2},
    ],
)
def test_whoever_may_still_come_is_waited_for(others: dict[str, Any]) -> None:
    found = OneSided()
    waits(found, 0)
    waits(found, 1, **others)
    assert found.verdict(1, [0, 1], []) is None


def test_two_in_different_calls_at_one_place_wait_for_each_other() -> None:
    found = OneSided()
    waits(found, 0, call="body 1")
    waits(found, 1, call="body 1", what="trainer.digest() (b.py:9)")
    assert found.verdict(1, [0, 1], []) is None  # the same, from two lines
    waits(found, 2, call="body 2", what="trainer.evaluate() (a.py:9)")
    assert found.verdict(1, [0, 1, 2], []) is None  # it has the result, which is still in flight to the others
    waits(found, 1, call="body 1", what="trainer.evaluate() (a.py:9)", number=8, loose=True)
    assert found.verdict(1, [0, 1], []) == (
        "worker 0 waits in trainer.digest() (a.py:3) after step 3, and worker 1 in trainer.evaluate() (a.py:9). All workers must make "
        "the same calls, in the same order: each waits for the others"
    )
    waits(found, 1, call="body 1", number=9, what="a Trainer's call", leaves=True)
    said = found.verdict(1, [0, 1], [])
    assert said is not None
    assert said.startswith("worker 0 waits in trainer.digest() (a.py:3) after step 3, and worker 1 has returned from train_fn without it")


def test_at_the_end_of_a_loop_it_does_not_matter_what_asks_for_it() -> None:
    found = OneSided()
    waits(found, 0, call="body 0", closes=True)  # it left by `break` after the last step
    waits(found, 1, call="body 0", closes=True, what="trainer.run() (a.py:2)")
    assert found.verdict(1, [0, 1, 2], []) is None  # worker 2 may be in its last loop body
    waits(found, 1, call="body 0", what="trainer.run() (a.py:2)", number=8)
    assert found.verdict(1, [0, 1, 2], []) is not None


def test_whoever_may_have_been_told_already_is_not_left_behind() -> None:
    found = OneSided()
    waits(found, 0, loose=True)
    waits(found, 1, step=4, computes=True, calls=1)
    assert found.verdict(1, [0, 1], []) is None


def test_who_is_in_its_own_code_for_long_is_named_once_where_others_wait() -> None:
    found = OneSided()
    waits(found, 0, times=7, busy=True, what="(a.py:5)")
    waits(found, 1, step=4, computes=True)
    assert found.waited_for(1, [0, 1], []) == []
    waits(found, 0, times=1, busy=True, what="(a.py:6)")
    assert found.waited_for(1, [0], []) == []  # nobody waits
    assert found.waited_for(1, [0, 1], [0]) == []  # it has returned
    said = ["worker 0 is in the code of train_fn after step 3 (a.py:6) for over 8 s, and worker 1 waits for it"]
    assert found.waited_for(1, [0, 1], []) == said
    assert found.waited_for(1, [0, 1], []) == []
    assert found.verdict(1, [0, 1], []) is None
    waits(found, 0, times=8, busy=True, number=8)
    assert len(found.waited_for(1, [0, 1], [])) == 1  # another time


def test_whoever_has_left_the_loop_waits_for_the_others_to_save() -> None:
    found = OneSided()
    waits(found, 0, leaves=True)
    waits(found, 1, step=4, computes=True)
    said = found.verdict(1, [0, 1], [])
    assert said is not None
    assert said.startswith("worker 0 has left the loop after step 3 and returned from train_fn, and worker 1 has gone on to step 4.")


def test_a_counter_of_a_worker_that_joined_may_be_the_reason() -> None:
    found = OneSided()
    waits(found, 0, epoch=3)
    waits(found, 2, epoch=3, step=4, computes=True)
    said = found.verdict(3, [0, 2], [])
    assert said is not None
    assert said.endswith(
        "from the start of train_fn, unless they are given to register_for_checkpointing (of the Trainer, or of the loader)"
    )


def test_whoever_returned_does_not_come() -> None:
    found = OneSided()
    waits(found, 1, step=4, computes=True)
    said = found.verdict(1, [0, 1], [0])
    assert said is not None
    assert said.startswith("worker 0 has returned from train_fn, and worker 1 waits in step 4 for all workers")


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


def train(job: Any, what: str) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = elastic.Trainer(model, lambda o, b: o.square().mean(), optimizer, Rows(), batch_size=16, micro_batch_size=4)
    if what == "second":
        elastic.Trainer(model, lambda o, b: o.square().mean(), optimizer, Rows(), batch_size=16, micro_batch_size=4)
    for report in trainer.run(8):
        if report.step == 7 and what == f"break {job.worker}":
            break
        if what.startswith("break "):
            continue
        if report.step == 3 and report.leader:
            if what == "break":
                break
            if what == "sleep":
                time.sleep(15)
            elif what == "state_dict":
                trainer.state_dict()
            else:
                trainer.evaluate(Rows())
        elif report.step == 3 and what in ("digest", "state_dict"):
            trainer.digest()
    if what.startswith("break "):
        trainer.digest()
        assert trainer.step == 8
    return report.step


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("worker", [0, pytest.param(1, marks=pytest.mark.long)])
def test_leaving_behind_the_last_step_is_running_to_the_end(worker: int, leftovers: Any) -> None:
    assert elastic.run(train, workers=2, stages=1, args=[f"break {worker}"]).value == 7


@pytest.mark.slow
def test_a_second_trainer_is_refused(leftovers: Any) -> None:
    with pytest.raises(TrainerError, match="train_fn makes a second Trainer, but a job has only one"):
        elastic.run(train, workers=2, stages=1, args=["second"])


@pytest.mark.slow
@pytest.mark.long
def test_whoever_is_waited_for_is_named(leftovers: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert elastic.run(train, workers=2, stages=1, args=["sleep"]).value == 7
    assert "worker 0 is in the code of train_fn after step 3 (test_onesided_waits.py:" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "evaluate",
            r"worker 0 waits in trainer\.evaluate\(\) \(test_onesided_waits\.py:\d+\) after step 3, and worker 1 has gone on to step 4",
        ),
        pytest.param(
            "digest",
            r"(?=.*worker 0 (waits )?in trainer\.evaluate\(\) \(test_onesided_waits\.py:\d+\))"
            r"(?=.*worker 1 (waits )?in trainer\.digest\(\) \(test_onesided_waits\.py:\d+\))"
            r"worker [01] waits in .* after step 3, and worker",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "state_dict",
            r"(?=.*worker 0 (waits )?in trainer\.state_dict\(\) \(test_onesided_waits\.py:\d+\))"
            r"(?=.*worker 1 (waits )?in trainer\.digest\(\) \(test_onesided_waits\.py:\d+\))"
            r"worker [01] waits in .* after step 3, and worker",
            marks=pytest.mark.long,
        ),
        pytest.param("break", r"worker 0 has returned from train_fn, and worker 1 waits in step 4 for all workers", marks=pytest.mark.long),
    ],
)
@pytest.mark.long
def test_it_ends_within_seconds(what: str, said: str, leftovers: Any) -> None:
    began = time.monotonic()
    with pytest.raises(TrainerError, match=said):
        elastic.run(train, workers=2, stages=1, args=[what])
    assert time.monotonic() - began < 30

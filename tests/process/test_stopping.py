"""Tests that a job that was asked to stop, and cannot, says what it waits for."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.agent.stopping import StopProgress
from elastic.worker.onesided_waits import Wait

WAIT = {"epoch": 1, "step": 3, "computes": False, "number": 7, "what": "trainer.digest() (a.py:3)"}
BEGIN = "the job was asked to stop 5 s ago, and has not ended yet: "
END = ". Ask again to stop at once"


@pytest.mark.parametrize(
    ("wait", "place"),
    [
        ({}, "in trainer.digest() (a.py:3) after step 3, with the others or waiting for them"),
        ({"step": -1}, "in trainer.digest() (a.py:3) before the first step, with the others or waiting for them"),
        ({"busy": True, "what": "(a.py:9)"}, "in the code of train_fn after step 3 (a.py:9)"),
        ({"computes": True, "step": 4}, "computing step 4, or waiting for the others in it"),
        ({"leaves": True}, "returned from train_fn after step 3, and saving"),
    ],
)
def test_it_says_where_a_worker_is(wait: dict[str, Any], place: str) -> None:
    watch = StopProgress()
    watch.heard(0, Wait(**{**WAIT, **wait}), 100.0)
    assert watch.sentence(5.2, [0], {0: 3}, [], 102.0) == f"{BEGIN}worker 0 {place}{END}"


def test_workers_at_one_place_are_named_together_and_what_is_old_does_not_count() -> None:
    watch = StopProgress()
    watch.heard(0, Wait(**WAIT), 100.0)
    watch.heard(2, Wait(**WAIT), 100.5)
    watch.heard(1, Wait(**WAIT), 90.0)
    said = watch.sentence(5.0, [0, 1, 2, 3, 4], {0: 3, 1: 5, 2: 3, 3: None, 4: 9}, [4], 101.0)
    assert said == (
        f"{BEGIN}workers 0, 2 in trainer.digest() (a.py:3) after step 3, with the others or waiting for them; worker 1 last seen in "
        f"step 5; worker 3 in train_fn, before its first step; worker 4 returned from train_fn{END}"
    )


def train(job: Any) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    batch = lambda step, micro_batch: torch.ones(4, 8)  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters())
    trainer = elastic.Trainer(model, lambda o, b: o.square().mean(), optimizer, batch, batch_size=8, micro_batch_size=4)
    for report in trainer.run(1000):
        if report.step == 2:
            if report.leader:
                print("here", flush=True)
            time.sleep(9.0 if job.worker == 1 else 0.0)
    return report.step


@pytest.mark.slow
@pytest.mark.long
def test_a_stop_that_waits_for_a_loop_body_says_for_which(capfd: pytest.CaptureFixture[str]) -> None:
    said = ""

    def stop() -> None:
        nonlocal said
        while "here" not in said:
            said += capfd.readouterr().out
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    result = elastic.run(train, workers=2)
    assert result.stopped
    assert result.value < 999
    lines = [line for line in capfd.readouterr().err.splitlines() if "asked to stop" in line]
    assert len(lines) == 1
    assert "worker 0 computing step 3, or waiting for the others in it; worker 1 in the code of train_fn after step 2 (test_s" in lines[0]

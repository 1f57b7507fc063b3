"""Tests the measured times of layers, the bytes of a layer's output, and the bytes of optimizer state."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from elastic.engine.layer_times import Effort, SpeedReference
from elastic.engine.probe import probe


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_waiting_within_counts_by_the_clock_only_and_outside_not_at_all():
    effort = Effort()
    with effort:
        busy(0.02)
        time.sleep(0.05)
    time.sleep(0.02)
    with effort:
        busy(0.01)
    assert 0.03 <= effort.cpu_s < effort.computed_s - 0.04
    told = effort.told(SpeedReference())
    assert told[:3] == (effort.computed_s, effort.cpu_s, 0.0)
    assert told.reference_s > 0


def test_the_speed_reference_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    assert SpeedReference().measure() < 0.05
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "dtype", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), torch.float32, 8),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), torch.float32, 12),
        (lambda p: torch.optim.SGD(p, lr=0.1), torch.float32, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.bfloat16, 2),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), torch.float32, 4),
    ],
)
def test_the_bytes_of_an_optimizers_state(make, dtype, expected):
    parameter = nn.Parameter(torch.ones(8, 8, dtype=dtype))
    assert probe(make([parameter])).state_bytes == expected

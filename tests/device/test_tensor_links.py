"""Tests that tensors of a device, staged through pinned memory, are sent by the rules of all ways."""

from __future__ import annotations

import pytest

from tests.device.processes import python


def check(pins: bool) -> str:
    done = python("from tests.engine.tensor_link_rules import main; main()", FAKE_DEVICE_PINS=str(int(pins)))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_rules() -> None:
    assert not check(pins=True)


@pytest.mark.slow
@pytest.mark.long
def test_where_memory_cannot_be_pinned_the_rules_hold_too_and_it_says_so() -> None:
    assert check(pins=False).count("refuses to pin memory (raise `ulimit -l`): the training waits while messages are copied") == 1

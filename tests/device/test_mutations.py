"""Tests that the fake device shows defects which the CPU hides: missing waits, host access, a wrong device, unkeyed generators."""

from __future__ import annotations

import json

import pytest

from tests.device.processes import python

FOUND = {
    "no_wait_for_the_copy": "without having waited",
    "no_wait_for_the_computation": "without having waited",
    "nothing_copied_up": "copies of the state differ",
    "left_on_the_host": "same device",
    "batches_on_the_host": "same device",
    "unkeyed": "other bits",
    "read_in_place": "EOFError",  # the process has ended by SIGSEGV
    "wrong_device": "same device",
}


@pytest.mark.slow
@pytest.mark.long
def test_every_defect_is_found() -> None:
    done = python("from tests.device.mutations import main; main()")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == FOUND.keys()
    assert {name: FOUND[name] in text for name, text in found.items()} == dict.fromkeys(FOUND, True), found

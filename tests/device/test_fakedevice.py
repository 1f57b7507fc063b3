"""Tests the device that other tests use in place of a GPU: it computes, it is strict, and what breaks its rules is found."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.device.processes import python


@pytest.mark.slow
def test_the_fake_device_computes_and_finds_what_breaks_its_rules() -> None:
    done = python("from tests.device.checks import main; main()")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_host_access_to_its_memory_faults() -> None:
    done = python("from tests.device.checks import read_by_the_host; read_by_the_host()")
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.slow
@pytest.mark.long
def test_a_context_does_not_survive_a_fork() -> None:
    code = """
import os, tests.fakedevice, torch
torch.ones(3, device="fake")
if os.fork() == 0:
    try:
        torch.ones(3, device="fake")
    except RuntimeError as error:
        os._exit(7 if "forked" in str(error) else 1)
    os._exit(1)
os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = python(code)
    assert done.returncode == 7, done.stderr


def test_the_tests_own_process_does_not_have_it() -> None:
    """Forks of such a process cannot go backward, and torch's checkpoints take the device for their own."""
    assert "tests.fakedevice" not in sys.modules

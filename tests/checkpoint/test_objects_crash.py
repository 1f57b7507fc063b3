"""Breaks saves into an object store at some calls, by an error or a kill: either the old or the new checkpoint can be loaded.

`make crash-matrix` covers all calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoint.broken_objects import Died, broken, dead_in_clean_up, prepared


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    with prepared() as root:
        yield root


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "torn"), [(OSError, False), (Died, False), (Died, True)], ids=["fails", "dies", "dies half-way"])
def test_a_checkpoint_is_left(root: str, fault: Any, torn: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    result, whole = broken(root, {})
    assert result == "new"
    assert {"makedirs", "open", "pipe_file", "cat_file", "ls", "info", "rm_file", "write", "close"} <= set(whole.kinds)
    kinds = whole.kinds
    last = {kind: number for number, kind in enumerate(kinds)}
    chosen = {kinds.index(kind) for kind in last} | set(last.values())
    results = set()
    for at in sorted(chosen):
        if not torn or kinds[at] in ("write", "pipe_file"):
            result, breaking = broken(root, {at: fault}, torn=torn)
            assert breaking.count > at
            assert result in ("old", "new"), (at, kinds[at], result)
            results.add(result)
    assert results == {"old", "new"}


@pytest.mark.slow
def test_a_clean_up_that_dies_can_be_ended_by_somebody_else(root: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    found = list(dead_in_clean_up(root))
    assert {"ls", "rm_file"} <= {kind for kind, _ in found}
    assert {result for _, result in found} <= {"old", "new"}, found

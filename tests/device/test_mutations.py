"""Tests that the fake device shows defects which the CPU hides: missing waits, host access, a wrong device, unkeyed generators."""

from __future__ import annotations

import json

import pytest

from tests.device.processes import python

CHECK = """
import json
from tests.device import mutations
print(json.dumps([mutations.FOUND, mutations.seeded()]))
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_documentation_has_the_table() -> None:
    done = python("from tests.device.mutations import *; text = PATH.read_text(); assert written(text) == text")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_every_defect_is_found() -> None:
    done = python(CHECK)
    assert done.returncode == 0, done.stderr
    words, found = json.loads(done.stdout)
    assert found.keys() == words.keys()
    assert {name: words[name] in text for name, text in found.items()} == dict.fromkeys(words, True), found

"""The public API changes only on purpose."""

from __future__ import annotations

import difflib

from tests.packaging.public_api import PINNED, described


def test_the_public_api_is_the_pinned_one():
    pinned, found = PINNED.read_text(), described()
    change = "\n".join(difflib.unified_diff(pinned.splitlines(), found.splitlines(), "pinned", "found", lineterm=""))
    assert not change, f"if this change is meant, run `python -m tests.packaging.public_api` and name it in CHANGELOG.md:\n{change}"

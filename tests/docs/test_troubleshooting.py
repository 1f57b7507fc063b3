"""Messages that the page explains are those of the code, and its table of errors has all of them."""

from __future__ import annotations

import pytest

from tests.docs.troubleshooting import FILE, is_of, kinds, messages, named


@pytest.mark.long
def test_every_message_is_one_of_the_code() -> None:
    known = list(messages())
    assert len(named()) > 15
    assert [message for message in named() if not any(is_of(message, parts) for parts in known)] == []


@pytest.mark.parametrize(("message", "found"), [("a ... c", True), ("a ... d", False), ("c ... a ", False), ("x", False)])
def test_a_message_that_is_not_there_is_found_out(message: str, found: bool) -> None:
    assert is_of(message, ["a ", " b", " c"]) == found


def test_the_table_of_errors_is_up_to_date() -> None:
    assert FILE.read_text().endswith(kinds()), "run `python -m tests.docs.troubleshooting`"

"""Tests exceptions whose `__str__` fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from elastic.worker import main


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize("error", [MuteError(), SystemExit(MuteError()), ValueError(MuteError())])
def test_an_exception_without_a_text_is_one_of_train_fn(error: BaseException) -> None:
    """It was taken for a crash of the worker, which was started anew."""
    report = main._failure(SimpleNamespace(epoch=1, step=2), error)  # type: ignore[arg-type]
    assert report["kind"] == type(error).__name__
    assert "whose text raises RuntimeError" in report["message"]

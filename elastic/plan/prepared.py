"""Searches done before they are needed, in slices of a few milliseconds: for a running job and for a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, Literal, TypeVar

from elastic.errors import PlanError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Prepared(Generic[Question, Answer]):
    """Answers to questions of which one may come; equal questions are searched for once. What is impossible has no answer."""

    def __init__(self, questions: Iterable[Question], search: Callable[[Question], Generator[None, None, Answer]]) -> None:
        self._found: list[tuple[Question, Answer]] = []
        self._asked: list[Question] = []
        self._going = self._all(iter(questions), search)

    @property
    def classes(self) -> int:
        """How many searches were begun."""
        return len(self._asked)

    def advance(self) -> bool:
        """Takes the search a few milliseconds further; False once everything is found, or known to be impossible."""
        return next(self._going, False)

    def _all(
        self, questions: Iterator[Question], search: Callable[[Question], Generator[None, None, Answer]]
    ) -> Generator[Literal[True], None, None]:
        """A question is made only when it is its turn: for a thousand workers that takes a millisecond or two."""
        for question in questions:
            yield True
            if question in self._asked:
                continue
            self._asked.append(question)
            going = search(question)
            try:
                while True:
                    try:
                        next(going)
                    except StopIteration as end:
                        self._found.append((question, end.value))
                        break
                    yield True
            except PlanError:  # the one who asks searches again, and gets the error
                continue

    def answer(self, question: Question) -> Answer | None:
        """What `search` would give, if that is known by now."""
        return next((found for known, found in self._found if known == question), None)

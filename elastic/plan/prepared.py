"""Searches made before they are needed, in slices of a few milliseconds: for a running job and for a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, Literal, TypeVar

from elastic.errors import PlanError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Prepared(Generic[Question, Answer]):
    """Answers to questions that may come up. Equal questions are searched for once; an impossible one has no answer."""

    def __init__(self, questions: Iterable[Question], search: Callable[[Question], Generator[None, None, Answer]]) -> None:
        self._found: list[tuple[Question, Answer]] = []
        self._asked: list[Question] = []
        self._going = self._all(iter(questions), search)

    @property
    def classes(self) -> int:
        """Number of searches started."""
        return len(self._asked)

    def advance(self) -> bool:
        """Continues the search for a few milliseconds. Returns False once every question is answered or known to be impossible."""
        return next(self._going, False)

    def _all(
        self, questions: Iterator[Question], search: Callable[[Question], Generator[None, None, Answer]]
    ) -> Generator[Literal[True], None, None]:
        """Makes each question only at its turn: for a thousand workers that takes a millisecond or two."""
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
            except PlanError:  # the caller who needs the answer searches again, and gets the error
                continue

    def answer(self, question: Question) -> Answer | None:
        """Returns the result of `search` for this question, or None if it is not known yet."""
        return next((found for known, found in self._found if known == question), None)

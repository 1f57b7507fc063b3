"""A source whose parameters are their float32 masters, for formats that keep the values that the optimizer updates and no others."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch

from elastic.checkpoint.state import MASTER, PARAM, Contents, Source

FORMATS = frozenset({"deepspeed-universal"})
"""The formats that keep a parameter's values once, in float32."""


def with_main_values(source: Source, to: str) -> Source:
    """Returns the source as a format of `FORMATS` holds it, else the source itself."""
    masters = any(MASTER in states for states in source.contents.tensors.values())
    return MainValues(source) if masters and to in FORMATS else source


class MainValues:
    """A source in which a parameter with a master has the master's values and dtype; it has no masters besides."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.format = source.format

    @cached_property
    def contents(self) -> Contents:
        """The contents of the source, with masters as parameters."""
        found = {
            name: {state: states.get(MASTER, spec) if state == PARAM else spec for state, spec in states.items() if state != MASTER}
            for name, states in self._source.contents.tensors.items()
        }
        return replace(self._source.contents, tensors=found)

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Reads a run of one tensor, of the master if it is a parameter that has one."""
        of = self._source.contents
        main = state == PARAM and MASTER in of.tensors[of.ties.get(name, name)]
        return self._source.read(name, MASTER if main else state, start, stop)

    def close(self) -> None:
        """Closes the source."""
        self._source.close()

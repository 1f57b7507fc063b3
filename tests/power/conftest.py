"""The stand-in driver, built once, and stand-in GPUs for each test."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.power.nvml import Nvml
from examples.nvml_standin import STATE, GpuKind, StandIn, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in library. It is loaded into this process: the loader finds a library that is loaded already by its soname."""
    built = build(tmp_path_factory.mktemp("nvml"), "-Werror")
    ctypes.CDLL(str(built))
    return built


@pytest.fixture
def standin(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Four equal GPUs, in this process and in those that it starts."""
    made = StandIn.made(tmp_path / "gpus", [GpuKind()] * 4)
    for name, value in made.environment(library).items():
        monkeypatch.setenv(name, value)
    assert STATE in made.environment(library)
    monkeypatch.setenv("ELASTIC_CLOCKS", str(tmp_path / "clocks"))
    return made


@pytest.fixture
def nvml(standin: StandIn) -> Iterator[Nvml]:
    opened = Nvml()
    yield opened
    opened.close()

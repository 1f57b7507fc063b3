"""Tests the resources of a host as the kernel reports them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic.errors import SettingsError
from elastic.host.facts import anonymous_bytes, memory_bytes, processors
from elastic.settings import JobSettings, byte_count

GIB = 1 << 30


def machine(folder: Path, **limits: str) -> tuple[Path, Path, Path]:
    """8 GiB, and a control group `/outer/inner` with these limits."""
    meminfo, group, groups = folder / "meminfo", folder / "cgroup", folder / "groups"
    meminfo.write_text("MemFree:  1 kB\nMemTotal:       8388608 kB\n")
    group.write_text("1:name=systemd:/elsewhere\n0::/outer/inner\n")
    (groups / "outer" / "inner").mkdir(parents=True)
    for place, text in limits.items():
        path = {"root": groups, "outer": groups / "outer", "inner": groups / "outer" / "inner"}[place]
        (path / "memory.max").write_text(text + "\n")
    return meminfo, groups, group


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8 * GIB),
        ({"inner": "max"}, 8 * GIB),
        ({"inner": str(4 * GIB)}, 4 * GIB),
        ({"inner": "max", "outer": str(2 * GIB)}, 2 * GIB),
        ({"inner": str(16 * GIB), "root": "max"}, 8 * GIB),
    ],
)
def test_the_least_limit_counts(tmp_path, limits, expected):
    assert memory_bytes(*machine(tmp_path, **limits)) == expected


def test_the_older_groups_are_known_too(tmp_path):
    meminfo, groups, group = machine(tmp_path)
    inner = groups / "memory" / "job" / "step"
    inner.mkdir(parents=True)
    (groups / "memory" / "memory.limit_in_bytes").write_text(str(9223372036854771712))
    assert memory_bytes(meminfo, groups, group) == 8 * GIB
    (groups / "memory" / "memory.limit_in_bytes").write_text(str(3 * GIB))
    assert memory_bytes(meminfo, groups, group) == 3 * GIB
    group.write_text("9:name=systemd:/\n4:cpu,memory:/job/step\n0::/\n")
    (inner.parent / "memory.limit_in_bytes").write_text(str(2 * GIB))
    assert memory_bytes(meminfo, groups, group) == 2 * GIB
    (inner / "memory.limit_in_bytes").write_text(str(GIB))
    assert memory_bytes(meminfo, groups, group) == GIB


def test_where_nobody_says_nothing_is_known(tmp_path):
    assert memory_bytes(tmp_path / "no", tmp_path / "no", tmp_path / "no") is None
    assert anonymous_bytes(tmp_path / "no") == 0


def test_this_machine_and_this_process():
    found = memory_bytes()
    assert found is not None
    assert found > GIB / 4
    assert processors() == len(os.sched_getaffinity(0))
    before = anonymous_bytes()
    held = bytearray(os.urandom(1 << 20)) * 64
    assert 60 << 20 < anonymous_bytes() - before < 200 << 20
    assert held


@pytest.mark.parametrize(
    ("value", "count"),
    [(5, 5), ("5", 5), ("2GiB", 2 * GIB), ("1.5 kB", 1500), ("512MiB", 512 << 20), ("3gb", 3 * 10**9), (" 7 B ", 7)],
)
def test_bytes_are_read(value, count):
    assert byte_count(value) == count


@pytest.mark.parametrize("value", ["", "GiB", "2 Gib/s", "-1GB", True, 1.5, None])
def test_what_is_no_number_of_bytes_is_refused(value):
    with pytest.raises(SettingsError, match="number of bytes"):
        byte_count(value)


def test_no_memory_is_refused():
    with pytest.raises(SettingsError, match="memory=0"):
        JobSettings(name="job", workers=1, train_fn="m:f", isa="avx2", memory=0)

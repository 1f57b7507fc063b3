"""Tests what makes a host unfit for a job, in which words, and what is measured on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic.agent.fitness import Demand, HostReport, unfit, warnings
from elastic.agent.link_probes import LinkReport, Way
from elastic.errors import HostRefused, HostUnfit
from elastic.host.measures import Steal, available_bytes, unwritable
from elastic.settings import worker_environment

FAST = Way(rate=1e9)
FIT = HostReport(
    links={"a": LinkReport(there=FAST, back=FAST)},
    product="p" * 64,
    seconds=0.004,
    fingerprint={"torch": "2.13.0", "MKL_CBWR": "AVX2"},
    available=int(4e9),
    steal=0.1,
)
DEMAND = Demand(product="p" * 64, seconds=0.003, fingerprint={"torch": "2.13.0", "MKL_CBWR": "AVX2"}, worker_bytes=int(1e9))


def changed(**fields: Any) -> HostReport:
    return HostReport.from_json(json.loads(json.dumps(replace(FIT, **fields).to_json())))


def test_a_fit_host_and_one_of_which_nothing_is_known() -> None:
    assert HostReport.from_json(json.loads(json.dumps(FIT.to_json()))) == FIT
    assert unfit(FIT, DEMAND, "b", 4, ["a"]) is None
    assert unfit(HostReport(), DEMAND, "b", 4, ["a"]) is None
    assert unfit(FIT, Demand(), "b", 4, ["a"]) is None
    assert warnings(FIT) == []


@pytest.mark.parametrize(
    ("fields", "kind", "why"),
    [
        (
            {"fingerprint": {"torch": "2.7.1", "MKL_CBWR": "AVX2"}},
            HostRefused,
            "its torch is 2.7.1, and the job's 2.13.0: install",
        ),
        ({"fingerprint": {"torch": "2.13.0"}}, HostRefused, "its MKL_CBWR is , and the job's AVX2: bits depend on it"),
        ({"product": "q" * 64}, HostUnfit, "has the digest qqqqqqqqqqqq, and pppppppppppp on the host that coordinates"),
        ({"product": None, "broken": "killed"}, HostUnfit, "a test product of matrices failed there: killed; its processor or memory may"),
        ({"seconds": 0.015}, HostUnfit, "is 5.0 times as slow as that of the host that coordinates the job (15.0 ms of processor time"),
        ({"available": int(3.9e9)}, HostUnfit, "4 workers of this job need 4,000 MB at least, and 3,900 MB are free there: start fewer"),
        ({"disk": "/run: No space left on device"}, HostUnfit, "its run directory cannot be written: /run: No space left on device"),
        ({"links": {"a": LinkReport(there=Way(why="refused"))}}, HostUnfit, "host b cannot reach host a: refused: let every host reach"),
        (
            {"links": {"a": LinkReport(there=FAST, back=Way(why="refused"))}},
            HostUnfit,
            "host a cannot reach host b: refused (in the other direction 1,000 MB/s get through): let every host reach",
        ),
    ],
)
def test_an_unfit_host_is_refused_with_what_was_measured_and_what_to_do(fields: dict[str, Any], kind: type, why: str) -> None:
    found = unfit(changed(**fields), DEMAND, "b", 4, ["a"])
    assert found is not None
    assert found.kind is kind
    assert why in found.reason


def test_a_broken_link_to_a_host_that_has_left_meanwhile_does_not_count() -> None:
    assert unfit(changed(links={"a": LinkReport(there=Way(why="refused"))}), DEMAND, "b", 4, ["c"]) is None


def test_what_is_slow_is_a_warning() -> None:
    slow = changed(links={"a": LinkReport(there=FAST, back=Way(rate=2e6))}, steal=0.75)
    assert unfit(slow, DEMAND, "b", 4, ["a"]) is None
    assert warnings(slow) == ["the link from host a passes only 2 MB/s", "other machines on its hardware take 75% of its processors"]


def test_a_host_with_many_slow_links_is_one_sentence() -> None:
    slow = changed(links={f"host-{number}": LinkReport(there=Way(rate=(number + 1) * 1e6), back=FAST) for number in range(20)})
    assert warnings(slow) == ["the link to host host-0 passes only 1 MB/s, and 8 more pass less than 10 MB/s"]


@pytest.mark.slow
@pytest.mark.long
def test_the_product_has_the_same_bits_in_each_process_and_others_with_another_instruction_set() -> None:
    def product(isa: str) -> str:
        command = [sys.executable, "-m", "elastic.worker.node_check", "1"]
        done = subprocess.run(command, env={**os.environ, **worker_environment(1, isa)}, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        assert found["seconds"] > 0
        assert found["fingerprint"]["MKL_CBWR"]
        return found["product"]

    assert product("avx2") == product("avx2") != product("default")


def test_memory_that_is_free_is_the_least_of_the_machine_s_and_what_each_control_group_leaves(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
    group.write_text("0::/job/step\n")
    inner = tmp_path / "groups" / "job" / "step"
    inner.mkdir(parents=True)
    assert available_bytes(meminfo, tmp_path / "groups", group) == 6000 * 1024
    for folder, limit in ((inner, "max"), (inner.parent, "5000000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("3000000")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert available_bytes(meminfo, tmp_path / "groups", group) == 2_500_000
    assert available_bytes(tmp_path / "none", tmp_path / "groups", tmp_path / "none") is None


def test_what_control_groups_of_version_1_leave_counts_too(tmp_path: Path) -> None:
    group, inner = tmp_path / "cgroup", tmp_path / "groups" / "memory" / "job" / "step"
    group.write_text("5:devices:/\n4:memory:/job/step\n0::/\n")
    inner.mkdir(parents=True)
    for folder, limit in ((inner, 9223372036854771712), (inner.parent, 5_000_000)):
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        (folder / "memory.usage_in_bytes").write_text("3000000")
        (folder / "memory.stat").write_text("cache 1\ninactive_file 7\ntotal_inactive_file 500000\n")
    assert available_bytes(tmp_path / "none", tmp_path / "groups", group) == 2_500_000


def test_steal(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu 10 0 10 70 0 0 0 10 0 0\n")
    steal = Steal(stat)
    assert steal.part() is None
    stat.write_text("cpu 20 0 20 100 0 0 0 60 0 0\n")
    assert steal.part() == 0.5
    stat.write_text("nonsense")
    assert steal.part() is None


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    assert unwritable(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert unwritable(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"

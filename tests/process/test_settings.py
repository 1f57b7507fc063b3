from __future__ import annotations

import json
from typing import Any

import pytest

from elastic import settings
from elastic.errors import SettingsError
from elastic.settings import JobSettings, agent_environment, best_isa, detect_isa, worker_environment

AVX2 = "flags\t\t: fpu sse avx avx2\n"
AVX512 = "flags\t\t: fpu avx2 avx512f avx512bw avx512dq avx512vl\n"


def job(**change: Any) -> JobSettings:
    return JobSettings(**{"name": "job", "workers": 4, "train_fn": "module:function", "isa": "avx2", **change})


def test_settings_survive_json() -> None:
    given = job(args=(1, "two", [3.0]), stages=2, etcd="host:1", seed=9, threads=3, min_workers=2, respawn=False, directory="/runs/1")
    assert JobSettings.from_json(json.loads(json.dumps(given.to_json()))) == given


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": 2.0}, r"workers=2\.0"),
        ({"workers": True}, "workers=True"),
        ({"threads": 0}, "threads=0"),
        ({"stages": 0}, "stages=0"),
        ({"stages": 5}, "stages=5 needs at least 5 workers, and workers=4"),
        ({"min_workers": 0}, "min_workers=0"),
        ({"min_workers": 5}, "min_workers=5 is more than workers=4"),
        ({"spares": -1}, "spares=-1: use a whole number of at least 0"),
        ({"spares": True}, "spares=True"),
        ({"copies": 0}, "copies=0: use a whole number from 1 .* to 16. Each copy is on another host"),
        ({"copies": -1}, "copies=-1: use a whole number"),
        ({"copies": 1000}, "copies=1000: use a whole number"),
        ({"copies": 2.0}, "copies=2.0: use a whole number"),
        ({"copies": "2"}, "copies='2': use a whole number"),
        ({"copies": True}, "copies=True: use a whole number"),
        ({"copies": None}, "copies=None: use a whole number"),
        ({"spares": 1, "respawn": False}, "spares=1 are new workers, which respawn=False forbids"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": ""}, "name=''"),
        ({"isa": "sse"}, "isa='sse': use one of avx512, avx2, default"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 64}, "seed="),
        ({"stopped_after": 0}, "stopped_after=0: use seconds above 0, or None to wait for a stopped worker"),
        ({"hung_after": -1.0}, r"hung_after=-1\.0: use seconds above 0, or None to wait for a hung worker"),
        ({"hung_after": "3"}, "hung_after='3'"),
        ({"args": (1, {2})}, r"args\[1\] is a set that cannot be sent"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        job(**change)


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "isa"),
    [
        (AVX2, "x86_64", "avx2"),
        (AVX512, "x86_64", "avx512"),
        (AVX512.replace("avx512vl", ""), "x86_64", "avx2"),
        ("flags : fpu\n", "x86_64", "default"),
        ("", "x86_64", "default"),
        (AVX512, "aarch64", "default"),
    ],
)
def test_the_isa_is_the_best_that_is_complete(cpuinfo: str, machine: str, isa: str) -> None:
    assert detect_isa(cpuinfo, machine) == isa


def test_this_machine_has_an_isa_that_jobs_accept() -> None:
    assert job(isa=best_isa()).isa == best_isa()


def test_what_bits_depend_on_is_fixed() -> None:
    fixed = worker_environment(3, "avx512")
    assert fixed["OMP_NUM_THREADS"] == fixed["MKL_NUM_THREADS"] == "3"
    assert fixed["MKL_CBWR"] == "AVX512,STRICT"
    assert fixed["PYTHONHASHSEED"] == "0"
    assert fixed.keys() == worker_environment(1, "default").keys()


def test_only_the_agent_gets_the_agents_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "upb")
    assert agent_environment()["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] == "python"
    assert "PYTHONWARNINGS" not in agent_environment()
    assert settings.own_environment()["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] == "upb"
    assert settings.own_environment()["PYTHONWARNINGS"] == "error"


def test_the_fingerprint_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    here = settings.fingerprint()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    there = settings.fingerprint()
    assert {name for name in here if here[name] != there[name]} == {"MKL_CBWR"}
    assert {"torch", "python", "machine", "capability", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY"} <= here.keys()

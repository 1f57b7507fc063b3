"""Tests placements on DT-FM's networks: at most the best known cost, for any seed and order of devices; refuses bad files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.dtfm import Instance, load
from elastic.errors import PlanError
from elastic.plan.placement import place

DATA = Path(os.environ.get("ELASTIC_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data")) / "dtfm"
BEST_KNOWN = {"case0": 3.440, "case2": 16.087}

on_data = pytest.mark.skipif(not DATA.is_dir(), reason="set ELASTIC_DATA to the directory that holds dtfm/")


def placed(instance: Instance, seed: int, order: np.ndarray):
    links = np.ix_(order, order)
    return place(
        instance.latency_s[links], instance.bytes_per_s[links], instance.groups, instance.exchange_bytes, instance.boundary_bytes, seed=seed
    )


@on_data
@pytest.mark.slow
@pytest.mark.parametrize("case", BEST_KNOWN)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_known_is_reached_with_any_seed_and_any_order_of_devices(case, seed):
    instance = load(DATA / f"{case}.json")
    found = placed(instance, seed, np.random.default_rng(seed).permutation(len(instance.latency_s)))
    assert found.cost_s < BEST_KNOWN[case] + 0.0005


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network.json"


def test_a_file_is_read_in_seconds_and_bytes_per_second(file):
    file.write_text(json.dumps({"name": "two", "nodes": 2, "delay_ms": [[0, 5], [5, 0]], "bandwidth_gbps": [[10, 2], [2, 10]]}))
    instance = load(file)
    assert instance.latency_s[0, 1] == 0.005
    assert instance.bytes_per_s[1, 0] == 2.5e8
    assert instance.groups == 8
    assert instance.exchange_bytes == pytest.approx(0.65e9)
    assert instance.boundary_bytes == pytest.approx(0.4713e9, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold one object"),
        ('{"bandwidth_gbps": [[1]]}', "has no field delay_ms"),
        ('{"delay_ms": [[1]]}', "has no field bandwidth_gbps"),
        ('{"delay_ms": [["x"]], "bandwidth_gbps": [[1]]}', "delay_ms must be a square matrix of numbers"),
        ('{"delay_ms": [[1, 2], [3]], "bandwidth_gbps": [[1]]}', "delay_ms must be a square matrix of numbers"),
        ('{"delay_ms": [[1]], "bandwidth_gbps": [[1, 2]]}', r"bandwidth_gbps has shape \(1, 2\)"),
        ('{"delay_ms": [[1]], "bandwidth_gbps": [[1, 2], [3, 4]]}', "both must be"),
        ('{"delay_ms": [], "bandwidth_gbps": []}', r"delay_ms has shape \(0,\)"),
    ],
)
def test_malformed_files_name_the_field(file, text, message):
    file.write_text(text)
    with pytest.raises(PlanError, match=message):
        load(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path / "absent.json")
